"""Distances between hidden states, of which backward needs nothing but the states themselves and a few numbers a token.

Takes the policy's states x and a reference's y, and which tokens count; gives a number a row, with a gradient by x alone. Sums
are in fp32 (fp64 for fp64 states), a block of tokens at a time, so that no copy of the states in fp32 is ever whole: at 8192
tokens of 8192 numbers it would be 256 MiB. All names and formulas are in `DISTANCES` and docs/preference.md.

B rows, T tokens, D hidden size. A mask is bool [B, T]; a row without a token that counts has the distance 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1024  # tokens whose states are in fp32 at once


@dataclass(frozen=True)
class Numbers:
    """Of single distances: `alpha` of combined, `threshold` of adaptive, `k` of top_k."""

    alpha: float = 0.5
    threshold: float = 0.9
    k: int = 16


class Products(NamedTuple):
    """What most distances are made of, [B, T] each: ‖x − y‖², x·y, ‖x‖², ‖y‖², Σx, Σy; `width` is D."""

    apart: Tensor
    both: Tensor
    x: Tensor
    y: Tensor
    sum_x: Tensor
    sum_y: Tensor
    width: int

    @property
    def cosine(self) -> Tensor:
        """0 where a state is 0; exactly 1 of a state and itself."""
        return _ratio(self.both, root(self.x * self.y))


def products(x_BTD: Tensor, y_BTD: Tensor) -> Products:
    """With a gradient by x."""
    apart, both, x, y, sum_x, sum_y = _Products.apply(x_BTD, y_BTD).unbind(0)
    return Products(apart, both, x, y, sum_x, sum_y, x_BTD.shape[-1])


class _Products(torch.autograd.Function):
    """x, y [B, T, D] → [6, B, T], in the order of `Products`; keeps x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        found = torch.empty(6, x[..., 0].numel(), dtype=_wide(x[..., :0]).dtype, device=x.device)
        for block, a, b in _blocks(x, y):
            sums = ((a - b).square(), a * b, a * a, b * b, a, b)
            torch.stack([each.sum(-1) for each in sums], out=found[:, block])
        return found.view(6, *x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        apart, both, own, _, total, _ = gradients[0].flatten(1)[..., None]
        found = torch.empty_like(x.flatten(0, -2))
        for block, a, b in _blocks(x, y):
            found[block] = 2 * apart[block] * (a - b) + both[block] * b + 2 * own[block] * a + total[block]
        return found.view_as(x), None


class _TopK(torch.autograd.Function):
    """Mean of the k largest (x − y)² of a token, [B, T]; keeps x, y and which they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, k: int) -> Tensor:
        places = torch.empty(x[..., 0].numel(), k, dtype=torch.int32, device=x.device)
        found = torch.empty(len(places), dtype=_wide(x[..., :0]).dtype, device=x.device)
        for block, a, b in _blocks(x, y):
            largest = (a - b).square().topk(k, dim=-1)
            places[block], found[block] = largest.indices.int(), largest.values.mean(-1)
        ctx.save_for_backward(x, y, places)
        return found.view(x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, y, places = ctx.saved_tensors
        found, gradient = torch.zeros_like(x.flatten(0, -2)), gradients[0].flatten()[:, None] * 2 / places.shape[1]
        for block, a, b in _blocks(x, y):
            chosen = places[block].long()
            found[block] = found[block].scatter(1, chosen, (gradient[block] * (a - b).gather(1, chosen)).to(x.dtype))
        return found.view_as(x), None, None


class _Symlog(torch.autograd.Function):
    """mean_D (sl(x) − sl(y))², sl(z) = sign(z)·log(1 + |z|), [B, T]; keeps x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        found = torch.empty(x[..., 0].numel(), dtype=_wide(x[..., :0]).dtype, device=x.device)
        for block, a, b in _blocks(x, y):
            found[block] = (_signed_log(a) - _signed_log(b)).square().mean(-1)
        return found.view(x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        found, gradient = torch.empty_like(x.flatten(0, -2)), gradients[0].flatten()[:, None] * 2 / x.shape[-1]
        for block, a, b in _blocks(x, y):
            found[block] = gradient[block] * (_signed_log(a) - _signed_log(b)) / (1 + a.abs())
        return found.view_as(x), None


class _MaskedMean(torch.autograd.Function):
    """Of x [B, T, D], the mean over the tokens that count, [B, D]; keeps the mask alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = x.dtype
        found = _wide(x[:, :0]).sum(1)
        for start in range(0, x.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            found += (_wide(x[:, block]) * mask[:, block, None]).sum(1)
        return found / mask.sum(1, keepdim=True).clamp(min=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        share = (gradients[0] / mask.sum(1, keepdim=True).clamp(min=1)).to(ctx.dtype)
        return share[:, None] * mask[:, :, None], None


def masked_mean(x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Over the tokens that count, [B, D]; 0 for a row without any."""
    return _MaskedMean.apply(x_BTD, mask_BT)  # type: ignore[no-any-return]


def over_tokens(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Σ mask·value / Σ mask, [B]."""
    return torch.where(mask_BT, values_BT, 0).sum(1) / mask_BT.sum(1).clamp(min=1)


PerToken = Callable[[Products, Numbers], Tensor]

# A number a token, of the products alone.
PER_TOKEN: dict[str, PerToken] = {
    "l2": lambda p, n: root(p.apart),
    "squared": lambda p, n: p.apart / p.width,
    "normalised": lambda p, n: (2 - 2 * p.cosine) / p.width,
    "cosine": lambda p, n: 1 - p.cosine,
    "relu_cosine": lambda p, n: p.cosine.relu(),
    "combined": lambda p, n: n.alpha * (1 - p.cosine) + (1 - n.alpha) * (root(p.x) - root(p.y)).abs(),
    "adaptive": lambda p, n: torch.where(p.cosine > n.threshold, p.apart / p.width, 1 - p.cosine),
}
# A number a token, of the states.
OF_STATES: dict[str, Callable[[Tensor, Tensor, Numbers], Tensor]] = {
    "top_k": lambda x, y, n: _TopK.apply(x, y, min(n.k, x.shape[-1])),
    "symlog": lambda x, y, n: _Symlog.apply(x, y),
}
# A number a row, of the policy's difference a between two answers and the reference's v, both [B, D] (`between`).
BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "projection": lambda a, v: -_ratio((a * v).sum(-1), v.square().sum(-1)),
    "orthogonal": lambda a, v: _ratio(
        root((a - _ratio((a * v).sum(-1), v.square().sum(-1))[:, None] * v).square().sum(-1)),
        root(v.square().sum(-1)),
    ),
}
DISTANCES = (*PER_TOKEN, *OF_STATES, "correlation", *BETWEEN)


def of_rows(name: str, x_BTD: Tensor, y_BTD: Tensor, mask_BT: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """([B]: the distance `name`, of `PER_TOKEN`, `OF_STATES` or 'correlation'; [B], no gradient: the mean cosine)."""
    found = products(x_BTD, y_BTD)
    cosine_B = over_tokens(found.cosine.detach(), mask_BT)
    if name == "correlation":
        return _correlation(found, mask_BT), cosine_B
    per_token = OF_STATES[name](x_BTD, y_BTD, numbers) if name in OF_STATES else PER_TOKEN[name](found, numbers)
    return over_tokens(per_token, mask_BT), cosine_B


def between(name: str, a_BD: Tensor, v_BD: Tensor) -> tuple[Tensor, Tensor]:
    """([B]: the distance `name` of `BETWEEN`; [B], no gradient: the cosine of a and v)."""
    found = products(a_BD.detach()[:, None], v_BD[:, None])
    return BETWEEN[name](a_BD, v_BD), found.cosine[:, 0]


def mean_norm(y_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean of ‖y‖ over the tokens that count, [B]; no gradient."""
    with torch.no_grad():
        return over_tokens(root(products(y_BTD, y_BTD).y), mask_BT)


def root(squares: Tensor) -> Tensor:
    """√, with the gradient 0 at 0."""
    there = squares > 0
    return torch.where(there, torch.where(there, squares, 1).sqrt(), 0)


def _correlation(p: Products, mask_BT: Tensor) -> Tensor:
    """1 − Pearson's, over all numbers of the tokens that count at once, [B]. Combined in fp64: it is a difference of sums."""
    sums = [torch.where(mask_BT, each, 0).double().sum(1) for each in (p.both, p.x, p.y, p.sum_x, p.sum_y)]
    both, x, y, sum_x, sum_y = sums
    n = mask_BT.sum(1) * p.width
    shared, own, other = n * both - sum_x * sum_y, n * x - sum_x.square(), n * y - sum_y.square()
    return torch.where(n > 0, 1 - _ratio(shared, root(own.clamp(min=0) * other.clamp(min=0))), 0).to(p.both.dtype)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where the whole is 0, with the gradient 0."""
    there = whole != 0
    return torch.where(there, part / torch.where(there, whole, 1), 0)


def _signed_log(z: Tensor) -> Tensor:
    return z.sign() * z.abs().log1p()


def _wide(states: Tensor) -> Tensor:
    """In the dtype that is summed in."""
    return states if states.dtype == torch.float64 else states.float()


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Places of `BLOCK` tokens of x and y, flattened to [N, D], and both there."""
    x, y = x.flatten(0, -2), y.flatten(0, -2)
    for start in range(0, len(x), BLOCK):
        block = slice(start, start + BLOCK)
        yield block, _wide(x[block]), _wide(y[block])
