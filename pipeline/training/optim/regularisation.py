"""What holds an adapter's product s·B·A down beside the loss: decay of the product, and a bound on its norm.

Takes a stage's (A, B, s) by module and the optimizer that updates them; changes A and B, before and after its update.
Both go through the optimizer's compensated sum where it has one: as all that is far below half a unit in the last place
of bf16, they would be lost without. No D×D matrix is made: all that is needed of one factor is its Gram matrix [R, R].
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from pipeline.model.adapters.base import trainable
from pipeline.model.stage import Stage
from pipeline.training.optim.inner import add, value
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer


class Factors(NamedTuple):
    """One module's adapter: A [R, D_in], B [D_out, R], s."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


def factors_of(stage: Stage) -> dict[str, Factors]:
    """The adapters of a stage that are a pair (A, B) with a scaling, ours or PEFT's, by module."""
    trained, found = trainable(stage), {}
    for name, parameter in trained.items():
        module, _, letter = name.rpartition(".")
        if letter == "A" and f"{module}.B" in trained:
            scaling: Any = stage.model.get_submodule(module).scaling
            s = scaling["default"] if isinstance(scaling, dict) else scaling
            found[module] = Factors(parameter, trained[f"{module}.B"], float(s))
    return found


@torch.no_grad()
def decay_products(factors: Mapping[str, Factors], decay: float, optimizer: Optimizer) -> None:
    """The decoupled weight decay of ½·λ·‖s·B·A‖²_F, λ = `decay`, instead of AdamW's of ½·λ·(‖A‖² + ‖B‖²).

        A ← A − lr_A·λ·s²·(Bᵀ·B)·A        B ← B − lr_B·λ·s²·B·(A·Aᵀ)

    both from the weights before the step. To be called before the optimizer's own update, whose weight decay on A and B
    must be 0: the two together are then AdamW's step, θ ← θ − lr·(m/(√v + ε) + λ·∇), in which the decay is no part of
    what is divided by √v (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, line 12; there ∇ is θ, here the gradient
    above), nor of what is clipped. Rates are those of the groups, so with LoRA+ B decays as much faster as it learns.
    Depends on what the adapter does alone: not on how s·B·A is divided between A and B. In fp32.
    """
    rates = _rates(optimizer)
    for a, b, s in factors.values():
        A, B = value(optimizer, a), value(optimizer, b)
        change_A = (B.T @ B) @ A * (-rates[a] * decay * s * s)
        change_B = B @ (A @ A.T) * (-rates[b] * decay * s * s)
        add(optimizer, a, change_A)
        add(optimizer, b, change_B)


@torch.no_grad()
def bound_norms(factors: Mapping[str, Factors], largest: float, optimizer: Optimizer) -> int:
    """Where ‖s·B·A‖_F > `largest`, multiply A and B by √(largest / ‖s·B·A‖_F) each; returns how many modules were.

    qlora-pipe's `scale_weight_norms` (after kohya's max-norm regularisation), to be called after each update. The norm
    is √Σ (BᵀB) ⊙ (AAᵀ), in fp32 and summed in fp64. One transfer to the host for all modules.
    """
    if not factors:
        return 0
    values = {module: (value(optimizer, a), value(optimizer, b)) for module, (a, b, _) in factors.items()}
    squares = torch.stack([((B.T @ B).double() * (A @ A.T).double()).sum() for A, B in values.values()])
    norms = dict(zip(factors, squares.clamp(min=0).sqrt().tolist(), strict=True))
    too_large = {m: abs(f.scaling) * norms[m] for m, f in factors.items() if abs(f.scaling) * norms[m] > largest}
    for module, norm in too_large.items():
        ratio = math.sqrt(largest / norm)
        for parameter, before in zip(factors[module][:2], values[module], strict=True):
            add(optimizer, parameter, before * (ratio - 1))
    return len(too_large)


def attach(
    optimizer: PipelineOptimizer, factors: Mapping[str, Factors], decay: float | None, largest_norm: float | None
) -> None:
    """Have each of `optimizer`'s updates decay the products by `decay` before it, and bound their norms after it."""
    if decay is not None:
        optimizer.before_update.append(lambda: decay_products(factors, decay, optimizer.inner))
    if largest_norm is not None:
        optimizer.after_update.append(lambda: bound_norms(factors, largest_norm, optimizer.inner))


def _rates(optimizer: Optimizer) -> dict[nn.Parameter, float]:
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
