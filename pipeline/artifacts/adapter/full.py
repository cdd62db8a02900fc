"""Weights of the model that were trained in full beside an adapter, as they lie in an adapter's folder.

Writing takes tensors under global names (`model.norm.weight`) and which of the model's names are one tied weight; gives
what an adapter's file, configuration and metadata say of them. The form is that of PEFT's `modules_to_save`: the whole
tensor under its own name, and its module named in full in adapter_config.json.

A tied head is stored once more under its own name. Stock PEFT (0.21) puts a copy in the place of every module it is told
of, and asks the file for the weight of each. Told of the embedding alone it would leave the head as it was in the base;
`ensure_weight_tying`, which LORA alone knows, ties the two copies and asks for both all the same.

Reading takes the tensors that are not the adapter's; gives them by their names in the model, or refuses what nobody
announced. Three things announce one: PEFT's `modules_to_save` (a module, or a module's last name, or one that contains
others), PEFT's `bias` (trained biases), and "full" and "tied" of our own facts, which name tensors. PEFT's
`save_embedding_layers` announces nothing: it puts embedding and head beside the adapter where either is adapted, or the
vocabulary was resized, and loads them again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, PEFT_PREFIX
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA
from pipeline.formats.dtypes import FLOATS
from pipeline.names import HEAD_MODULE, is_embedding, is_head

ROWS_AT_A_TIME = 4096


def named(full: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """All names with their tensors. `tied`: a name → that of the weight which it is, and under which `full` has it.

    Raises ValueError for a tensor that holds NaN or infinite values, or integers, or is a tied copy's own.
    """
    if twice := sorted(full.keys() & tied.keys()):
        raise ValueError(f"{twice[0]} is {tied[twice[0]]}, and not a tensor of its own")
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
    ties = {"ensure_weight_tying": True} if peft_type == FAMILIES[LORA].peft_type and len(names) > len(full) else {}
    return {"modules_to_save": modules or None, **ties}


def for_metadata(full: Mapping[str, torch.Tensor], tied: Mapping[str, str]) -> dict[str, Any]:
    """What our own facts say: "full", the names of the tensors, and "tied", the names that are copies of one of these."""
    copies = {name: source for name, source in tied.items() if source in full}
    return ({"full": list(full)} if full else {}) | ({"tied": copies} if copies else {})


def read_full(
    folder: Path, rest: dict[str, torch.Tensor], config: dict[str, Any], own: dict[str, Any], expected: str
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """What was trained in full, {name in the model: tensor}, and which of these names are copies. `rest`: all but the adapter's.

    A copy is of the embedding or head: one that nothing announces, or that lies beneath an adapter of the same module.
    `config` and `own`: the configuration and our own facts. `expected`: what a tensor of the adapter is called, in words.
    Raises UserError for a tensor that is not announced, one that is announced and missing, one that is there twice, and
    NaN or infinite values.
    """
    named = {_name_in_model(name): tensor for name, tensor in rest.items()}
    if len(named) < len(rest):
        twice = next(name for name in named if sum(_name_in_model(stored) == name for stored in rest) > 1)
        raise UserError(f"{folder}: {twice} is in the file more than once. One of them would be lost: leave one.")
    modules = config.get("modules_to_save") or []
    ties = [HEAD_MODULE] if config.get("ensure_weight_tying") else []  # PEFT saves a tied head and does not list it
    announced = {*own.get("full", ()), *own.get("tied", ())}
    biases = str(config.get("bias") or "none") != "none"
    unannounced = [
        name
        for name in named
        if not (name in announced if own else any(_is_of(name, module) for module in [*modules, *ties]))
        and not (biases and name.endswith(".bias"))
    ]
    unknown = [name for name in unannounced if own or not _is_table(name)]
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} tensors are no {expected}: {unknown[0]} first.")
    missing = sorted(announced - named.keys()) if own else [m for m in modules if not any(_is_of(n, m) for n in named)]
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} was trained in full by its {CONFIG_FILE}, and is not in the file. The adapter is "
            "incomplete."
        )
    for name, tensor in named.items():
        if not holds_numbers(tensor):
            raise UserError(f"{folder}: {name} holds NaN or infinite values, or integers. Its training diverged.")
    beneath = {_name_in_model(name) for name in rest if ".base_layer." in name}
    return named, frozenset([*unannounced, *(n for n in beneath if _is_table(n))])


def _name_in_model(name: str) -> str:
    """A tensor's name in the model."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _is_of(name: str, module: str) -> bool:
    """Whether PEFT takes a tensor's module, or one that contains it, for `module`: where its name ends so ('norm' is
    'model.norm', and 'input_layernorm' too)."""
    parts = name.split(".")
    return any(".".join(parts[:n]).endswith(module) for n in range(1, len(parts)))


def _is_table(name: str) -> bool:
    """Whether a tensor is of the embedding or of the head."""
    module = name.rpartition(".")[0]
    return is_embedding(module) or is_head(module)
