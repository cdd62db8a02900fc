"""PEFT's LoRA on a layer's experts (target_parameters), folded into experts stored one by one, together and transposed.

Oracle: stock PEFT's merge_and_unload of the same adapter, which stock PEFT made and saved.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from pipeline.artifacts.adapter.read import load_adapter, load_pairs
from pipeline.artifacts.fold.match import check_names
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from tests.helpers.artifacts import bytes_of, load_model, tensors_of
from tests.helpers.mixtures import LAYERS, SIZES, save_mixture

pytestmark = pytest.mark.usefixtures("small_blocks")
# fp32 sums of R products and a rounding: of weights of about 1 a few units in the last place.
TOLERANCE = 2e-6
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's model, made once. `square`: with as many inner numbers as outer ones."""

    @cache
    def get(kind: str, square: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        width = SIZES["hidden_size"]
        save_mixture(folder, kind, **({"intermediate_size": width, "moe_intermediate_size": width} if square else {}))
        return folder

    return get


def adapted(base: Path, folder: Path, **config: Any) -> Any:
    """Stock PEFT's adapter with random numbers, saved; the model that it merges."""
    model = get_peft_model(load_model(base), LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": [], **config}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return model


def check(base: Path, adapter: Path, output: Path) -> set[str]:
    """That the fold is stock PEFT's merge of what it loads; names of the tensors that changed."""
    merged = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().state_dict()
    figures = merge(base, adapter, output)
    found = load_model(output).state_dict()
    assert found.keys() == merged.keys()
    for name, tensor in found.items():
        assert (tensor - merged[name]).abs().max() < TOLERANCE * max(1.0, float(merged[name].abs().max())), name
    before, after = bytes_of(base), bytes_of(output)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {figure.name for figure in figures}
    assert all(0.999 < figure.gain < 1.001 for figure in figures)
    return changed


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss"])
def test_experts_of_every_form(saved: Any, tmp_path: Path, kind: str) -> None:
    """Gate and up apart and one by one, or all in one tensor, or that transposed; and taken out again."""
    base = saved(kind)
    adapted(base, tmp_path / "adapter", target_parameters=BOTH, target_modules=["q_proj"])
    changed = check(base, tmp_path / "adapter", tmp_path / "out")
    of_layer = {"mixtral": 3 * 4, "qwen3_moe": 3 * 4, "granitemoe": 2, "gpt_oss": 2}[kind]
    assert len(changed) == LAYERS * (of_layer + 1)
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    first = tensors_of(base)
    assert all((tensor - first[name]).abs().max() < 1e-5 for name, tensor in tensors_of(tmp_path / "back").items())


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
def test_square_experts_lie_as_the_model_runs_them(saved: Any, tmp_path: Path, kind: str) -> None:
    base = saved(kind, square=True)
    adapted(base, tmp_path / "adapter", target_parameters=["experts.down_proj"])
    assert len(check(base, tmp_path / "adapter", tmp_path / "out")) == LAYERS


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_what_peft_makes_of_names_of_experts(saved: Any, tmp_path: Path, kind: str) -> None:
    """target_modules that name experts (w1, gate_proj) become target_parameters, with a rank of their own for gate and up
    together; the router goes with them."""
    names = ["gate", "w1", "w2", "w3"] if kind == "mixtral" else ["gate", "gate_proj", "up_proj", "down_proj"]
    base = saved(kind)
    adapted(base, tmp_path / "adapter", target_modules=[*names, "q_proj"], use_rslora=True)
    changed = check(base, tmp_path / "adapter", tmp_path / "out")
    assert len(changed) == LAYERS * (3 * 4 + 2)


def test_strength_layers_and_another_adapter(saved: Any, tmp_path: Path) -> None:
    """--scale and --layers, and two such adapters one after the other, against the sum by hand in fp64."""
    base, name = saved("gpt_oss"), "model.layers.1.mlp.experts.down_proj"
    adapted(base, tmp_path / "one", target_parameters=["experts.down_proj"])
    adapted(base, tmp_path / "two", target_parameters=BOTH, r=2, lora_alpha=2)
    merge(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "out", scale=[0.5, 1.0], layers="1")
    W = tensors_of(base)[name].double()
    for folder, rank, s in ((tmp_path / "one", 3, 1.0), (tmp_path / "two", 2, 1.0)):
        tensors = tensors_of(folder)
        A = tensors["base_model.model.model.layers.1.mlp.experts.lora_A.weight"].double()
        B = tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].double()
        for e in range(4):
            W[e] += s * (B[:, e::4] @ A[e * rank : (e + 1) * rank]).T
    found = tensors_of(tmp_path / "out")
    assert (found[name] - W).abs().max() < TOLERANCE
    other = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(found[other], tensors_of(base)[other])


def test_what_is_refused(saved: Any, tmp_path: Path) -> None:
    base = saved("qwen3_moe")
    adapted(base, tmp_path / "adapter", target_parameters=BOTH)
    assert load_adapter(tmp_path / "adapter").of_parameters is not None
    with pytest.raises(UserError, match="target_parameters, a pair for each of its experts"):
        load_pairs(tmp_path / "adapter")
    with pytest.raises(UserError, match="Was the adapter trained on another model"):
        merge(saved("qwen3_moe", square=True), tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(UserError, match=r"has rank 3 by its tensors, but adapter_config\.json says 4"):
        text = (tmp_path / "adapter" / "adapter_config.json").read_text()
        (tmp_path / "adapter" / "adapter_config.json").write_text(text.replace('"r": 3', '"r": 4'))
        merge(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    check_names(read_base(base), [], [], parameters=["model.layers.0.mlp.experts.down_proj"])
    with pytest.raises(UserError, match=r"stores model\.layers\.0\.mlp\.experts\.bias in another form"):
        check_names(read_base(base), [], [], parameters=["model.layers.0.mlp.experts.bias"])
