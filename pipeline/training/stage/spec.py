"""What is trained, in plain values: resolved from the config once (training/start/to_train.py), read by all that follows.

Knows neither the config nor a model that is there: names of modules and parameters, sizes, dtypes.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pipeline.families import Family, chosen
from pipeline.formats.experts import ExpertWeights
from pipeline.model.quantized import Scheme
from pipeline.peft.types import Asked


@dataclass(frozen=True)
class BaseModel:
    """The model that is trained over: its folder, the dtype of its weights, and how they are quantised, if they are.

    `name`: what an adapter calls it: a Hub id where one is known, else the folder.
    """

    folder: str
    dtype: torch.dtype
    attn_implementation: str | None
    scheme: Scheme | None
    name: str


class Size(NamedTuple):
    """Rank R, alpha, and s = alpha/R or, with use_rslora, alpha/√R. 1 for what a family does not have."""

    rank: int
    alpha: float
    s: float


def size_of(rank: int | None, alpha: float | None, use_rslora: bool) -> Size:
    """With s = 1 where there is no rank or no alpha."""
    if rank is None or alpha is None:
        return Size(rank or 1, alpha or 1.0, 1.0)
    return Size(rank, alpha, alpha / (math.sqrt(rank) if use_rslora else rank))


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter of one family, with the size of each module's own.

    `common`: of lora_rank and lora_alpha, which rank_pattern and alpha_pattern change for some modules. `start`: how A and B
    begin, True (A random, B zero) or init_lora_weights' name of another. `block_size`: of families with blocks.
    `feedforward`: the modules with a factor for each input. `biased_targets`: whether any of the modules has a bias.
    `experts`: those of the modules that are a layer's experts, with what these write with. `parameters`: those that are no
    modules but parameters, with their shapes, each module's in the order in which it holds them. `by_peft`: of a type of PEFT's
    own.
    """

    family: str
    sizes: dict[str, Size]
    common: Size
    dtype: torch.dtype
    dropout: float
    seed: int
    biased_targets: bool
    use_rslora: bool = False
    use_dora: bool = False
    start: bool | str = True
    block_size: int | None = None
    feedforward: tuple[str, ...] = ()
    experts: dict[str, ExpertWeights] = field(default_factory=dict)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    by_peft: Asked | None = None

    @property
    def row(self) -> Family:
        """The family's row in pipeline/families.py."""
        return chosen(self.family, vars(self))

    @property
    def targets(self) -> list[str]:
        """Full names of the modules that are adapted."""
        return list(self.sizes)

    @property
    def matrices(self) -> dict[str, int]:
        """Of each parameter that is adapted, how many matrices it holds."""
        return {name: shape[0] if len(shape) == 3 else 1 for name, shape in self.parameters.items()}

    @property
    def saved_size(self) -> Size:
        """Of all modules in what is saved: the largest rank, and the common s."""
        rank, s = max(size.rank for size in self.sizes.values()), self.common.s
        if rank == self.common.rank:
            return self.common
        return Size(rank, s * (math.sqrt(rank) if self.use_rslora else rank), s)

    @property
    def factors(self) -> dict[str, float]:
        """Each module's s over the s with which it is saved."""
        return {module: size.s / self.common.s for module, size in self.sizes.items()}


@dataclass(frozen=True)
class Trained:
    """All that is trained: an adapter and `in_full`, parameters beside it; or, without an adapter, the model's own weights.

    `own_weights`: without an adapter, the parts of names of which a trained parameter has one; None for all parameters.
    `in_full`: full names of parameters. `tied`: the head's where it is the embedding, with that one's (`stage.tied_head`).
    """

    adapter: AdapterSpec | None
    own_weights: list[str] | None = None
    in_full: list[str] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Full names of the modules that are adapted."""
        return self.adapter.targets if self.adapter else []
