"""Puts the kernels into a stage, by structure: what a module computes decides, not its model's name.

Takes a stage with its weights and adapters; replaces the forward of norms and gated MLPs that compute what a kernel
computes, and says how many took which. A candidate is compared with the module's own forward on random input of the
module's dtype, so a module that does anything else (a clamp, a bias, another activation) is left alone.

A frozen linear layer and SDPA save nothing that an exact backward does not need. With these replaced, a Cohere layer
saves exactly the minimum: docs/performance.md has the table, tests/test_accounting.py counts it.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.kernels.multiplicative import gated_down_proj
from pipeline.kernels.norm import layer_norm, rms_norm
from pipeline.kernels.swiglu import ACTIVATIONS, swiglu
from pipeline.model.adapters import MultiplicativeLoRA
from pipeline.model.stage import Stage

KERNELS = ("norm", "swiglu", "multiplicative")
PROBE_ROWS = 5
# Rows of the probe, so that the form of a norm shows: an offset for the mean, a scale for the variance.
OFFSET, SPREAD = 0.75, 2.0

Forward = Callable[..., Tensor]


def apply(stage: Stage, wanted: frozenset[str]) -> Counter[str]:
    """Replace the forwards of `stage`'s modules that the `wanted` kernels serve; how many took each kernel."""
    taken: Counter[str] = Counter()
    parts: list[nn.Module] = list(stage.layers.values())
    if stage.is_last:
        parts.append(stage.model.base_model.norm)
    for part in parts:
        for module in part.modules():
            for kernel, candidate in _candidates(module, wanted):
                if _computes_the_same(module, candidate):
                    module.forward = candidate  # type: ignore[method-assign]
                    taken[kernel] += 1
                    break
    return taken


def _candidates(module: nn.Module, wanted: frozenset[str]) -> list[tuple[str, Forward]]:
    """(kernel, forward) pairs that `module` may be replaced by, judged by what it consists of."""
    if "norm" in wanted and _is_norm(module):
        return [("norm", forward) for forward in _norm_forwards(module)]
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return _mlp_forwards(module, wanted)
    return []


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    return (
        set(own) == {"weight"} and own["weight"].dim() == 1 and _eps(module) is not None and not list(module.children())
    )


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm_forwards(module: nn.Module) -> list[Forward]:
    eps = _eps(module)

    def of(function: Callable[..., Tensor], **form: Any) -> Forward:
        # The module's weight is looked up at each call: a checkpoint or `.to` may have put another one there.
        return lambda x: function(x, module.weight, eps, **form)

    return [
        of(layer_norm), of(rms_norm), of(rms_norm, cast_before_weight=False), of(rms_norm, plus_one=True),
    ]  # fmt: skip


def _mlp_forwards(module: nn.Module, wanted: frozenset[str]) -> list[tuple[str, Forward]]:
    candidates: list[tuple[str, Forward]] = []
    for activation in ACTIVATIONS:
        product = functools.partial(swiglu, activation=activation)
        if "multiplicative" in wanted and _is_plain_adapter(module.down_proj):
            candidates.append(("multiplicative", functools.partial(_adapted_mlp, module, product)))
        if "swiglu" in wanted:
            candidates.append(("swiglu", functools.partial(_mlp, module, product)))
    return candidates


def _is_plain_adapter(down_proj: Any) -> bool:
    """A multiplicative adapter without dropout on a frozen 16- or 32-bit linear layer without bias.

    Others need h itself: dropout acts on it, and a quantised layer has no weight to multiply by in backward.
    """
    if not isinstance(down_proj, MultiplicativeLoRA) or down_proj.dropout.p > 0:
        return False
    base = down_proj.base_layer
    return type(base) is nn.Linear and base.bias is None and not base.weight.requires_grad


def _mlp(module: Any, product: Forward, x: Tensor) -> Tensor:
    return module.down_proj(product(module.gate_proj(x), module.up_proj(x)))


def _adapted_mlp(module: Any, product: Forward, x: Tensor) -> Tensor:
    adapter = module.down_proj
    gate, up = module.gate_proj(x), module.up_proj(x)
    return gated_down_proj(gate, up, adapter.base_layer.weight, adapter.A, adapter.B, adapter.scaling, product)


@torch.no_grad()
def _computes_the_same(module: nn.Module, candidate: Forward) -> bool:
    """Whether `candidate` equals the module's forward on random rows, to the rounding of their dtype."""
    linear = getattr(module, "gate_proj", None)
    weight = next(module.parameters()) if linear is None else next(linear.parameters())
    width = weight.shape[0] if linear is None else int(linear.in_features)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, PROBE_ROWS, width, generator=generator) * SPREAD + OFFSET
    x = rows.to(weight.device, weight.dtype if weight.is_floating_point() else torch.bfloat16)
    was_training = module.training
    module.eval()  # dropout in the adapter would make any two results differ
    theirs, ours = module.forward(x).float(), candidate(x).float()
    module.train(was_training)
    # Both sum `width` products or squares and round a few times more; a different function differs by far more.
    tolerance = 8 * torch.finfo(x.dtype).eps * theirs.abs().max()
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)
