"""The kernels on this device, before they are timed: values and gradients against fp64, beside PyTorch's own error.

Takes a shape and a device; gives a row per kernel. On a GPU this is the Triton code. The measure is ‖error‖ / ‖exact‖ over
the result and all gradients; a kernel may be off by half as much again as the same operation through autograd in the
same dtype, plus the rounding of the last store. The tests (tests/test_kernel_*.py) go further: odd shapes, ignored
labels, tolerances from arithmetic; they take the GPU where there is one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from pipeline.formats.dtypes import DTYPES
from pipeline.kernels import cross_entropy, multiplicative, norm, rope, swiglu

Function = Callable[..., Any]
TOKENS = 1024  # enough for several blocks of every kernel, little enough for fp64


def cases(shape: Shape) -> dict[str, tuple[Function, Function, list[tuple[int, ...]]]]:
    """Kernel, the same through autograd, and the shapes of what both take (all of it gets gradients but 'frozen')."""
    T, d, f, r = min(TOKENS, shape.tokens), shape.hidden, shape.feed_forward, shape.rank
    k = d // shape.heads
    tables = _rope_tables(T, k)
    labels = torch.randint(0, _vocabulary(shape), (T,), generator=torch.Generator().manual_seed(0))
    return {
        "layer norm": (partial(norm.layer_norm, eps=1e-5), _layer_norm, [(1, T, d), (d,)]),
        "rms norm": (partial(norm.rms_norm, eps=1e-5), _rms_norm, [(1, T, d), (d,)]),
        "swiglu": (swiglu.swiglu, lambda g, u: torch.nn.functional.silu(g) * u, [(1, T, f), (1, T, f)]),
        "rope": (_with_tables(rope.rope, tables), _with_tables(_rope, tables), [(1, shape.heads, T, k)] * 2),
        "multiplicative": (
            partial(_adapted, multiplicative.gated_down_proj, swiglu.swiglu),
            partial(_adapted, multiplicative.reference, lambda g, u: torch.nn.functional.silu(g) * u),
            [(1, T, f), (1, T, f), (d, f), (r, d), (d, r)],
        ),
        "cross-entropy": (
            partial(_head, cross_entropy.linear_cross_entropy, labels),
            partial(_head, cross_entropy.reference, labels),
            [(T, d), (_vocabulary(shape), d)],
        ),
    }


def check(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """A row per kernel, printed as it comes."""
    dtype = DTYPES[shape.dtype]
    print(f"kernels on {device} in {shape.dtype}: distance from fp64 {'ours':>10} {'PyTorch':>10}")
    rows = []
    for label, (ours, theirs, sizes) in cases(shape).items():
        inputs = _inputs(sizes, device, dtype)
        exact = run(theirs, [x.double() for x in inputs])
        error, reference = (distance(run(function, inputs), exact) for function in (ours, theirs))
        allowed = 1.5 * reference + torch.finfo(dtype).eps / 2
        rows.append({"kernel": label, "error": error, "pytorch_error": reference, "good": error <= allowed})
        print(f"  {label:44} {error:10.2e} {reference:10.2e}  {'' if error <= allowed else 'WRONG'}", flush=True)
    return rows


def run(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients of all inputs, for upstream gradients that are the same in every dtype."""
    given = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    upstream = _inputs([tuple(r.shape) for r in results], given[0].device, torch.bfloat16, seed=1)
    wanted = [x for x in given if x.dim() > 0]
    gradients = torch.autograd.grad(
        results, wanted, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)], allow_unused=True
    )
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of ‖found − exact‖ / ‖exact‖ over the tensors, in fp64."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact, strict=True))


def _vocabulary(shape: Shape) -> int:
    return min(shape.vocabulary, 32768)


def _inputs(sizes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Normal numbers that a bf16 holds; matrices scaled so that a product's results are about 1."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator) * (size[-1] ** -0.5 if len(size) == 2 else 1.0) for size in sizes]
    return [x.bfloat16().to(device, dtype) for x in made]


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Cohere computes it."""
    wide = x.float() if x.dtype != torch.float64 else x
    centred = wide - wide.mean(-1, keepdim=True)
    return (weight.to(wide.dtype) * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama computes it."""
    wide = x.float() if x.dtype != torch.float64 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def _rope_tables(T: int, k: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, K], interleaved."""
    angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, k, 2)[None] / k)
    angle = angle.repeat_interleave(2, dim=-1)[None]
    return angle.cos(), angle.sin()


def _with_tables(function: Function, tables: tuple[Tensor, Tensor]) -> Function:
    def rotated(q: Tensor, k: Tensor) -> Any:
        cos, sin = (table.to(q.device, torch.promote_types(q.dtype, torch.float32)) for table in tables)
        return function(q, k, cos, sin, interleaved=True)

    return rotated


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """As transformers' Cohere computes it."""

    def one(x: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return (x.to(cos.dtype) * cos.unsqueeze(1) + turned.to(cos.dtype) * sin.unsqueeze(1)).to(x.dtype)

    return one(q), one(k)


def _adapted(function: Function, product: Function, gate: Tensor, up: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Any:
    return function(gate, up, W.detach(), A, B, 1.0, product)


def _head(function: Function, labels: Tensor, hidden: Tensor, weight: Tensor) -> Any:
    return function(hidden, weight.detach(), None, labels.to(hidden.device), cross_entropy.LogitTransform(0.0625))
