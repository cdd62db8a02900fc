"""The end of an MLP with a multiplicative adapter: h = W·m, y = h + s·B·A·h, with m = act(gate)·up.

Takes gate and up [N, F], the frozen down_proj weight W [D, F], A [R, D], B [D, R] and s; gives y [N, D]. Saves for
backward gate and up, which the gated product's own backward needs anyway, and z = A·h [N, R]: 2F + R numbers a token.
Autograd through the modules also keeps act(gate) and h (and m, were W trained). Only m is computed again, elementwise.

Backward, with g = dL/dy:

    gz = s·g·B            dB = s·gᵀ·z          gh = g + gz·A
    dA = gzᵀ·h = (gzᵀ·m)·Wᵀ                    dm = gh·W

The form of dA is the point: h, a product with the layer's largest matrix, is neither kept nor computed again. Its two
small products run in fp32 over blocks, so that dA is no less accurate than gzᵀ·h would be.

Letters: N tokens, D hidden, F feed-forward, R rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

# Tokens of m, and rows of W, that are in fp32 at a time (92 MB each at F = 22528).
BLOCK = 1024

Product = Callable[[Tensor, Tensor], Tensor]


def reference(
    gate: Tensor, up: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, product: Product
) -> Tensor:
    """The same through autograd, as the modules compute it."""
    h = linear(product(gate, up), weight)
    return (h + linear(linear(h.to(A.dtype), A), B) * scaling).to(h.dtype)


def gated_down_proj(
    gate: Tensor, up: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, product: Product
) -> Tensor:
    """y [..., D] for gate and up [..., F]; differentiable in gate, up, A and B, not in the frozen weight.

    `product(gate, up)` is m = act(gate)·up and must itself be differentiable. Dtypes are those of `reference`.
    """
    shape = gate.shape[:-1]
    y = _GatedDownProj.apply(gate.flatten(0, -2), up.flatten(0, -2), weight, A, B, scaling, product)
    return y.view(*shape, len(weight))


class _GatedDownProj(torch.autograd.Function):
    """Saves gate, up, z and references to the weights."""

    @staticmethod
    def forward(ctx, gate, up, weight, A, B, scaling, product):  # noqa: ANN205
        h = linear(product(gate, up), weight)
        z = linear(h.to(A.dtype), A)
        ctx.save_for_backward(gate, up, z, weight, A, B)
        ctx.scaling, ctx.product = scaling, product
        return (h + linear(z, B) * scaling).to(h.dtype)

    @staticmethod
    def backward(ctx, g):  # noqa: ANN205
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
            gh = (wide + gz @ A).to(g.dtype)
            d_gate, d_up = torch.autograd.grad(m, (gate, up), gh @ weight)
        return d_gate, d_up, None, d_A, d_B, None, None


def _gradient_of_A(gz: Tensor, m: Tensor, weight: Tensor) -> Tensor:
    """(gzᵀ·m)·Wᵀ in fp32 [R, D], over blocks of tokens and of W's rows."""
    gz_m = torch.zeros(gz.shape[1], m.shape[1], dtype=torch.float32, device=m.device)
    for start in range(0, len(m), BLOCK):
        gz_m += gz[start : start + BLOCK].T.float() @ m[start : start + BLOCK].float()
    return torch.cat([gz_m @ weight[row : row + BLOCK].T.float() for row in range(0, len(weight), BLOCK)], dim=1)
