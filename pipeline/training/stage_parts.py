"""What a stage has besides the model's own weights: adapters (or weights set free to train) and our kernels.

The same for a stage with its weights and for one on `meta` that is only counted. The base model's weights are frozen.
"""

from collections import Counter
from typing import Any

from pipeline.config import Config
from pipeline.model import adapters, fusion
from pipeline.model.stage import DTYPES, Stage


def put_adapters(stage: Stage, config: Config, targets: list[str]) -> None:
    """Adapters on those of `targets` that the stage owns; with full_fine_tune, the weights that are trained."""
    if config.full_fine_tune:
        adapters.unfreeze(stage, config.target_modules if isinstance(config.target_modules, list) else None)
        return
    multiplicative = config.adapter_type == "multiplicative_lora"
    inject = adapters.inject_multiplicative if multiplicative else adapters.inject_lora
    inject(stage, targets, config.lora_rank or 1, config.lora_alpha or 1.0, config.lora_dropout,
           DTYPES[config.lora_weight_dtype], config.seed)  # fmt: skip


def put_kernels(stage: Stage, wanted: str | list[Any]) -> Counter[str]:
    """Our kernels where they fit; how many modules took each."""
    return fusion.apply(stage, frozenset(kernel_names(wanted)))


def kernel_names(wanted: str | list[Any]) -> tuple[str, ...]:
    """'all', 'none' or a list of names, as names."""
    return fusion.KERNELS if wanted == "all" else () if wanted == "none" else tuple(wanted)
