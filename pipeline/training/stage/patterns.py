"""Ranks and alphas that differ by module: `rank_pattern` and `alpha_pattern`, with PEFT's meaning.

Takes module names and patterns; gives each module's rank R and alpha, and the one form in which all of it is saved:
every A and B filled up with zeros to the largest rank, and B multiplied so that one s is right for all. That is the same
function, and one that every reader of adapters knows: PEANUT has no patterns, and those of a LoRA are often not read.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor
from torch.nn.functional import pad

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


def to_one_rank(
    tensors: Mapping[str, Tensor], rank: int, factors: Mapping[str, float], matrices: Mapping[str, int]
) -> dict[str, Tensor]:
    """A [r, D] and B [D, r] of each module → [rank, D] and [D, rank] with zeros, B times the module's factor.

    Of a parameter with E `matrices`, A [r·E, D] and B [D, r·E], those of each. Other tensors of a module stay as they are. A
    factor that is no power of two rounds B once, to its dtype.
    """
    out = dict(tensors)
    for module, factor in factors.items():
        A, B = _by_matrix(tensors, module, matrices)
        lacking = rank - A.shape[1]
        scaled = (B.float() * factor).to(B.dtype)
        out[f"{module}.A"] = pad(A, (0, 0, 0, lacking)).flatten(0, 1)
        out[f"{module}.B"] = pad(scaled, (0, 0, 0, lacking)).flatten(1)
    return out


def from_one_rank(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, int], factors: Mapping[str, float], matrices: Mapping[str, int]
) -> dict[str, Tensor]:
    """The inverse of `to_one_rank`. UserError if what is cut off is not zero."""
    out = dict(tensors)
    for module, rank in ranks.items():
        A, B = _by_matrix(tensors, module, matrices)
        if A[:, rank:].any() and B[:, rank:].any():
            raise UserError(f"init_adapter: {module} makes use of more than rank {rank}, which this run gives it")
        out[f"{module}.A"] = A[:, :rank].flatten(0, 1)
        out[f"{module}.B"] = (B[:, :rank].float() / factors[module]).to(B.dtype).flatten(1)
    return out


def _by_matrix(tensors: Mapping[str, Tensor], module: str, matrices: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """A [E, r, D] and B [D, r, E], as PEFT has them of a parameter with E matrices; of a module E is 1."""
    E = matrices.get(module, 1)
    return tensors[f"{module}.A"].unflatten(0, (E, -1)), tensors[f"{module}.B"].unflatten(1, (-1, E))


def _first(key: str, patterns: Mapping[str, float], module: str) -> float | None:
    return next((value for pattern, value in patterns.items() if matches(pattern, module, key)), None)
