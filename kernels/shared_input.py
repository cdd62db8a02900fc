"""A frozen linear layer that hands its input on to the next layer that reads it: y = x·Wᵀ + b, and x.

Takes x [..., D], the weight W [D_out, D] and the bias b or None; gives y [..., D_out], as `linear` gives it, and x, for the next.

Saves W and nothing else. Backward goes through the chain of these layers from its end, and each adds its product g·W to the one
gradient that it is handed: no gradient of x for each layer, and no pass that sums them. Of the five projections of a parallel
block (q, k, v, gate, up) autograd makes four such sums, each of which reads two hidden states and writes one: 1.6 GB a layer of
Command-R at 8192 tokens. The sum is rounded once for each product added, where autograd rounds the product and the sum.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def linear_and_input(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and x, for x, W and b of one dtype; differentiable in x alone.

    The x that is returned is for one other call of this function: its gradient is added to in place.
    """
    return _LinearAndInput.apply(x, weight, bias)


class _LinearAndInput(torch.autograd.Function):
    """Saves a reference to the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        return linear(x, weight, bias), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, so_far: Tensor | None) -> tuple[Tensor | None, None, None]:
        if g is None:
            return so_far, None, None
        (weight,) = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        if so_far is None:
            return (rows @ weight).view(*g.shape[:-1], -1), None, None
        total = so_far.view(-1, so_far.shape[-1])
        torch.addmm(total, rows, weight, out=total)
        return so_far, None, None
