"""Puts the kernels into a stage, by structure: what a module computes decides, not its model's name.

Takes a stage with its adapters, its weights loaded or still on `meta`; replaces the forward of norms, attentions, gated
MLPs and parallel blocks that compute what a kernel computes, and says how many took which. `probe` finds out what they
compute; a module that does more (a clamp, a partial rotation), or whose forward has been replaced, is left alone.

A frozen linear layer and SDPA save nothing that an exact backward does not need. With these replaced, a Cohere layer
saves exactly the minimum: tests/planning/test_accounting.py counts it.
"""

import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pipeline.kernels.multiplicative import gated_down_proj
from pipeline.kernels.rope import rope
from pipeline.kernels.swiglu import ACTIVATIONS, swiglu
from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.fusion import probe, shared
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import parts_of

KERNELS = ("norm", "rope", "swiglu", "multiplicative", "parallel_block", "shared_input")
# Linear layers that a module hands the same input, by the names that transformers gives them.
OF_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Forward = Callable[..., Tensor]
# A module's new forward and its kernel's name, or why a module that might have one is left alone. None: any other module.
Found = tuple[Forward, str] | str | None


def apply(stage: Stage, wanted: frozenset[str]) -> Counter[str]:
    """Replace the forwards of `stage`'s modules that the `wanted` kernels serve; how many took each kernel."""
    return sum((put_into(part, wanted) for part in _parts(stage)), Counter[str]())


def put_into(part: nn.Module, wanted: frozenset[str]) -> Counter[str]:
    """As `apply`, for a decoder layer or any other module and all within it."""
    taken: Counter[str] = Counter()
    # Children first: a parallel block asks what its MLP took.
    for module in reversed(list(part.modules())):
        if "forward" in vars(module):  # its own may mean anything, and a copy's would still refer to the module
            continue
        for find in (_norm, _rotary_attention, _gated_mlp, _parallel_block):
            if isinstance(found := find(module, wanted), tuple):
                module.forward, module.kernel_taken = found  # type: ignore[method-assign,assignment]
                taken[found[1]] += 1
                break
    if "shared_input" in wanted:
        taken += Counter(shared_input=sum(map(shared.put_together, _of_one_input(part).values())))
    return taken


def why_not(stage: Stage, kernel: str) -> Counter[str]:
    """For a kernel that no module of `stage` took: why each that might have was left alone, with how many there are."""
    if kernel == "shared_input":
        return Counter(f"{type(m).__name__} {shared.LACKING}" for part in _parts(stage) for m in _of_one_input(part))
    find = {"norm": _norm, "rope": _rotary_attention, "parallel_block": _parallel_block}.get(kernel, _gated_mlp)
    # An MLP that took SwiGLU has no adapter that the kernel of both could take.
    open_to = [m for part in _parts(stage) for m in part.modules()]
    modules = [m for m in open_to if "forward" not in vars(m) or kernel_of(m) == "swiglu"]
    reasons = ((type(m).__name__, find(m, frozenset([kernel]))) for m in modules)
    return Counter(f"{name} {reason}" for name, reason in reasons if isinstance(reason, str))


