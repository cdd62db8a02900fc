"""What a module computes, found out on a miniature of it.

Takes a module of a stage, its weights wherever they are (`meta` too: the planner has none); gives the form of a norm, the
name of an activation, whether a gated MLP and a parallel block are what their parts suggest, how an attention rotates.

A miniature is a copy in fp32 on the CPU: large children give way to small ones that behave in a known way, parameters
that remain get random values, so that a factor or an offset which is 1 or 0 at first shows. Nothing of the model's size
is computed or allocated, and a decision depends on no weight: it is the same in planning and in training. A miniature
that cannot run, or gives another result, is of a module that is left alone.
"""

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from pipeline.kernels.norm import layer_norm, rms_norm
from pipeline.kernels.rope import rope
from pipeline.kernels.swiglu import ACTIVATIONS, swiglu
from pipeline.model.adapters.multiplicative import MultiplicativeLoRA

ROWS, WIDTH, FEED_FORWARD, RANK = 5, 16, 24, 2
# An offset of the rows for a norm's mean, a scale for its variance.
OFFSET, SPREAD = 0.75, 2.0
# fp32: sums over a row and a few roundings. Forms that differ do so in the first digits.
SAME = 1e-5
# More than the norms, sinks and scales of an attention have, less than a projection of any real model.
LARGEST_REST = 2**20
ROTATION = "apply_rotary_pos_emb"  # what transformers' attentions call their rotary embedding, as a global
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

NormForm = tuple[Callable[..., Tensor], dict[str, bool]]
NORM_FORMS: list[NormForm] = [
    (layer_norm, {}),
    (rms_norm, {}),
    (rms_norm, {"cast_before_weight": False}),
    (rms_norm, {"plus_one": True}),
]


def eps_of(norm: nn.Module) -> float | None:
    """The epsilon of a norm of transformers'; None where there is none, so that it is no such norm."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def takes_one_argument(module: nn.Module) -> bool:
    """Whether a module's forward takes the hidden state and nothing else.

    What an optional argument does (a gate, a residual) a miniature called without it would not show.
    """
    return len(inspect.signature(type(module).forward).parameters) == 2  # with self


def norm_form(norm: nn.Module) -> NormForm | None:
    """The kernel's form that equals the norm in fp32 and comes nearest in its own dtype (they round in other places)."""
    own = dict(norm.named_parameters())
    eps = eps_of(norm)
    if set(own) != {"weight"} or own["weight"].dim() not in (1, 2) or eps is None or list(norm.children()):
        return None
    with _aside():
        mini: Any = _miniature(norm, {})
        x = _rows(*mini.weight.shape)
        forms = [(f, form) for f, form in NORM_FORMS if _same(mini(x), f(x, mini.weight, eps, **form))]
        mini, x = mini.to(own["weight"].dtype), x.to(own["weight"].dtype)
        theirs = mini(x).float()
        errors = [float((f(x, mini.weight, eps, **form).float() - theirs).norm()) for f, form in forms]
        return forms[errors.index(min(errors))] if forms else None
    return None


def activation(act_fn: Any) -> str | None:
    """The activation's name, by its values in fp32."""
    with _aside():
        grid = torch.linspace(-6, 6, 1001)
        one = torch.ones_like(grid)
        return next((name for name in ACTIVATIONS if _same(act_fn(grid), swiglu(grid, one, activation=name))), None)
    return None


def computes_the_same(mlp: Any, forward_of: Callable[[Any], Callable[[Tensor], Tensor]]) -> bool:
    """Whether a gated MLP is what `forward_of(mlp)`, a forward through our kernels, computes.

    Compared on a miniature, in train and eval mode, with an adapter of that kind where down_proj has one.
    """
    with _aside():
        parts: dict[str, nn.Module] = {
            "gate_proj": _linear(WIDTH, FEED_FORWARD, _has_bias(mlp.gate_proj)),
            "up_proj": _linear(WIDTH, FEED_FORWARD, _has_bias(mlp.up_proj)),
            "down_proj": _linear(FEED_FORWARD, WIDTH, _has_bias(mlp.down_proj)),
        }
        if isinstance(mlp.down_proj, MultiplicativeLoRA):
            parts["down_proj"] = _adapter(parts["down_proj"])
        mini = _miniature(mlp, parts)
        x, ours = _rows(WIDTH), forward_of(mini)
        return all(_same(mini.train(training)(x), ours(x)) for training in (True, False))
    return False


def is_parallel_block(layer: Any) -> bool:
    """Whether a decoder layer's output is its input + attention(normed) + MLP(normed), all else going to attention."""
    with _aside():
        normed, attended, passed = (_rows(WIDTH) for _ in range(3))
        answers = {"input_layernorm": normed, "self_attn": (attended, None), "mlp": passed}
        parts = {name: _Recorder(answer) for name, answer in answers.items()}
        x, mini = _rows(WIDTH), _miniature(layer, parts)
        given = {name: object() for name in ("attention_mask", "position_ids", "position_embeddings", "another")}
        y = mini.train()(x, **given)
        to_attention = {**defaults(layer), **given, "hidden_states": normed}
        asked = {"input_layernorm": [((x,), {})], "self_attn": [((), to_attention)], "mlp": [((normed,), {})]}
        # Containers compare what is the same object as equal; two tensors that are not raise, which is a no here.
        return all(parts[name].calls == calls for name, calls in asked.items()) and _same(x + attended + passed, y)
    return False


