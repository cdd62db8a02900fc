"""Ranks and alphas that differ by module: `rank_pattern` and `alpha_pattern`, with PEFT's meaning.

Takes module names and patterns; gives each module's rank R and alpha, and the one form in which all of it is saved:
every A and B filled up with zeros to the largest rank, and B multiplied so that one s is right for all. That is the same
function, and one that every reader of adapters knows: PEANUT has no patterns, and those of a LoRA are often not read.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.patterns import matches

Sizes = tuple[int, float]  # rank R, alpha
T = TypeVar("T")


def resolve(
    module: str, rank: int, alpha: float, rank_pattern: Mapping[str, int], alpha_pattern: Mapping[str, float]
) -> Sizes:
    """The module's own: of the first pattern that matches its name or its end after a dot, else `rank` and `alpha`."""
    r, a = _first("rank_pattern", rank_pattern, module), _first("alpha_pattern", alpha_pattern, module)
    return rank if r is None else int(r), alpha if a is None else float(a)


def groups(sizes: Mapping[str, T]) -> dict[T, list[str]]:
    """The modules of each size, in order."""
    found: dict[T, list[str]] = {}
    for module, size in sizes.items():
        found.setdefault(size, []).append(module)
    return found


def check(patterns: Mapping[str, Iterable[str]], targets: Iterable[str]) -> None:
    """UserError for a pattern of the keys `patterns` that matches none of `targets`."""
    for key, given in patterns.items():
        for pattern in given:
            if not any(matches(pattern, module, key) for module in targets):
                raise UserError(f"{key}: '{pattern}' matches none of the modules that are trained")


def to_one_rank(tensors: Mapping[str, Tensor], rank: int, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """A [r, D] and B [D, r] of each module → [rank, D] and [D, rank] with zeros, B times the module's factor.

    Other tensors of a module stay as they are. A factor that is no power of two rounds B once, to its dtype.
    """
    out = dict(tensors)
    for module, factor in factors.items():
        A, B = tensors[f"{module}.A"], tensors[f"{module}.B"]
        out[f"{module}.A"] = torch.cat([A, A.new_zeros(rank - A.shape[0], A.shape[1])])
        scaled = (B.float() * factor).to(B.dtype)
        out[f"{module}.B"] = torch.cat([scaled, B.new_zeros(B.shape[0], rank - B.shape[1])], dim=1)
    return out


def from_one_rank(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, int], factors: Mapping[str, float]
) -> dict[str, Tensor]:
    """The inverse of `to_one_rank`. UserError if what is cut off is not zero."""
    out = dict(tensors)
    for module, rank in ranks.items():
        A, B = tensors[f"{module}.A"], tensors[f"{module}.B"]
        if A[rank:].any() and B[:, rank:].any():
            raise UserError(f"init_adapter: {module} makes use of more than rank {rank}, which this run gives it")
        out[f"{module}.A"] = A[:rank]
        out[f"{module}.B"] = (B[:, :rank].float() / factors[module]).to(B.dtype)
    return out


def _first(key: str, patterns: Mapping[str, float], module: str) -> float | None:
    return next((value for pattern, value in patterns.items() if matches(pattern, module, key)), None)
