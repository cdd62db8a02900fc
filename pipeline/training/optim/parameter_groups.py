"""Which trained parameters share a learning rate, a weight decay and moments: torch's parameter groups, chosen by name.

Takes trained parameters by their global name; gives groups for an optimizer, each with `lr_factor`, by which the
schedule's rate is multiplied at every step, and values of its own where it has them.

LoRA+ (Hayou, Ghosh & Yu 2024, arXiv:2402.12354, §4): B, which begins at zero, learns at λ times the rate of A. What is
fast is told by the name and by being a matrix; all else (A, norms, biases, DoRA's magnitudes, embeddings) keeps the rate.
PEFT's helper gives every parameter of one dimension the fast rate, which the paper does not.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from pipeline.config import tables
from pipeline.console import UserError
from pipeline.families import FAMILIES
from pipeline.patterns import matches

_NAMES = sorted({name for row in FAMILIES.values() for name in row.fast})
FAST = re.compile(rf"(.*\.)?(lora_)?({'|'.join(_NAMES)})(\.default)?(\.weight)?")


class ParamGroupOverride(NamedTuple):
    """Parameters with values of their own, by patterns of their names: an optimizer's arguments, `type`, `lr_factor`."""

    names: Sequence[str]
    values: Mapping[str, Any]


def specials(optimizer: tables.Optimizer) -> list[ParamGroupOverride]:
    """[[optimizer.groups]] as keyword arguments of an optimizer and its `type`: what each says, and nothing else."""
    found = []
    for group in optimizer.groups:
        said = group.model_dump(include={"type", "weight_decay", "eps"}, exclude_none=True)
        if group.lr_ratio is not None:
            said["lr_factor"] = group.lr_ratio
        if group.beta1 is not None or group.beta2 is not None:
            said["betas"] = tuple(
                getattr(optimizer if getattr(group, b) is None else group, b) for b in ("beta1", "beta2")
            )
        found.append(ParamGroupOverride(group.names, said))
    return found


def is_fast(name: str, parameter: nn.Parameter) -> bool:
    """Whether LoRA+ gives it the higher rate: an adapter's B, or what stands between B and A (MosLoRA's M)."""
    return parameter.dim() >= 2 and FAST.fullmatch(name) is not None


def build(
    parameters: Mapping[str, nn.Parameter],
    *,
    fast_ratio: float,
    weight_decay: float,
    undecayed: Collection[str] = (),
    specials: Sequence[ParamGroupOverride] = (),
) -> list[dict[str, Any]]:
    """Groups over `parameters`, which may be none: at least one group, in which there may be nothing.

    `fast_ratio`: LoRA+'s λ; 1 leaves one rate. `specials`: the first that names a parameter has it. `undecayed`: names
    whose weight decay is not the optimizer's, whatever else is said of them.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        values = {"lr_factor": fast_ratio if is_fast(name, parameter) else 1.0, "weight_decay": weight_decay}
        values |= values_of(name, specials)
        if name in undecayed:
            values["weight_decay"] = 0.0
        group = groups.setdefault(tuple(sorted(values.items())), {"params": [], **values})
        group["params"].append(parameter)
    return list(groups.values()) or [{"params": [], "lr_factor": 1.0, "weight_decay": weight_decay}]


def values_of(name: str, specials: Sequence[ParamGroupOverride]) -> Mapping[str, Any]:
    """What the first of `specials` that names the parameter says; nothing where none does."""
    return next((special.values for special in specials if _names(special, name)), {})


def check(specials: Sequence[ParamGroupOverride], names: Collection[str]) -> None:
    """UserError for a pattern that matches none of `names`, the trained parameters of the whole model."""
    for pattern in (pattern for special in specials for pattern in special.names):
        if not any(matches(pattern, name, "optimizer.groups") for name in names):
            raise UserError(
                f"optimizer.groups: '{pattern}' names no parameter that is trained; there are {', '.join(sorted(names)[:3])}, …"
            )


def _names(special: ParamGroupOverride, name: str) -> bool:
    return any(matches(pattern, name, "optimizer.groups") for pattern in special.names)
