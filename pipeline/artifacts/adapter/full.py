"""Weights of the model that were trained in full beside an adapter, as they lie in an adapter's folder.

Takes tensors under global names (`model.norm.weight`) and which of the model's names are one tied weight; gives what an
adapter's file, configuration and metadata say of them. The form is that of PEFT's `modules_to_save`: the whole tensor
under its own name, and its module named in full in adapter_config.json.

A tied head is stored once more under its own name. Stock PEFT (0.21) puts a copy in the place of every module it is told
of, and asks the file for the weight of each. Told of the embedding alone it would leave the head as it was in the base;
`ensure_weight_tying`, which LORA alone knows, ties the two copies and asks for both all the same.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.formats.dtypes import FLOATS

ROWS_AT_A_TIME = 4096


def named(full: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """All names with their tensors. `tied`: a name → that of the weight which it is, and under which `full` has it.

    Raises ValueError for a tensor that holds NaN or infinite values, or integers, or is a tied copy's own.
    """
    if own := sorted(full.keys() & tied.keys()):
        raise ValueError(f"{own[0]} is {tied[own[0]]}, and not a tensor of its own")
    for name, tensor in full.items():
        if not holds_numbers(tensor):
            raise ValueError(f"{name}: a tensor trained in full holds NaN or infinite values, or integers")
    return {**full, **{name: full[source] for name, source in tied.items() if source in full}}


def holds_numbers(tensor: torch.Tensor) -> bool:
    """Whether it is floating point, of 16 bits or more, without NaN and infinite values.

    It is looked at in pieces, as an embedding has gigabytes.
    """
    return tensor.dtype in FLOATS.values() and all(
        bool(part.isfinite().all()) for part in torch.atleast_1d(tensor).split(ROWS_AT_A_TIME)
    )


def for_config(full: Mapping[str, torch.Tensor], tied: Mapping[str, str], peft_type: str) -> dict[str, Any]:
    """What adapter_config.json says: the modules by their full names, and whether two of them are tied."""
    names = [*full, *(name for name, source in tied.items() if source in full)]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    ties = {"ensure_weight_tying": True} if peft_type == "LORA" and len(names) > len(full) else {}
    return {"modules_to_save": modules or None, **ties}


def for_metadata(full: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, Any]:
    """What our own facts say: "full", the names of the tensors, and "tied", the names that are copies of one of these."""
    copies = {name: source for name, source in tied.items() if source in full}
    return ({"full": list(full)} if full else {}) | ({"tied": copies} if copies else {})
