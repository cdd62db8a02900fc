"""The end of an MLP with a multiplicative adapter: h = W·m, y = h + s·B·A·h, with m = act(gate)·up.

Takes gate and up [N, F], the frozen down_proj weight W [D, F], A [R, D], B [D, R] and s; gives y [N, D]. In a parallel
block (Cohere), whose output is residual + attention + MLP, it takes those two as well and gives the block's output.

Saves for backward gate and up, which the gated product's own backward needs anyway, and z = A·h [N, R]: 2F + R numbers
a token. Autograd through the modules also keeps act(gate) and h (and m, were W trained). Only m is computed again,
elementwise. Backward, with g = dL/dy:

    gz = s·g·B            dB = s·gᵀ·z          gh = g + gz·A        residual and attention: g
    dA = gzᵀ·h = (gzᵀ·m)·Wᵀ                    dm = gh·W

The form of dA is the point: h, a product with the layer's largest matrix, is neither kept nor computed again. Its two
small products give fp32, so that dA is no less accurate than gzᵀ·h would be: on a GPU from bf16 factors as they lie (a factor
in fp32 as the sum of three in bf16), elsewhere from fp32 copies, a block at a time.

The epilogue, residual + attention + h + s·z·Bᵀ, is one kernel: it reads three tensors [N, D] and writes one, where
PyTorch's own operations read seven and write five. Sums are fp32, rounded once. gh has the same form, and takes it too.

Letters: N tokens, D hidden, F feed-forward, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from pipeline.kernels.dispatch import Kernel, takes_triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path serves every device
    triton = None

# Tokens of m, and rows of W, that are in fp32 at a time where they have to be (92 MB each at F = 22528).
BLOCK = 1024
# Of the epilogue: tokens and columns of a program's tile, and ranks that it multiplies by at a time.
TILE_N, TILE_D, TILE_R, WARPS = 64, 128, 32, 8

Product = Callable[[Tensor, Tensor], Tensor]


def reference(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    product: Product,
    residual: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """The same through autograd, as the modules compute it."""
    h = linear(product(gate, up), weight)
    y = (h + linear(linear(h.to(A.dtype), A), B) * scaling).to(h.dtype)
    return y if residual is None or attention is None else residual + attention + y


def gated_down_proj(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    product: Product,
    residual: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """y [..., D] for gate and up [..., F], plus residual and attention [..., D] where they are given, both or none.

    Differentiable in all but the frozen weight. `product(gate, up)` is m = act(gate)·up and must itself be
    differentiable. y has the dtype of gate and the weight; A and B may have another.
    Raises ValueError where residual and attention do not have y's shape and dtype, or only one is given.
    """
    shape = (*gate.shape[:-1], len(weight))
    others = [t for t in (residual, attention) if t is not None]
    if len(others) == 1 or any(t.shape != shape or t.dtype != gate.dtype for t in others):
        found = " and ".join(f"{list(t.shape)} {t.dtype}" for t in others)
        raise ValueError(f"multiplicative: want residual and attention, both {list(shape)} {gate.dtype}; got {found}")
    rows = [t.reshape(-1, t.shape[-1]) for t in (gate, up, *others)]
    y = _GatedDownProj.apply(*rows[:2], weight, A, B, scaling, product, *(rows[2:] or (None, None)))
    return y.view(shape)


class _GatedDownProj(torch.autograd.Function):
    """Saves gate, up, z and references to the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        product: Product,
        residual: Tensor | None,
        attention: Tensor | None,
    ) -> Tensor:
        h = linear(product(gate, up), weight)
        z = linear(h.to(A.dtype), A)
        ctx.save_for_backward(gate, up, z, weight, A, B)
        ctx.scaling, ctx.product = scaling, product
        return _epilogue(h, z, B, scaling, residual, attention)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, z, weight, A, B = ctx.saved_tensors
        wide = g.to(A.dtype)
        gz = (wide @ B) * ctx.scaling
        d_B = wide.T @ z * ctx.scaling if ctx.needs_input_grad[4] else None
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            m = ctx.product(gate, up)
        d_A = _gradient_of_A(gz, m.detach(), weight).to(A.dtype) if ctx.needs_input_grad[3] else None
        d_gate = d_up = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            gh = _epilogue(g, gz, A.T, 1.0, None, None)
            d_gate, d_up = torch.autograd.grad(m, (gate, up), gh @ weight)
        d_residual, d_attention = (g if wanted else None for wanted in ctx.needs_input_grad[7:])
        return d_gate, d_up, None, d_A, d_B, None, None, d_residual, d_attention


def _gradient_of_A(gz: Tensor, m: Tensor, weight: Tensor) -> Tensor:
    """(gzᵀ·m)·Wᵀ in fp32 [R, D], over blocks of tokens and of W's rows."""
    return _product_in_fp32(_product_in_fp32(gz.T, m), weight.T)


