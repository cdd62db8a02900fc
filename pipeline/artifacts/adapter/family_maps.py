"""The families that are no pair of A and B, as maps of a weight: DoRA, IA³, OFT, BOFT, HRA.

Takes a module's tensors as PEFT writes them and its configuration; gives the maps, in the order of their effect. The
formulas are those of PEFT 0.21's own merge (`peft/tuners/*/layer.py`):

    dora   (W + s·B·A), then every row of the length m        Liu et al. 2024, arXiv 2402.09353, eq. 5
    ia3    diag(l)·W and l ⊙ b, or W·diag(l) where l is 1 × D_in   Liu et al. 2022, arXiv 2205.05638
    oft    W·Rᵀ, R by Cayley's transform or its series        Qiu et al. 2023, arXiv 2306.07280
    boft   diag(s)·(W·Rᵀ), one butterfly factor               Liu et al. 2023, arXiv 2311.06243
    hra    W·H₁·…·H_R                                         Yuan et al. 2024, arXiv 2405.17484, eq. 3

W is the weight as the adapters before have left it. (Of two DoRA adapters that PEFT merges at once it takes the row norms
of the base for both; merged one after the other it gives what is given here.)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.artifacts.adapter.maps import ColumnFactors, Reflected, RowFactors, RowMap, Turned, shape_of

Tensors = Mapping[str, torch.Tensor]


def maps_of(family: str, tensors: Tensors, config: Mapping[str, Any]) -> tuple[RowMap, ...]:
    """The maps of one module. `family`: one of MAPS; `tensors`: by their names in its file, without the module's.

    Raises ValueError, saying what is wrong with it.
    """
    return MAPS[family](tensors, config)


def _ia3(tensors: Tensors, _: Mapping[str, Any]) -> tuple[RowMap, ...]:
    factors = tensors["ia3_l"]
    if factors.dim() == 2 and factors.shape[1] == 1:
        return (RowFactors(factors.flatten()),)
    if factors.dim() == 2 and factors.shape[0] == 1:
        return (ColumnFactors(factors.flatten()),)
    raise ValueError(f"ia3_l is {shape_of(factors)}, neither D_out × 1 nor 1 × D_in")


def _oft(tensors: Tensors, config: Mapping[str, Any]) -> tuple[RowMap, ...]:
    upper = tensors["oft_R.weight"]
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2  # of K·(K − 1)/2 values
    shared = bool(config.get("block_share"))
    if upper.dim() != 2 or size * (size - 1) // 2 != upper.shape[1] or (shared and len(upper) != 1):
        raise ValueError(f"oft_R is {shape_of(upper)}, and not blocks × K·(K − 1)/2")
    if config.get("use_cayley_neumann", True):
        return (Turned(upper, size, _degree(int(config.get("num_cayley_neumann_terms", 5))), shared),)
    return (Turned(upper, size, None, shared),)


def _degree(terms: int) -> int:
    """Of PEFT's series of so many terms: the last is Q^(terms − 1), but three terms are computed as four, and two as 1 + 2Q."""
    if terms <= 2:
        raise ValueError(f"num_cayley_neumann_terms = {terms} is no rotation: 3 or more are one")
    return max(terms, 4) - 1


def _boft(tensors: Tensors, config: Mapping[str, Any]) -> tuple[RowMap, ...]:
    blocks, factors = tensors["boft_R"], tensors["boft_s"]
    if blocks.dim() != 4 or blocks.shape[2] != blocks.shape[3] or factors.dim() != 2 or factors.shape[1] != 1:
        raise ValueError(
            f"boft_R is {shape_of(blocks)}, boft_s {shape_of(factors)}: not 1 × blocks × K × K and D_out × 1"
        )
    if len(blocks) != 1:
        raise ValueError(f"it has {len(blocks)} butterfly factors, and only one can be folded")
    size = blocks.shape[2]
    rows, columns = torch.triu_indices(size, size, 1)
    skew = (blocks[0].double() - blocks[0].double().mT) / 2
    return (Turned(skew[:, rows, columns], size, None, False), RowFactors(factors.flatten()))


def _hra(tensors: Tensors, config: Mapping[str, Any]) -> tuple[RowMap, ...]:
    vectors = tensors["hra_u"]
    if vectors.dim() != 2:
        raise ValueError(f"hra_u is {shape_of(vectors)}, and not D_in × R")
    if not bool((vectors != 0).any(dim=0).all()):
        raise ValueError("one of its vectors is zero, and no reflection")
    if config.get("apply_GS"):  # Gram and Schmidt's vectors are those of a QR decomposition, but for their signs
        vectors = torch.linalg.qr(vectors.double()).Q
    return (Reflected(vectors),)


MAPS: dict[str, Callable[[Tensors, Mapping[str, Any]], tuple[RowMap, ...]]] = {
    "ia3": _ia3,
    "oft": _oft,
    "boft": _boft,
    "hra": _hra,
}