def _of_one_input(part: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Of each module within `part` the children that read one input; a parallel block's attention and MLP read the same, too."""
    groups: dict[nn.Module, list[nn.Module]] = {}
    for module in part.modules():
        for names in OF_ONE_INPUT:
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                groups.setdefault(module, []).extend(getattr(module, name) for name in names)
    for block in part.modules():
        if kernel_of(block) == "parallel_block":
            groups[block] = [m for inner in (block.self_attn, block.mlp) for m in groups.pop(inner, [])]  # type: ignore[arg-type]
    return groups


def _parts(stage: Stage) -> list[nn.Module]:
    """Where kernels may go: the layers, and on the last stage the final norm."""
    return [
        *stage.layers.values(),
        *(map(stage.model.get_submodule, parts_of(stage.model).leaving) if stage.is_last else []),
    ]


def kernel_of(module: nn.Module) -> str | None:
    """The kernel that a module has taken."""
    return vars(module).get("kernel_taken")


def _norm(module: Any, wanted: frozenset[str]) -> Found:
    eps = probe.eps_of(module)
    if "norm" not in wanted or eps is None or list(module.children()):
        return None
    if not probe.takes_one_argument(module):
        return "takes more than the hidden state"
    if (form := probe.norm_form(module)) is None:
        return "has other weights than one, or computes something else than the kernel"
    function, options = form
    # The weight is looked up at each call: a checkpoint or `.to` may have put another one there.
    return lambda x: function(x, module.weight, eps, **options), "norm"


def _rotary_attention(module: Any, wanted: frozenset[str]) -> Found:
    """The attention's own forward, in which the name of its rotary embedding means our function."""
    if "rope" not in wanted or not probe.receives_tables(module):
        return None
    if isinstance(interleaved := probe.rotation(module), str):
        return interleaved
    ours = functools.partial(rope, interleaved=interleaved)
    return types.MethodType(probe.with_global(type(module).forward, probe.ROTATION, ours), module), "rope"


def _gated_mlp(module: Any, wanted: frozenset[str]) -> Found:
    """A forward through the kernels for a gated MLP that is one, and the kernel's name."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    function: Forward
    lacks = _lacks_of_adapter(module.down_proj)
    if "multiplicative" in wanted and lacks is None:
        function, kernel = _adapted_mlp, "multiplicative"
    elif "swiglu" in wanted:
        function, kernel = _mlp, "swiglu"
    else:
        return lacks if "multiplicative" in wanted else None
    if (activation := probe.activation(module.act_fn)) is None:
        return f"has another activation than {', '.join(ACTIVATIONS)}"
    product = functools.partial(swiglu, activation=activation)
    same = probe.takes_one_argument(module) and probe.computes_the_same(
        module, lambda mlp: functools.partial(function, mlp, product)
    )
    if not same:
        return "does more than down_proj(act(gate_proj(x)) * up_proj(x))"
    return functools.partial(function, module, product), kernel


def _lacks_of_adapter(down_proj: Any) -> str | None:
    """What a down_proj lacks to be a plain layer with a multiplicative adapter.

    Others need h itself: dropout acts on it, and a quantised layer has no weight to multiply by in backward.
    """
    if not isinstance(down_proj, MultiplicativeLoRA):
        return "has no multiplicative adapter on its down_proj"
    if down_proj.dropout.p > 0:
        return "has an adapter with dropout"
    base = down_proj.base_layer
    plain = type(base) is nn.Linear and base.bias is None and not base.weight.requires_grad
    return None if plain else "has a down_proj that is quantised, has a bias or is trained itself"


def _mlp(module: Any, product: Forward, x: Tensor) -> Tensor:
    return module.down_proj(product(module.gate_proj(x), module.up_proj(x)))


def _adapted_mlp(
    module: Any, product: Forward, x: Tensor, residual: Tensor | None = None, attention: Tensor | None = None
) -> Tensor:
    """The MLP's output; with `residual` and `attention`, both like x, the sum of the three."""
    adapter = module.down_proj
    return gated_down_proj(
        module.gate_proj(x),
        module.up_proj(x),
        adapter.base_layer.weight,
        adapter.A,
        adapter.B,
        adapter.scaling,
        product,
        residual,
        attention,
    )


def _parallel_block(module: Any, wanted: frozenset[str]) -> Found:
    """A forward for a parallel block (Cohere) that leaves its sum to the MLP's kernel."""
    mlp = getattr(module, "mlp", None)
    if "parallel_block" not in wanted or not isinstance(mlp, nn.Module):
        return None
    if not probe.is_parallel_block(module):
        return "is no parallel block, x + attention(norm(x)) + mlp(norm(x))"
    if kernel_of(mlp) != "multiplicative":
        return "has an MLP without the 'multiplicative' kernel, which would make the sum"
    return functools.partial(_parallel_sum, module, probe.defaults(module)), "parallel_block"


def _parallel_sum(layer: Any, defaults: dict[str, Any], hidden_states: Tensor, **given: Any) -> Tensor:
    normed = layer.input_layernorm(hidden_states)
    attention, _ = layer.self_attn(hidden_states=normed, **{**defaults, **given})
    return layer.mlp(normed, residual=hidden_states, attention=attention)
