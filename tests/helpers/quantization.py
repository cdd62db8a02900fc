"""Stages with a quantised base in this process, and the quantised model of transformers that they must equal."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from pipeline.kernels.packed_experts import PackedExperts
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.model import quantized, quantized_bnb, weights
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.quantized import Scheme
from pipeline.model.stage import Stage, empty_model, read_model_config
from tests.helpers import builders
from tests.helpers.stages import CPU

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NF4 = Scheme(4, "nf4", False, torch.float32, 6.0, ())
SCHEMES = {
    "nf4": NF4,
    "nf4, double": NF4._replace(double_quant=True),
    "fp4": NF4._replace(quant_type="fp4"),
    "8-bit": NF4._replace(bits=8),
    "8-bit, no outliers": NF4._replace(bits=8, outlier_threshold=0.0),
}


def save_model(folder: Path, kind: str, **changes: Any) -> Path:
    """A tiny model whose sizes are multiples of 64 weights, so that no block of scales is cut."""
    builders.save_model(folder, kind, **{**SIZES, **changes})
    return folder


def theirs(folder: Path, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own quantised model, in train mode; `skip` is as there: without it the head is left out."""
    given: dict[str, Any] = {"llm_int8_skip_modules": [*scheme.skip, "lm_head"] if scheme.skip else None}
    if scheme.bits == 8:
        given |= {"load_in_8bit": True, "llm_int8_threshold": scheme.outlier_threshold}
    else:
        given |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": scheme.quant_type,
            "bnb_4bit_use_double_quant": scheme.double_quant,
            "bnb_4bit_compute_dtype": scheme.compute_dtype,
        }
    config = BitsAndBytesConfig(**given)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")
    return model.train()


def with_placeholders(folder: Path, scheme: Scheme, first: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    """A stage on `meta` with the layers to quantise marked."""
    meta_model = empty_model(read_model_config(str(folder)), dtype, None)
    quantized.put_placeholders(meta_model, scheme)
    return Stage(meta_model, first, end)


def build(folder: Path, scheme: Scheme, first: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    """The stage loaded, in train mode."""
    stage = with_placeholders(folder, scheme, first, end, dtype)
    quantized_bnb.put_in(stage)
    weights.load(stage, str(folder), dtype, CPU)
    return stage.train()


def chain(folder: Path, scheme: Scheme, cuts: list[int], dtype: torch.dtype = torch.float32) -> list[Stage]:
    """Stages between consecutive `cuts`."""
    return [build(folder, scheme, first, end, dtype) for first, end in pairwise(cuts)]


def adapt(stages: list[Stage], kind: str, names: list[str], layers: list[int], folder: Path) -> dict[str, Any]:
    """An adapter that does something on the modules `names` of `layers`; all trained parameters by name."""
    targets = resolve_targets(empty_model(read_model_config(str(folder)), torch.float32, None), names, layers)
    inject = inject_lora if kind == "lora" else inject_multiplicative
    trained: dict[str, Any] = {}
    for stage in stages:
        inject(stage, targets, 4, 8.0, 0.0, torch.float32, 1)
        trained |= trainable(stage)
        stage.train()
    for name, parameter in sorted(trained.items()):
        if name.endswith(".B"):
            generator = torch.Generator().manual_seed(len(name) + int(name.split("layers.")[1][0]))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trained


def stored(parameter: Any, state: Any = None) -> dict[str, Tensor]:
    """All tensors a quantised weight consists of."""
    if parameter.dtype == torch.int8:
        scales = parameter.SCB if parameter.SCB is not None else state.SCB
        return {"codes": parameter.data, "scales": scales}
    quant = parameter.quant_state
    tensors = {"codes": parameter.data, "scales": quant.absmax, "table": quant.code}
    if quant.nested:
        tensors |= {"offset": quant.offset, "scales' scales": quant.state2.absmax, "scales' table": quant.state2.code}
    return tensors


def packed_in(stages: list[Stage]) -> dict[str, PackedExperts]:
    """By the name of the parameter in whose place they are."""
    return {
        f"{name}.{leaf}": value
        for stage in stages
        for name, module in stage.model.named_modules()
        for leaf, value in vars(module).items()
        if isinstance(value, PackedExperts)
    }


@torch.no_grad()
def dequantise_into(whole: Any, stages: list[Stage]) -> Any:
    """transformers' model `whole`, with what the stages' quantised weights stand for."""
    for name, experts in packed_in(stages).items():
        whole.get_parameter(name).copy_(torch.stack([unpack() for unpack in experts.unpacks]))
    for stage in stages:
        for name, module in stage.model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = quantized_bnb.dequantised(module.weight.data, module.weight.quant_state)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                weight = bnb.functional.int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
            else:
                continue
            whole.get_submodule(name).weight.copy_(weight)
    return whole
