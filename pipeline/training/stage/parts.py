"""What a stage has besides the model's own weights: adapters (or weights set free to train) and our kernels.

The same for a stage with its weights and for one on `meta` that is only counted. The base model's weights are frozen.
"""

from collections import Counter
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.formats.dtypes import DTYPES
from pipeline.model import quantized
from pipeline.model.adapters import base as adapters
from pipeline.model.adapters import full as trained_modules
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.training.stage import families


def foresee_quantised(model: PreTrainedModel, config: Config) -> list[str]:
    """Mark the linear layers of `model`, on `meta`, whose weights [quantization] quantises; their names."""
    scheme = quantisation(config)
    return quantized.foresee(model, scheme) if scheme else []


def quantisation(config: Config) -> quantized.Scheme | None:
    """What [quantization.bnb] says; None without it."""
    if config.quantization is None:
        return None
    b = config.quantization.bnb
    return quantized.Scheme(
        bits=4 if b.load_in_4bit else 8,
        quant_type=b.bnb_4bit_quant_type,
        double_quant=b.bnb_4bit_use_double_quant,
        compute_dtype=DTYPES[b.bnb_4bit_compute_dtype or config.model_weight_dtype],
        outlier_threshold=b.llm_int8_threshold,
        skip=tuple(b.llm_int8_skip_modules),
    )


def import_quantisation(config: Config) -> None:
    """Have bitsandbytes imported if this run needs it; no other run does."""
    if config.quantization:
        import pipeline.model.quantized_bnb  # noqa: F401


def put_quantised(stage: Stage, config: Config) -> None:
    """Quantised layers, still empty, where `foresee_quantised` has marked the stage's."""
    if config.quantization:
        from pipeline.model import quantized_bnb

        quantized_bnb.put_in(stage)


def put_trained(stage: Stage, config: Config, targets: list[str], in_full: Collection[str]) -> None:
    """Adapters on those of `targets` that the stage owns, and those of the parameters `in_full` set free to train; with
    full_fine_tune, the weights that are trained.
    """
    if config.full_fine_tune:
        adapters.unfreeze(stage, config.target_modules if isinstance(config.target_modules, list) else None)
        return
    families.inject(stage, config, targets)
    trained_modules.unfreeze(stage, in_full)


def whole_on_meta(config: Config, targets: list[str]) -> Stage:
    """The whole model as one stage on `meta`, with what is trained and without kernels: for counting and for names."""
    shell = empty_model(read_model_config(config.model), DTYPES[config.model_weight_dtype], config.attn_implementation)
    foresee_quantised(shell, config)
    in_full = trained_modules.resolve(shell, config.trainable_modules, targets)
    stage = Stage(shell.requires_grad_(False), 0, len(shell.base_model.layers)).train()
    put_trained(stage, config, targets, in_full)
    return stage


def put_kernels(stage: Stage, wanted: str | list[Any]) -> Counter[str]:
    """Our kernels where they fit; how many modules took each."""
    return fusion.apply(stage, frozenset(kernel_names(wanted)))


def kernel_names(wanted: str | list[Any]) -> tuple[str, ...]:
    """'all', 'none' or a list of names, as names."""
    return fusion.KERNELS if wanted == "all" else () if wanted == "none" else tuple(wanted)
