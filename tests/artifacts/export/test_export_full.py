"""Exports of adapters with tensors trained in full beside them, and of families that have no additive form."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import inspect_lora
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError, run_command
from tests.helpers.artifacts import hooked, load_model, logits, multiplicative, tensors_of
from tests.helpers.families import by_peft, loud_base

LOGIT_TOLERANCE = 1e-5  # as in test_merge_families.py
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", mlp_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", "cohere")


def trained(base: Path, *names: str) -> dict[str, torch.Tensor]:
    """The base's tensors as if they had been trained in full."""
    generator, before = torch.Generator().manual_seed(1), tensors_of(base)
    return {name: before[name] + 0.3 * torch.randn(before[name].shape, generator=generator) for name in names}


@pytest.mark.parametrize("case", ["untied", "tied"])
def test_peft_computes_what_was_trained(request, tmp_path: Path, case: str) -> None:
    """By PEFT's modules_to_save; the tied head is a copy. Folded, the export is the fold of the adapter."""
    base = request.getfixturevalue("llama" if case == "untied" else "tied")
    full = trained(base, EMBEDDING, NORM, *([HEAD] if case == "untied" else []))
    copies: dict[str, Any] = {"tied": {HEAD: EMBEDDING}} if case == "tied" else {}
    tensors = multiplicative(tmp_path / "adapter", full=full, biased_targets=case == "untied", **copies)
    model = load_model(base)
    model.load_state_dict(full, strict=False)
    with hooked(model, tensors, 1.5, multiplicative=True):
        expected = logits(model)
    export(base, tmp_path / "adapter", tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens", "model.norm", "lm_head"]
    served = PeftModel.from_pretrained(load_model(base), str(tmp_path / "out")).eval()
    assert (logits(served) - expected).abs().max() < LOGIT_TOLERANCE
    assert (logits(load_model(base)) - expected).abs().max() > 1e-2
    for adapter in ("adapter", "out"):
        merge(base, tmp_path / adapter, tmp_path / f"folded {adapter}")
        assert (logits(load_model(tmp_path / f"folded {adapter}")) - expected).abs().max() < LOGIT_TOLERANCE


def test_gguf_has_no_place_for_them(llama: Path, tmp_path: Path) -> None:
    multiplicative(tmp_path / "adapter", full=trained(llama, NORM))
    with pytest.raises(UserError, match=r"1 tensors were trained in full .*model\.norm\.weight first.*GGUF"):
        export(llama, tmp_path / "adapter", tmp_path / "out.gguf", format="gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_part_of_a_module_has_no_place_either(llama: Path, tmp_path: Path) -> None:
    by_peft(llama, tmp_path / "adapter", "lora", bias="all")
    with pytest.raises(UserError, match=r"proj\.bias was trained in full, without the rest of its module"):
        export(llama, tmp_path / "adapter", tmp_path / "out", format="peft")
    by_peft(llama, tmp_path / "biased", "lora", lora_bias=True, target_modules=["down_proj"])
    with pytest.raises(UserError, match=r"lora_B of model\.layers\.0\.mlp\.down_proj has a bias of its own"):
        export(llama, tmp_path / "biased", tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["peft", "gguf"])
@pytest.mark.parametrize("family", ["dora", "ia3", "oft", "boft", "hra"])
def test_families_without_an_additive_form_are_refused_by_name(llama: Path, tmp_path: Path, family, format) -> None:
    by_peft(llama, tmp_path / "adapter", family)
    with pytest.raises(UserError, match=f"an adapter of the family {family}, which is not a pair of A and B"):
        export(llama, tmp_path / "adapter", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["pairs", "dora", "oft"])
def test_inspect_lists_tensors_in_full_and_refuses_families(llama, tmp_path: Path, family, monkeypatch, capsys) -> None:
    if family == "pairs":
        multiplicative(tmp_path / "adapter", full=trained(llama, NORM, EMBEDDING))
    else:
        by_peft(llama, tmp_path / "adapter", family)
    monkeypatch.setattr(sys, "argv", ["inspect_lora.py", str(tmp_path / "adapter")])
    with pytest.raises(SystemExit) as ended:
        run_command(inspect_lora.main)
    said = capsys.readouterr()
    if family == "pairs":
        assert ended.value.code == 0
        assert "2 tensors were trained in full beside the pairs" in " ".join(said.out.split())
    else:
        assert ended.value.code == 2
        assert f"an adapter of the family {family}, which is not a pair" in said.err