def defaults(layer: nn.Module) -> dict[str, Any]:
    """The arguments of a layer's forward that have a default."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def receives_tables(module: nn.Module) -> bool:
    """Whether a module is handed RoPE's tables and no part of it is, as a decoder layer's attention is."""
    given = [m for m in module.modules() if "position_embeddings" in inspect.signature(type(m).forward).parameters]
    return given == [module]


def rotation(attention: nn.Module) -> bool | str:
    """Whether an attention's rotary embedding is interleaved (True) or half-split (False), or why it is neither."""
    decorated = type(attention).forward
    forward: Any = inspect.unwrap(decorated)
    if not isinstance(forward, types.FunctionType) or ROTATION not in forward.__code__.co_names:
        return f"calls no {ROTATION}"
    if not all(hasattr(attention, name) for name in PROJECTIONS):
        return f"has no {', '.join(PROJECTIONS)}"
    theirs: Any = forward.__globals__.get(ROTATION)
    layouts, ran = list[bool | str](), False

    def watched(*args: Any, **kwargs: Any) -> Any:
        plain = not kwargs and len(args) == 4
        layouts.append(_layout(theirs, *args) if plain else f"gives {ROTATION} more than q, k, cos and sin")
        return theirs(*args, **kwargs)

    with _aside():
        mini: Any = _miniature(attention, _projections(attention))
        mini.config._attn_implementation = "eager"  # behind the rotation, and runs on any device
        tables = torch.randn(2, 1, ROWS, mini.head_dim).unbind()
        run = with_global(decorated, ROTATION, watched)
        run(mini, hidden_states=_rows(WIDTH), position_embeddings=tables, attention_mask=None)
        ran = True
    if reasons := [layout for layout in layouts if isinstance(layout, str)]:
        return reasons[0]
    if not ran:
        return "does not run by itself"
    return layouts[0] if len(set(layouts)) == 1 else "does not rotate, or not always alike"


def _layout(theirs: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool | str:
    """As `rotation`, of one call of the function `theirs`."""
    half = cos.shape[-1] // 2
    with contextlib.suppress(Exception):
        theirs(q, k, cos[..., :half], sin[..., :half])
        return "may rotate only a part of the head"
    for interleaved in (True, False):
        pairs = zip(theirs(q, k, cos, sin), rope(q, k, cos, sin, interleaved), strict=True)
        if all(_same(one, other) for one, other in pairs):
            return interleaved
    return "rotates in another way"


def with_global(function: Any, name: str, value: Any) -> Any:
    """The same function with another value of one global; the module it comes from is not changed.

    Decorations stay: a copy of each decorator's function holds the copy of the one below it. Raises ValueError for a
    decorator that keeps the function it calls somewhere else than in its closure.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _copied(function, {**function.__globals__, name: value}, function.__closure__)
    held = [cell.cell_contents is inner for cell in function.__closure__ or ()]
    if sum(held) != 1:
        raise ValueError(f"a decorator of {function.__qualname__} does not hold the function it calls")
    changed = types.CellType(with_global(inner, name, value))
    cells = tuple(changed if is_inner else cell for is_inner, cell in zip(held, function.__closure__, strict=True))
    made = _copied(function, function.__globals__, cells)
    made.__wrapped__ = changed.cell_contents
    return made


def _copied(function: Any, variables: dict[str, Any], closure: tuple[types.CellType, ...] | None) -> Any:
    """The function's code with other globals and another closure."""
    made = types.FunctionType(function.__code__, variables, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# Miniatures


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Real CPU tensors with seeded random values that leave the run's generator alone; no gradients.

    What a miniature raises ends the block quietly: its module is none that we know.
    """
    with contextlib.suppress(Exception), unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with torch.device("cpu"), torch.no_grad():
            yield


def _miniature(module: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Any:
    """A copy with `stand_ins` for the children of those names and random values for the parameters that remain."""
    replaced = [getattr(module, name) for name in stand_ins]
    memo: dict[int, Any] = {id(old): new for old, new in zip(replaced, stand_ins.values(), strict=True)}
    gone = {id(p) for old in replaced for p in old.parameters()}
    rest = [p for p in module.parameters() if id(p) not in gone]
    if sum(p.numel() for p in rest) > LARGEST_REST:
        raise ValueError("a module with more weights than its known parts'")
    # In (0.5, 1.5): a norm's weights of 1 or 0 hide their form.
    memo |= {id(p): nn.Parameter(torch.rand(p.shape) + 0.5, requires_grad=False) for p in rest}
    return copy.deepcopy(module, memo).float().cpu()


class _Recorder(nn.Module):
    """Stands for a part whose calls matter, and gives a fixed answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.calls = answer, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.answer


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float32)


def _has_bias(layer: Any) -> bool:
    return getattr(_plain(layer), "bias", None) is not None


def _adapter(base_layer: nn.Module) -> MultiplicativeLoRA:
    made = MultiplicativeLoRA(base_layer, RANK, 2 * RANK + 1, 0.0, torch.float32, torch.device("cpu"))
    for parameter in (made.A, made.B):  # B is zero when training starts, and would hide the adapter's part
        parameter.copy_(torch.randn(parameter.shape))
    return made


def _projections(attention: Any) -> dict[str, nn.Module]:
    """Small q_proj, k_proj, v_proj and o_proj: a narrow hidden state, heads as they are."""
    made: dict[str, nn.Module] = {}
    for name in PROJECTIONS[:3]:
        made[name] = _linear(WIDTH, _plain(getattr(attention, name)).out_features, False)
    return made | {"o_proj": _linear(_plain(attention.o_proj).in_features, WIDTH, False)}


def _plain(layer: Any) -> Any:
    """The linear layer in an adapter, ours or PEFT's, or the layer itself."""
    return getattr(layer, "base_layer", layer)


def _rows(*shape: int) -> Tensor:
    """Random fp32 rows [1, ROWS, *shape]."""
    return torch.randn(1, ROWS, *shape) * SPREAD + OFFSET


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= SAME * one.norm())
