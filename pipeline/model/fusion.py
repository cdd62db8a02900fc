"""Puts the kernels into a stage, by structure: what a module computes decides, not its model's name.

Takes a stage with its adapters, its weights loaded or still on `meta`; replaces the forward of norms, attentions, gated
MLPs and parallel blocks that compute what a kernel computes, and says how many took which. `probe` finds out what they
compute; a module that does more (a clamp, a partial rotation), or whose forward has been replaced, is left alone.

A frozen linear layer and SDPA save nothing that an exact backward does not need. With these replaced, a Cohere layer
saves exactly the minimum: tests/test_accounting.py counts it.
"""

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.kernels.multiplicative import gated_down_proj
from pipeline.kernels.rope import rope
from pipeline.kernels.swiglu import swiglu
from pipeline.model import probe
from pipeline.model.adapters import MultiplicativeLoRA
from pipeline.model.stage import Stage

KERNELS = ("norm", "rope", "swiglu", "multiplicative", "parallel_block")

Forward = Callable[..., Tensor]
Taken = tuple[Forward, str] | None  # a module's new forward and its kernel's name


def apply(stage: Stage, wanted: frozenset[str]) -> Counter[str]:
    """Replace the forwards of `stage`'s modules that the `wanted` kernels serve; how many took each kernel."""
    parts: list[nn.Module] = list(stage.layers.values())
    if stage.is_last:
        parts.append(stage.model.base_model.norm)
    return sum((put_into(part, wanted) for part in parts), Counter[str]())


def put_into(part: nn.Module, wanted: frozenset[str]) -> Counter[str]:
    """As `apply`, for a decoder layer or any other module and all within it."""
    taken: Counter[str] = Counter()
    # Children first: a parallel block asks what its MLP took.
    for module in reversed(list(part.modules())):
        if "forward" in vars(module):  # its own may mean anything, and a copy's would still refer to the module
            continue
        for find in (_norm, _rotary_attention, _gated_mlp, _parallel_block):
            if (found := find(module, wanted)) is not None:
                module.forward, kernel = found  # type: ignore[method-assign]
                taken[kernel] += 1
                break
    return taken


def _norm(module: Any, wanted: frozenset[str]) -> Taken:
    form = probe.norm_form(module) if "norm" in wanted else None
    if form is None:
        return None
    function, options = form
    eps = probe.eps_of(module)
    # The weight is looked up at each call: a checkpoint or `.to` may have put another one there.
    return lambda x: function(x, module.weight, eps, **options), "norm"


def _rotary_attention(module: Any, wanted: frozenset[str]) -> Taken:
    """The attention's own forward, in which the name of its rotary embedding means our function."""
    interleaved = probe.rotation(module) if "rope" in wanted else None
    if interleaved is None:
        return None
    ours = functools.partial(rope, interleaved=interleaved)
    return types.MethodType(probe.with_global(type(module).forward, probe.ROTATION, ours), module), "rope"


def _gated_mlp(module: Any, wanted: frozenset[str]) -> Taken:
    """A forward through the kernels for a gated MLP that is one, and the kernel's name."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    function: Forward
    if "multiplicative" in wanted and _is_plain_adapter(module.down_proj):
        function, kernel = _adapted_mlp, "multiplicative"
    elif "swiglu" in wanted:
        function, kernel = _mlp, "swiglu"
    else:
        return None
    if (activation := probe.activation(module.act_fn)) is None:
        return None
    product = functools.partial(swiglu, activation=activation)
    if not probe.computes_the_same(module, lambda mlp: functools.partial(function, mlp, product)):
        return None
    return functools.partial(function, module, product), kernel


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


def _adapted_mlp(
    module: Any, product: Forward, x: Tensor, residual: Tensor | None = None, attention: Tensor | None = None
) -> Tensor:
    """The MLP's output; with `residual` and `attention`, both like x, the sum of the three."""
    adapter = module.down_proj
    return gated_down_proj(
        module.gate_proj(x), module.up_proj(x), adapter.base_layer.weight, adapter.A, adapter.B, adapter.scaling,
        product, residual, attention,
    )  # fmt: skip


def _parallel_block(module: Any, wanted: frozenset[str]) -> Taken:
    """A forward for a parallel block (Cohere) that leaves its sum to the MLP's kernel."""
    mlp = getattr(module, "mlp", None)
    sums = isinstance(mlp, nn.Module) and getattr(vars(mlp).get("forward"), "func", None) is _adapted_mlp
    if "parallel_block" not in wanted or not sums or not probe.is_parallel_block(module):
        return None
    return functools.partial(_parallel_sum, module, probe.defaults(module)), "parallel_block"


def _parallel_sum(layer: Any, defaults: dict[str, Any], hidden_states: Tensor, **given: Any) -> Tensor:
    normed = layer.input_layernorm(hidden_states)
    attention, _ = layer.self_attn(hidden_states=normed, **{**defaults, **given})
    return layer.mlp(normed, residual=hidden_states, attention=attention)