def _product_in_fp32(x: Tensor, y: Tensor) -> Tensor:
    """x·y in fp32 for x [M, K] and y [K, N], as accurate as the product of fp32 copies; M is small."""
    if _multiplies_into_fp32(y):
        if x.dtype is torch.bfloat16:
            return torch.mm(x, y, out_dtype=torch.float32)
        return torch.mm(torch.cat(in_three(x)), y, out_dtype=torch.float32).view(3, *x.shape[:1], -1).sum(0)
    if y.stride(0) == 1:  # transposed: blocks of columns lie together
        return torch.cat([x.float() @ y[:, n : n + BLOCK].float() for n in range(0, y.shape[1], BLOCK)], dim=1)
    total = torch.zeros(len(x), y.shape[1], dtype=torch.float32, device=y.device)
    for k in range(0, len(y), BLOCK):
        total += x[:, k : k + BLOCK].float() @ y[k : k + BLOCK].float()
    return total


def _multiplies_into_fp32(y: Tensor) -> bool:
    """Whether torch has an fp32 product of bf16 factors for this tensor: on CUDA, for which fake tensors stand."""
    return y.dtype is torch.bfloat16 and (y.is_cuda or isinstance(y, FakeTensor))


def in_three(x: Tensor) -> list[Tensor]:
    """fp32 → three bf16 tensors of its shape whose sum it is: 24 bits are three times 8, and the exponents are the same."""
    first = x.to(torch.bfloat16)
    second = (rest := x - first).to(torch.bfloat16)
    return [first, second, (rest - second).to(torch.bfloat16)]


def _epilogue(
    h: Tensor, z: Tensor, B: Tensor, scaling: float, residual: Tensor | None, attention: Tensor | None
) -> Tensor:
    return EPILOGUE(takes_triton(h), h, z, B, scaling, residual, attention)


# PyTorch: the reference, and the path of the CPU


def pytorch_epilogue(
    h: Tensor, z: Tensor, B: Tensor, scaling: float, residual: Tensor | None, attention: Tensor | None
) -> Tensor:
    """residual + attention + h + s·z·Bᵀ for h [N, D], z [N, R], B [D, R], in h's dtype; summed in fp32, rounded once."""
    wide = torch.promote_types(h.dtype, torch.float32)
    total = torch.addmm(h.to(wide), z.to(wide), B.to(wide).T, alpha=scaling)
    for other in (residual, attention):
        if other is not None:
            total.add_(other)
    return total.to(h.dtype)


# Triton

if triton is not None:

    @triton.jit
    def _epilogue_kernel(
        h,
        z,
        B,
        residual,
        attention,
        y,
        N,
        D,
        R,
        scaling,
        B_row,
        B_column,
        BLOCK_SUM: tl.constexpr,
        PRECISION: tl.constexpr,
        TILE_N: tl.constexpr,
        TILE_D: tl.constexpr,
        TILE_R: tl.constexpr,
    ) -> None:
        """Program (columns, tokens). B_row and B_column are strides in elements; all else is dense.

        BLOCK_SUM: residual and attention are there.
        """
        row = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)[:, None]
        column = tl.program_id(0) * TILE_D + tl.arange(0, TILE_D)[None, :]
        product = tl.zeros([TILE_N, TILE_D], tl.float32)
        for first in range(0, R, TILE_R):
            across = first + tl.arange(0, TILE_R)[None, :]
            down = first + tl.arange(0, TILE_R)[:, None]
            left = tl.load(z + row * R + across, mask=(row < N) & (across < R), other=0.0).to(tl.float32)
            right = tl.load(B + column * B_row + down * B_column, mask=(column < D) & (down < R), other=0.0)
            product = tl.dot(left, right.to(tl.float32), product, input_precision=PRECISION)
        at, inside = row * D + column, (row < N) & (column < D)
        total = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + product * scaling
        if BLOCK_SUM:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(attention + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


def triton_epilogue(
    h: Tensor, z: Tensor, B: Tensor, scaling: float, residual: Tensor | None, attention: Tensor | None
) -> Tensor:
    """Like `pytorch_epilogue`, in one kernel; B of any strides."""
    h, z = h.contiguous(), z.contiguous()
    (n, d), rank = h.shape, z.shape[1]
    y = torch.empty_like(h)
    others = [h if t is None else t.contiguous() for t in (residual, attention)]
    # A factor of 16 bits is exact in TF32, whose exponent is fp32's and whose mantissa fp16's; fp32 keeps its own products.
    narrow = z.element_size() == 2 and B.element_size() == 2
    if y.numel():
        with torch.cuda.device_of(h):
            _epilogue_kernel[triton.cdiv(d, TILE_D), triton.cdiv(n, TILE_N)](
                h,
                z,
                B,
                *others,
                y,
                n,
                d,
                rank,
                scaling,
                *B.stride(),
                BLOCK_SUM=residual is not None,
                PRECISION="tf32" if narrow else "ieee",
                TILE_N=TILE_N,
                TILE_D=TILE_D,
                TILE_R=TILE_R,
                num_warps=WARPS,
            )
    return y


EPILOGUE = Kernel(pytorch_epilogue, triton_epilogue)
