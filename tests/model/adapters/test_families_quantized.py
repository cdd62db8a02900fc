"""Every family over a quantised base, on one stage and on two. Oracle: the same adapter over the weights dequantised.

A forward's hidden state and every gradient, with parameters moved off their start. PEFT's own layers for bitsandbytes
serve IA³, OFT and BOFT; what PEFT's merges make of such bases is no concern here (adapters.md: fold into the 16-bit base).
"""

import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.model.adapters.base import trainable, written
from pipeline.model.stage import Stage
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.configs import problems, small
from tests.helpers.quantization import NF4, build, save_model
from tests.helpers.quick import only
from tests.training.run.test_quantized_training import dequantised, gradients

LORA = {"adapter_type": "lora", "lora_rank": 4, "lora_alpha": 6.0}
NO_RANK = {"lora_rank": None, "lora_alpha": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "multiplicative": {"adapter_type": "multiplicative_lora", "target_modules": ["o_proj", "down_proj"]},
    "control": {"adapter_type": "control_adapter", "lora_alpha": None, "target_modules": ["o_proj", "down_proj"]},
    "rslora": {**LORA, "use_rslora": True},
    "moslora": {**LORA, "adapter_type": "moslora"},
    "dora": {**LORA, "use_dora": True},
    "ia3": {**NO_RANK, "adapter_type": "ia3"},
    "oft": {**NO_RANK, "adapter_type": "oft", "oft_block_size": 8, "target_modules": ["q_proj", "down_proj"]},
    "boft": {**NO_RANK, "adapter_type": "boft", "boft_block_size": 8, "target_modules": ["q_proj", "down_proj"]},
}
# PEFT's own types that train over such bases, but for those that draw (PVERA) or change biases, which no layer here has (BEFT).
PEFT_KEYS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 8},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "MISS": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 16},
}
OF_PEFT: dict[str, Any] = {**NO_RANK, "adapter_type": "peft", "lora_weight_dtype": "float32"}
FAMILIES |= {name.lower(): {**OF_PEFT, "peft": {"type": name, **keys}} for name, keys in PEFT_KEYS.items()}
SCHEMES = {"4": NF4, "8": NF4._replace(bits=8)}
QUICK = ("multiplicative", "moslora", "dora", "boft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def stages_of(folder: Path, config: Config, scheme: Any, cuts: list[int], plain: bool) -> list[Stage]:
    """Stages with the configured adapter, its parameters moved off their start; `plain`: over dequantised weights."""
    adapter = resolve.resolve(config).trained.adapter
    stages = [build(folder, scheme, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        if plain:
            dequantised(stage)
            stage.model.is_loaded_in_4bit = stage.model.is_loaded_in_8bit = False  # type: ignore[assignment]
        families.inject(stage, adapter)
        stage.train()
        for name, parameter in trainable(stage).items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if not name.endswith(".Q"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return stages


def trained(stages: list[Stage]) -> dict[str, nn.Parameter]:
    return {name: p for stage in stages for name, p in trainable(stage).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", only(QUICK, FAMILIES))
def test_gradients_are_those_over_the_dequantised_weights(folder: Path, family: str, scheme: str) -> None:
    raw = {"model": str(folder), "layers_to_transform": "0:2", **FAMILIES[family]}
    config = loading.validate(small(**raw, quantization={"bnb": {f"load_in_{scheme}bit": True}}), "x.toml")
    oracle = stages_of(folder, config, SCHEMES[scheme], [0, 4], plain=True)
    expected = gradients(oracle, trained(oracle))
    assert len(expected) == 1 + len(trained(oracle))
    assert all(t.abs().max() > 0 for t in expected.values())
    for stage in oracle:
        stage.double()
    exact = gradients(oracle, trained(oracle))
    for cuts in ([0, 4], [0, 2, 4]):
        stages = stages_of(folder, config, SCHEMES[scheme], cuts, plain=False)
        found = gradients(stages, trained(stages))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # fp32: the same products in another order of rounding; by how much that counts, fp64 says of the oracle's own.
            allowed = max(1e-5 * tensor.norm(), 4 * (tensor - exact[name]).norm())
            assert (found[name] - tensor).norm() <= allowed, (name, cuts)


@pytest.mark.parametrize("family", only(QUICK, FAMILIES))
def test_what_is_saved_says_over_which_weights_it_was_trained(folder: Path, tmp_path: Path, family: str) -> None:
    bnb = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["o_proj"]}
    raw = {"model": str(folder), "layers_to_transform": "0:2", **FAMILIES[family]}
    config = loading.validate(small(**raw, quantization={"bnb": bnb}), "x.toml")
    plan = resolve.resolve(config)
    stage = build(folder, NF4, 0, 4)
    families.inject(stage, plan.trained.adapter)
    families.writer(plan.trained.adapter, plan.base, config.train_logit_scale, plan.trained.tied)(
        tmp_path, written(stage)
    )
    says = {"bits": 4, "quant_type": "nf4", "double_quant": True, "skip": ["o_proj"], "dtype": "bfloat16"}
    assert load_adapter(tmp_path).trained_over == says


@pytest.mark.parametrize("key", SCHEMES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_type": "hra", "lora_alpha": None}, "adapter_type: 'hra'"),
        ({**LORA, "init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({**LORA, "init_lora_weights": "olora"}, "init_lora_weights: 'olora'"),
    ],
)
def test_what_needs_the_weight_itself_is_refused(key: str, changes: dict[str, Any], said: str) -> None:
    (line,) = problems(small(quantization={"bnb": {f"load_in_{key}bit": True}}, **changes))
    assert line.startswith(said)
