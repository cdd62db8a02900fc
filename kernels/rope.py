"""Rotary position embedding of queries and keys, interleaved (Cohere, GLM) or half-split (Llama and most others).

Takes q [B, H, T, K], k [B, Hk, T, K] and tables cos, sin [B or 1, T, K]; gives rotated q and k in their own dtypes and
memory layouts. Interleaved pairs are elements (2i, 2i + 1), half-split ones (i, i + K/2); of a pair (a, b)

    a' = a·cos − b·sin,   b' = b·cos + a·sin

with each element's own entry of the tables. The products and the sum are fp32, rounded once to the dtype of q or k.
transformers' Cohere does the same; its Llama computes in the inputs' dtype and rounds three times (and returns the wider
dtype where the tables are wider than q), so in bf16 ours differs from it by rounding, on the side of the exact value.

Saves nothing but the tables, which all layers share: 0 bytes a token and layer. PyTorch's autograd saves nothing else
either, but transformers' fp32 copies cost it traffic. Backward is the rotation by the negative angle (the transpose,
to be exact: right for any tables, such as YaRN's scaled ones). Price: q and k are read once and written once each way.

Source: Su et al. 2021, RoFormer (arXiv:2104.09864), eq. 15 and 34; transformers' apply_rotary_pos_emb of Cohere and Llama
(Apache-2.0). The idea of one kernel that serves both directions: Liger-Kernel's rope (BSD-2), which is half-split only.

Letters: B rows, H heads (of queries or keys), T tokens, K head dimension.
"""

from typing import Any

import torch
from pipeline.kernels.dispatch import Kernel, takes_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path serves every device
    triton = None

# Elements of a program's tile: as many heads of one token as fit, so that they share one row of the tables.
TILE = 8192


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotated (q, k): q [B, H, T, K], k [B, Hk, T, K], tables [B or 1, T, K] of any floating dtype.

    Raises ValueError where shapes do not fit, K is odd (models that rotate a part of the head pass that part), or the
    tables want a gradient, which is not computed.
    """
    for x in (q, k):
        table = (x.shape[0], x.shape[2], x.shape[3]) if x.dim() == 4 else ()
        if len(table) != 3 or x.shape[3] % 2 or any(t.shape not in (table, (1, *table[1:])) for t in (cos, sin)):
            raise ValueError(
                f"rope: tables {list(cos.shape)}, {list(sin.shape)} do not fit {list(x.shape)}: "
                "want [B, heads, T, K] with K even and tables [B or 1, T, K]"
            )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope: the tables' gradient is not computed; detach them")
    return Rope.apply(q, k, cos, sin, interleaved, takes_triton(q, k))


class Rope(torch.autograd.Function):
    """Saves the tables, nothing else. `use_triton` is an argument for the tests' sake."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, use_triton: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.interleaved, ctx.use_triton = interleaved, use_triton
        ctx.save_for_backward(cos, sin)
        rotated_q, rotated_k = (ROTATE(use_triton, x, cos, sin, interleaved, False) for x in (q, k))
        return rotated_q, rotated_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        gradients = [
            ROTATE(ctx.use_triton, upstream, cos, sin, ctx.interleaved, True)
            if wanted and upstream is not None
            else None
            for upstream, wanted in zip((d_q, d_k), ctx.needs_input_grad, strict=False)
        ]
        return *gradients, None, None, None, None


# PyTorch: the reference, and the path of the CPU


