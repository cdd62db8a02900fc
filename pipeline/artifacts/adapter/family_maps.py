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
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt

from pipeline.artifacts.adapter.maps import (
    Added,
    ColumnFactors,
    Reflected,
    RowFactors,
    RowMap,
    RowNorms,
    Turned,
    shape_of,
)
from pipeline.artifacts.adapter.schema import AdapterConfig, Count, Names, Switch
from pipeline.families import FAMILIES, LORA

Tensors = Mapping[str, torch.Tensor]
OLDEST_OFT = (0, 18)  # of PEFT: before, the Neumann series was another one, and the version was not written


class Ia3Config(AdapterConfig):
    feedforward_modules: Names = None
    init_ia3_weights: Switch = None


class OftConfig(AdapterConfig):
    r: NonNegativeInt | None = None  # 0 where the size of the blocks is given
    oft_block_size: NonNegativeInt | None = None
    module_dropout: float | None = None
    coft: Switch = None
    eps: float | None = None
    block_share: Switch = None
    use_cayley_neumann: Switch = None
    num_cayley_neumann_terms: Annotated[int, Field(gt=0, le=1000)] = 5  # a product of matrices each


class BoftConfig(AdapterConfig):
    boft_block_size: NonNegativeInt | None = None
    boft_block_num: NonNegativeInt | None = None
    boft_n_butterfly_factor: NonNegativeInt | None = None
    boft_dropout: float | None = None


class HraConfig(AdapterConfig):
    r: Count | None = None
    apply_GS: Switch = None


def maps_of(family: str, tensors: Tensors, config: Mapping[str, Any]) -> tuple[RowMap, ...]:
    """The maps of one module. `family`: one of MAPS; `tensors`: by their names in its file, without the module's.

    Raises ValueError, saying what is wrong with it.
    """
    return MAPS[family].maps(tensors, config)


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
        if _version(config) < OLDEST_OFT:
            raise ValueError(
                f"an OFT adapter of PEFT {config.get('peft_version') or 'before 0.18'}: its series was another one than PEFT "
                "computes from 0.18 on. Train it again, or set peft_version if it was lost"
            )
        return (Turned(upper, size, _degree(int(config.get("num_cayley_neumann_terms", 5))), shared),)
    return (Turned(upper, size, None, shared),)


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The first two numbers of peft_version; (0, 0) where there is none."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", str(config.get("peft_version") or "0.0"))
    return tuple(int(number) for number in numbers.groups()) if numbers else (0, 0)


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
        raise ValueError("one of its vectors is zero, so it defines no reflection")
    if config.get("apply_GS"):  # Gram and Schmidt's vectors are those of a QR decomposition, but for their signs
        vectors = torch.linalg.qr(vectors.double()).Q
    return (Reflected(vectors),)


def _dora(pair: Added, tensors: Tensors) -> tuple[RowMap, ...]:
    (name,) = set(FAMILIES["dora"].tensors.values()) - set(FAMILIES[LORA].tensors.values())
    if tensors[name].shape != pair.B.shape[:1]:
        raise ValueError(f"{name} is {tuple(tensors[name].shape)}, and not as long as B")
    return (pair, RowNorms(tensors[name]))


@dataclass(frozen=True)
class Form:
    """How a family is read: the types of its configuration's keys, and what makes maps of a module's tensors and them."""

    config: type[AdapterConfig]
    maps: Callable[[Tensors, Mapping[str, Any]], tuple[RowMap, ...]]


MAPS: Mapping[str, Form] = {
    "ia3": Form(Ia3Config, _ia3),
    "oft": Form(OftConfig, _oft),
    "boft": Form(BoftConfig, _boft),
    "hra": Form(HraConfig, _hra),
}
# Of families that are a LoRA and more: from its A and B, and the other tensors of the module.
MAPS_OF_PAIRS: Mapping[str, Callable[[Added, Tensors], tuple[RowMap, ...]]] = {"dora": _dora}
