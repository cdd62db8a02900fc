"""The optimizers that make the updates: one of a type, or several of different types over different parameters.

Takes parameter groups (parameter_groups.py), each with the values and the type it has of its own; gives one torch
optimizer. What else changes a parameter (a decay of the product, a bound on its norm) reads and writes it by `value` and
`add`, so that it goes through the compensated sum where the parameter's optimizer keeps one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.training.optim.adamw_kahan import AdamWKahan


def make_inner(
    kind: str, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Optimizer:
    """'adamw_kahan', 'adamw' (torch) or 'adamw8bit' (bitsandbytes) over torch's parameter groups, which may hold none.

    A group may have a value of its own for any of the keyword arguments, an `lr_factor`, and a `type` instead of `kind`.
    """
    by_type: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        own = {key: value for key, value in group.items() if key != "type"}
        by_type.setdefault(group.get("type", kind), []).append(own)
    parts = [
        _of_type(one, members, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for one, members in by_type.items()
    ]
    return parts[0] if len(parts) == 1 else ChainedOptimizer(parts)


def _of_type(kind: str, groups: list[dict[str, Any]], **values: Any) -> Optimizer:
    if kind == "adamw_kahan":
        return AdamWKahan(groups, **values)
    if kind == "adamw":
        return torch.optim.AdamW(groups, **values)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **values)


def bytes_per_parameter(kind: str, element_size: int) -> int:
    """What one trained number takes at any time: itself, its fp32 gradient sum, optimizer state."""
    states = {"adamw_kahan": element_size + 4 + 4, "adamw": 2 * element_size, "adamw8bit": 2}[kind]
    return element_size + 4 + states


def update_bytes_per_parameter(kind: str, element_size: int, on_gpu: bool) -> tuple[int, int]:
    """What one number takes in the update besides: for as long as it lasts, and while its own parameter is updated.

    Gradients in the parameter's dtype are all made before the update (optimizer.py); in fp32 they are the sums themselves.
    AdamWKahan works parameter by parameter, with three fp32 tensors alive. Torch's AdamW makes the denominators of all
    parameters together on a GPU; elsewhere one parameter's in two steps, when that of the one before is still alive.
    bitsandbytes' has one kernel.
    """
    gradient = element_size if element_size < 4 else 0
    all_denominators, one_denominator = (element_size, 0) if on_gpu else (0, 3 * element_size)
    at_once = {"adamw_kahan": (0, 3 * 4), "adamw": (all_denominators, one_denominator), "adamw8bit": (0, 0)}[kind]
    return gradient + at_once[0], at_once[1]


class ChainedOptimizer(Optimizer):
    """Optimizers that step as one. Their groups and the states of their parameters are seen together."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts
        self.part_of = {p: part for part in parts for group in part.param_groups for p in group["params"]}
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state  # no parameter is in two

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of each."""
        for part in self.parts:
            part.step()


def value(optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
    """The parameter in fp32, with what its rounding left over where its optimizer keeps that; a new tensor."""
    kahan = _compensating(optimizer, parameter)
    return kahan.value(parameter) if kahan else parameter.detach().to(torch.float32, copy=True)


@torch.no_grad()
def add(optimizer: Optimizer, parameter: nn.Parameter, change: Tensor) -> None:
    """parameter += change (fp32), in place, through the compensated sum where there is one, else rounded once."""
    kahan = _compensating(optimizer, parameter)
    if kahan:
        kahan.add(parameter, change)
    else:
        parameter.copy_(parameter.float() + change)


def _compensating(optimizer: Optimizer, parameter: nn.Parameter) -> AdamWKahan | None:
    """The AdamWKahan that updates `parameter`, if one does."""
    part = optimizer.part_of[parameter] if isinstance(optimizer, ChainedOptimizer) else optimizer
    return part if isinstance(part, AdamWKahan) else None