def pytorch_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """x [B, H, T, K] rotated, or rotated back (`transposed`); new, in x's dtype and, where it is dense, its layout."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value, cos, sin = x.to(wide), cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    # (a, b)·cos + (b, a)·(−sin, sin); the transpose has the signs and the sines of a pair exchanged.
    sin_a, sin_b = _pairs(sin, interleaved)
    signed, exchanged = torch.empty_like(sin), torch.empty_like(value)
    for side, source in zip(
        _pairs(signed, interleaved), (sin_b, -sin_a) if transposed else (-sin_a, sin_b), strict=True
    ):
        side.copy_(source)
    for side, source in zip(_pairs(exchanged, interleaved), reversed(_pairs(value, interleaved)), strict=True):
        side.copy_(source)
    return (value * cos).add_(exchanged.mul_(signed)).to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views [..., K/2] of the first and the second elements of the pairs."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


# Triton

if triton is not None:

    @triton.jit
    def _load_pairs(x, row, inside, K, INTERLEAVED: tl.constexpr, HALF: tl.constexpr) -> tuple:
        """First and second elements, fp32 [rows, HALF] each, of the rows that start at `row` [rows, 1]."""
        if INTERLEAVED:  # loaded side by side and parted in registers
            column = tl.arange(0, 2 * HALF)[None, :]
            value = tl.load(x + row + column, mask=inside & (column < K), other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(value, [value.shape[0], HALF, 2]))
        else:
            column = tl.arange(0, HALF)[None, :]
            mask = inside & (column < K // 2)
            a = tl.load(x + row + column, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(x + row + K // 2 + column, mask=mask, other=0.0).to(tl.float32)
        return a, b

    @triton.jit
    def _store_pairs(x, row, inside, K, a, b, INTERLEAVED: tl.constexpr, HALF: tl.constexpr) -> None:
        if INTERLEAVED:
            column = tl.arange(0, 2 * HALF)[None, :]
            value = tl.reshape(tl.join(a, b), [a.shape[0], 2 * HALF])
            tl.store(x + row + column, value.to(x.dtype.element_ty), mask=inside & (column < K))
        else:
            column = tl.arange(0, HALF)[None, :]
            mask = inside & (column < K // 2)
            tl.store(x + row + column, a.to(x.dtype.element_ty), mask=mask)
            tl.store(x + row + K // 2 + column, b.to(x.dtype.element_ty), mask=mask)

    @triton.jit
    def _rotate_kernel(
        x,
        out,
        cos,
        sin,
        T,
        n_heads,
        K,
        x_b,
        x_h,
        x_t,
        out_b,
        out_h,
        out_t,
        cos_b,
        cos_t,
        sin_b,
        sin_t,
        TRANSPOSED: tl.constexpr,
        INTERLEAVED: tl.constexpr,
        HEADS: tl.constexpr,
        HALF: tl.constexpr,
    ) -> None:
        """Program (token of a row, group of HEADS heads). x_b … sin_t are strides in elements."""
        token = tl.program_id(0).to(tl.int64)
        b, t = token // T, token % T
        head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        inside = head < n_heads
        first, second = _load_pairs(x, b * x_b + t * x_t + head * x_h, inside, K, INTERLEAVED, HALF)
        zero = tl.zeros([1, 1], tl.int64)
        always = zero == 0
        cos_a, cos_b_ = _load_pairs(cos, b * cos_b + t * cos_t + zero, always, K, INTERLEAVED, HALF)
        sin_a, sin_b_ = _load_pairs(sin, b * sin_b + t * sin_t + zero, always, K, INTERLEAVED, HALF)
        if TRANSPOSED:
            new_first = first * cos_a + second * sin_b_
            new_second = second * cos_b_ - first * sin_a
        else:
            new_first = first * cos_a - second * sin_a
            new_second = second * cos_b_ + first * sin_b_
        row = b * out_b + t * out_t + head * out_h
        _store_pairs(out, row, inside, K, new_first, new_second, INTERLEAVED, HALF)


def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """Like `pytorch_rotate`, in one kernel; any strides but the last dimension's, which is made dense."""
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    out = torch.empty_like(x)
    n_rows, n_heads, length, k = x.shape
    half = triton.next_power_of_2(k // 2)
    heads = min(triton.next_power_of_2(n_heads), max(1, TILE // (2 * half)))
    # A table of one row serves all: its rows lie 0 elements apart.
    strides = [t.stride(d) if t.shape[0] > 1 or d else 0 for t in (cos, sin) for d in (0, 1)]
    if x.numel():
        with torch.cuda.device_of(x):
            _rotate_kernel[n_rows * length, triton.cdiv(n_heads, heads)](
                x,
                out,
                cos,
                sin,
                length,
                n_heads,
                k,
                *x.stride()[:3],
                *out.stride()[:3],
                *strides,
                TRANSPOSED=transposed,
                INTERLEAVED=interleaved,
                HEADS=heads,
                HALF=half,
                num_warps=8 if heads * half >= 2048 else 4,
            )
    return out


ROTATE = Kernel(pytorch_rotate, triton_rotate)
