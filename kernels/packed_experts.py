"""Products with the experts of a mixture whose weights are kept in another form (4 or 8 bits), one expert at a time.

Kept for backward: nothing but the packed weights, which are frozen. x·Wᵀ unpacks W [D_out, D_in] once in forward and once
in backward (∂L/∂x = ∂L/∂h · W); of a layer no more than one expert's W is there at a time. In traffic that is, each time,
the packed bytes read and the unpacked ones written and read.

`PackedExperts` stands where a model's code has a parameter [E, D_out, D_in], or [E, D_in, D_out], and answers to what such
code does with it: `weight[e]` in `linear` or `@`, and `bmm` over all experts. Anything else is a TypeError.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Unpack = Callable[[], Tensor]  # a matrix in the dtype in which it is multiplied
LINEAR = (torch.nn.functional.linear,)
FROM_THE_RIGHT = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
BATCHED = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class PackedMatrix:
    """One expert's matrix [rows, columns]."""

    def __init__(self, unpack: Unpack) -> None:
        self.unpack = unpack

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], PackedMatrix):
            if func in LINEAR:
                x, matrix, *bias = args
                h: Any = _Product.apply(x, matrix.unpack, True)
                added = bias[0] if bias else kwargs.get("bias")
                return h if added is None else h + added
            if func in FROM_THE_RIGHT and len(args) == 2 and not kwargs:
                return _Product.apply(args[0], args[1].unpack, False)
        raise TypeError(f"{getattr(func, '__name__', func)} is not built for packed experts")


class PackedExperts:
    """The matrices of all experts, `shape` [E, rows, columns], `unpacks` one each, on `device`; `dtype` is what they were
    packed from."""

    def __init__(
        self, unpacks: Sequence[Unpack], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.unpacks, self.shape, self.dtype, self.device = tuple(unpacks), torch.Size(shape), dtype, device

    def __len__(self) -> int:
        return len(self.unpacks)

    def __getitem__(self, expert: Any) -> PackedMatrix:
        if not isinstance(expert, int) and not (isinstance(expert, Tensor) and expert.dim() == 0):
            raise TypeError("several experts at once are not built for packed experts")
        return PackedMatrix(self.unpacks[int(expert)])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BATCHED and len(args) == 2 and not kwargs and isinstance(args[1], PackedExperts):
            x, experts = args
            if x.dim() == 3 and len(x) == len(experts):
                return torch.stack([_Product.apply(x[e], experts.unpacks[e], False) for e in range(len(experts))])
        raise TypeError(f"{getattr(func, '__name__', func)} is not built for packed experts")


class _Product(torch.autograd.Function):
    """x·Wᵀ, or x·W, in W's dtype; the result in x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Unpack, transposed: bool) -> Tensor:
        ctx.unpack, ctx.transposed = unpack, transposed
        W = unpack()
        return (x.to(W.dtype) @ (W.T if transposed else W)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        W = ctx.unpack()
        return (gradient.to(W.dtype) @ (W if ctx.transposed else W.T)).to(gradient.dtype), None, None
