"""Puts the kernels into a stage, by structure: what a module computes decides, not its model's name.

Takes a stage with its weights and adapters; replaces the forward of norms and gated MLPs that compute what a kernel
computes, and says how many took which. What a norm and an activation compute is found out in fp32, where other forms
show; a gated MLP is then compared as a whole on random input, so that one that does more (a clamp, a bias) is left alone.

A frozen linear layer and SDPA save nothing that an exact backward does not need. With these replaced, a Cohere layer
saves exactly the minimum: tests/test_accounting.py counts it.
"""

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
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
# fp32: sums over a row and a few roundings. Forms that differ do so in the first digits.
SAME = 1e-5

Forward = Callable[..., Tensor]
NORM_FORMS: list[tuple[Callable[..., Tensor], dict[str, bool]]] = [
    (layer_norm, {}), (rms_norm, {}), (rms_norm, {"cast_before_weight": False}), (rms_norm, {"plus_one": True}),
]  # fmt: skip


def apply(stage: Stage, wanted: frozenset[str]) -> Counter[str]:
    """Replace the forwards of `stage`'s modules that the `wanted` kernels serve; how many took each kernel."""
    taken: Counter[str] = Counter()
    parts: list[nn.Module] = list(stage.layers.values())
    if stage.is_last:
        parts.append(stage.model.base_model.norm)
    for module in (module for part in parts for module in part.modules()):
        if "norm" in wanted and _is_norm(module):
            forward, kernel = _norm_forward(module), "norm"
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            forward, kernel = _mlp_forward(module, wanted)
        else:
            continue
        if forward is not None:
            module.forward = forward  # type: ignore[method-assign]
            taken[kernel] += 1
    return taken


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    return (
        set(own) == {"weight"} and own["weight"].dim() == 1 and _eps(module) is not None and not list(module.children())
    )


def _eps(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _norm_forward(module: nn.Module) -> Forward | None:
    """The kernel's form that equals the norm in fp32 and comes nearest in its own dtype (they round in other places)."""
    wide = copy.deepcopy(module).float()
    weight: Any = wide.weight
    wide.weight.data = torch.linspace(0.5, 1.5, len(weight), device=weight.device)  # weights of 1 or 0 hide their form
    eps, x = _eps(module), _rows(len(weight), weight)
    forms = [(f, form) for f, form in NORM_FORMS if _same(wide(x), f(x, wide.weight, eps, **form))]
    if not forms:
        return None
    own: Any = module.weight
    x = x.to(own.dtype)
    theirs = module(x).float()
    function, form = min(forms, key=lambda pair: float((pair[0](x, own, eps, **pair[1]).float() - theirs).abs().sum()))
    # The weight is looked up at each call: a checkpoint or `.to` may have put another one there.
    return lambda x: function(x, module.weight, eps, **form)


@torch.no_grad()
def _activation(act_fn: Any, device: torch.device) -> str | None:
    """The activation's name, by its values in fp32."""
    grid = torch.linspace(-6, 6, 1001, device=device)
    one = torch.ones_like(grid)
    return next((name for name in ACTIVATIONS if _same(act_fn(grid), swiglu(grid, one, activation=name))), None)


def _mlp_forward(module: Any, wanted: frozenset[str]) -> tuple[Forward | None, str]:
    """A forward through the kernels for a gated MLP that is one, and the kernel's name."""
    weight = next(module.gate_proj.parameters())
    activation = _activation(module.act_fn, weight.device)
    if activation is None or not wanted & {"swiglu", "multiplicative"}:
        return None, ""
    product = functools.partial(swiglu, activation=activation)
    forward: Forward
    if "multiplicative" in wanted and _is_plain_adapter(module.down_proj):
        forward, kernel = functools.partial(_adapted_mlp, module, product), "multiplicative"
    elif "swiglu" in wanted:
        forward, kernel = functools.partial(_mlp, module, product), "swiglu"
    else:
        return None, ""
    return (forward if _computes_the_same(module, forward) else None), kernel


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
def _computes_the_same(module: Any, candidate: Forward) -> bool:
    """Whether `candidate` equals the MLP's forward on random rows, to the rounding of their dtype."""
    weight = next(module.gate_proj.parameters())
    x = _rows(int(module.gate_proj.in_features), weight)
    x = x.to(weight.dtype if weight.is_floating_point() else torch.bfloat16)
    was_training = module.training
    module.eval()  # dropout in the adapter would make any two results differ
    with _adapter_that_acts(module.down_proj):
        theirs, ours = module.forward(x).float(), candidate(x).float()
    module.train(was_training)
    # Both round the same products; the kernel's own elementwise part may round in other places.
    return bool((ours - theirs).norm() <= 4 * torch.finfo(x.dtype).eps * theirs.norm())


@contextlib.contextmanager
def _adapter_that_acts(down_proj: Any) -> Iterator[None]:
    """B is zero when training starts, and would hide the adapter's part."""
    if not isinstance(down_proj, MultiplicativeLoRA):
        yield
        return
    kept = down_proj.B.detach().clone()
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    down_proj.B.copy_(noise)
    try:
        yield
    finally:
        down_proj.B.copy_(kept)


def _rows(width: int, like: Tensor) -> Tensor:
    """Random fp32 rows [1, PROBE_ROWS, width] on the device of `like`."""
    rows = torch.randn(1, PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))
    return (rows * SPREAD + OFFSET).to(like.device)


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= SAME * one.norm())
