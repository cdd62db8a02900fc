"""Numbers that travel with the hidden state: fp32 values in rows behind its last token, from stage to stage.

Takes a hidden state and values; gives one tensor, and both back on the next stage. What comes back for these rows in backward is
the gradient by the values, so that nothing but one floating-point tensor crosses a boundary, on any schedule. Numbers are split
into three of the hidden state's dtype, whose sum they are: exact in bf16 and fp32.
"""

from typing import Any

import torch
from torch import Tensor, nn

PIECES = 3  # of 8 bits or more each: the 24 of fp32


def pack(hidden_BTD: Tensor, values: Tensor, scale: float = 1.0) -> Tensor:
    """The hidden state [B, T + r, D] with fp32 `values` [n] in r rows behind it, multiplied by `scale`, a power of two."""
    B, _, D = hidden_BTD.shape
    pieces = _Split.apply(values * scale, hidden_BTD.dtype).flatten()
    rows = rows_behind(len(values), B, D)
    filled = nn.functional.pad(pieces, (0, B * rows * D - len(pieces)))
    return torch.cat([hidden_BTD, filled.view(B, rows, D)], dim=1)


def rows_behind(count: int, B: int, D: int) -> int:
    """Of hidden states [B, D], those that `count` values take."""
    return -(-PIECES * count // (B * D))


def unpack(packed: Tensor, tokens: int, count: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The hidden state [B, tokens, D] and the fp32 values [count] that `pack` put together."""
    pieces = packed[:, tokens:].flatten()[: PIECES * count].view(PIECES, count)
    return packed[:, :tokens], _Join.apply(pieces) / scale


class _Split(torch.autograd.Function):
    """fp32 [n] → [PIECES, n] of a dtype, whose sum they are."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return _split(values, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _joined(gradients[0]), None


class _Join(torch.autograd.Function):
    """The inverse. A gradient goes through in pieces, as a value does."""

    @staticmethod
    def forward(ctx: Any, pieces: Tensor) -> Tensor:
        ctx.dtype = pieces.dtype
        return _joined(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # type: ignore[override]
        return _split(gradients[0], ctx.dtype)


def _split(values: Tensor, dtype: torch.dtype) -> Tensor:
    pieces, left = [], values.float()
    for _ in range(PIECES):
        pieces.append(left.to(dtype))
        left = left - pieces[-1].float()
    return torch.stack(pieces)


def _joined(pieces: Tensor) -> Tensor:
    largest, *others = pieces.float()
    for piece in others:
        largest = largest + piece
    return largest
