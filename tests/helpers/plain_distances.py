"""Distances between hidden states as their formulas have them: whole tensors, fp64, autograd. Of the product nothing is used.

x and y are [n, D]: the states of the n tokens of a row that count.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _cos(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-30)


def _symlog(z: Tensor) -> Tensor:
    return z.sign() * torch.log1p(z.abs())


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]


def _unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=-1, keepdim=True)


def adaptive(x: Tensor, y: Tensor, threshold: float) -> Tensor:
    return torch.where(_cos(x, y) > threshold, ((x - y) ** 2).mean(-1), 1 - _cos(x, y)).mean()


OF_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda x, y: (x - y).norm(dim=-1).mean(),
    "squared": lambda x, y: ((x - y) ** 2).mean(),
    "normalised": lambda x, y: ((_unit(x) - _unit(y)) ** 2).mean(),
    "cosine": lambda x, y: (1 - _cos(x, y)).mean(),
    "relu_cosine": lambda x, y: _cos(x, y).clamp(min=0).mean(),
    "combined": lambda x, y: (0.25 * (1 - _cos(x, y)) + 0.75 * (x.norm(dim=-1) - y.norm(dim=-1)).abs()).mean(),
    "adaptive": lambda x, y: adaptive(x, y, 0.5),
    "top_k": lambda x, y: ((x - y) ** 2).topk(5, dim=-1).values.mean(),
    "symlog": lambda x, y: ((_symlog(x) - _symlog(y)) ** 2).mean(),
    "correlation": lambda x, y: 1 - _pearson(x, y),
}
ALPHA, THRESHOLD, K = 0.25, 0.5, 5  # those of the formulas above


def projection(a: Tensor, v: Tensor) -> Tensor:
    """Of the policy's difference a [D] on the reference's v."""
    return -(_unit(v) @ a) / v.norm()


def orthogonal(a: Tensor, v: Tensor) -> Tensor:
    """What of a is not along v."""
    return (a - (_unit(v) @ a) * _unit(v)).norm() / v.norm()


BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"projection": projection, "orthogonal": orthogonal}
