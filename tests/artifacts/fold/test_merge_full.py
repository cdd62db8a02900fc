"""Tensors that were trained in full beside an adapter, trained biases and lora_bias: PEFT's merge and fp64 as oracles."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter import maps
from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from tests.helpers.artifacts import (
    FACTS,
    VOCABULARY,
    bytes_of,
    down_proj,
    edit_json,
    fold64,
    hooked,
    load_model,
    logits,
    make_base,
    multiplicative,
    random_tensors,
    tensors_of,
)
from tests.helpers.families import by_peft, loud_base

pytestmark = pytest.mark.usefixtures("small_blocks")

# As in test_merge_families.py.
LOGIT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 5e-6
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", mlp_bias=True, attention_bias=True)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", "cohere")


def trained(base: Path, *names: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """The base's tensors as if they had been trained in full."""
    generator, before = torch.Generator().manual_seed(seed), tensors_of(base)
    return {name: before[name] + 0.3 * torch.randn(before[name].shape, generator=generator) for name in names}


def ours(folder: Path, full: dict[str, torch.Tensor], **facts: Any) -> dict[str, torch.Tensor]:
    """A multiplicative adapter of every down_proj with tensors trained in full, s = 1.5."""
    return multiplicative(folder, full=full, **facts)


def refused(words: str, base: Path, adapters: Path | list[Path], out: Path, **asked: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        merge(base, adapters, out, **asked)
    assert caught.value.exit_code == 2
    assert not out.exists()


BESIDE = {
    "modules": ("lora", {"modules_to_save": ["embed_tokens", "norm", "lm_head"]}, 9),
    "modules of a layer": ("lora", {"modules_to_save": ["layers.1.mlp.up_proj"]}, 2),
    "beside DoRA": ("dora", {"modules_to_save": ["lm_head"]}, 1),
    "beside IA3": ("ia3", {"modules_to_save": ["model.norm", "lm_head"]}, 2),
    "beside HRA": ("hra", {"modules_to_save": ["embed_tokens"]}, 1),
    "all biases": ("lora", {"bias": "all"}, 3 * 7),
    "biases of the targets": ("lora", {"bias": "lora_only"}, 3 * 3),
    "biases of OFT's targets": ("oft", {"bias": "oft_only"}, 3 * 3),
    "biases and modules": ("boft", {"bias": "boft_only", "modules_to_save": ["lm_head"]}, 10),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_peft_trained_in_full_takes_the_bases_place(llama: Path, tmp_path: Path, case: str) -> None:
    """'norm' is the end of input_layernorm's name too, and PEFT trains all of those."""
    family, config, number = BESIDE[case]
    model = by_peft(llama, tmp_path / "adapter", family, **config)
    with torch.no_grad():
        live = logits(model)
    assert len(load_adapter(tmp_path / "adapter").full) == number
    figures = merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    before = tensors_of(llama)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name
    assert (logits(load_model(tmp_path / "out")) - live).abs().max() < LOGIT_TOLERANCE
    replaced = load_adapter(tmp_path / "adapter").full
    assert all(torch.equal(tensors_of(tmp_path / "out")[name], tensor) for name, tensor in replaced.items())
    for figure in figures:
        if figure.name in replaced:
            moved = replaced[figure.name].double() - before[figure.name].double()
            assert figure.gain == pytest.approx(1.0)
            assert figure.error == 0
            # Biases of fp32 less each other: 2⁻²⁴ of them, which are ten times what they moved by.
            assert figure.size == pytest.approx(float(moved.norm() / before[figure.name].double().norm()), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_bias_of_lora_B_moves_the_bias(llama: Path, tmp_path: Path, scale: float, capsys) -> None:
    model = by_peft(llama, tmp_path / "adapter", "lora", lora_bias=True)
    merge(llama, tmp_path / "adapter", tmp_path / "out", scale=scale)
    assert "b' = b + s·(the bias of lora_B)" in capsys.readouterr().out
    stored, before, after = tensors_of(tmp_path / "adapter"), tensors_of(llama), tensors_of(tmp_path / "out")
    for module in down_proj():
        moved = 1.5 * scale * stored[f"base_model.model.{module}.lora_B.bias"].double()
        assert (after[f"{module}.bias"].double() - before[f"{module}.bias"].double() - moved).abs().max() < 1e-6
        assert moved.abs().max() > 0.05
    if scale == 1.0:
        merged = model.merge_and_unload().state_dict()
        assert all((tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE for name, tensor in after.items())
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", scale=scale, unmerge=True)
    assert all((tensors_of(tmp_path / "back")[name] - t).abs().max() < 3e-6 for name, t in before.items())


def test_a_bias_of_lora_B_needs_a_bias_to_move(tied: Path, tmp_path: Path) -> None:
    by_peft(tied, tmp_path / "adapter", "lora", lora_bias=True)
    refused(
        r"lora_B of .* has a bias, and .* has no model\..*\.bias to take it", tied, tmp_path / "adapter", tmp_path / "o"
    )


def test_a_bias_of_lora_B_is_no_multiplicative_adapters(llama: Path, tmp_path: Path) -> None:
    by_peft(llama, tmp_path / "adapter", "lora", lora_bias=True, target_modules=["q_proj"])
    words = "lora_B of .*q_proj has a bias, which only a LoRA can have"
    refused(words, llama, tmp_path / "adapter", tmp_path / "o", kind="multiplicative_lora")


def test_two_dora_adapters_are_what_peft_merges_one_after_the_other(llama: Path, tmp_path: Path) -> None:
    by_peft(llama, tmp_path / "one", "dora", seed=1).merge_and_unload().save_pretrained(tmp_path / "between")
    merged = by_peft(tmp_path / "between", tmp_path / "two", "dora", seed=2).merge_and_unload().state_dict()
    merge(llama, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name


def test_our_own_files_and_only_what_they_announce(llama: Path, tmp_path: Path, capsys) -> None:
    full = trained(llama, EMBEDDING, NORM)
    tensors = ours(tmp_path / "adapter", full)
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert "in full: 2 tensors, model.embed_tokens.weight, model.norm.weight" in capsys.readouterr().out
    model = load_model(llama)
    model.load_state_dict(full, strict=False)
    with hooked(model, tensors, 1.5, multiplicative=True):
        assert (logits(load_model(tmp_path / "out")) - logits(model)).abs().max() < LOGIT_TOLERANCE
    report = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert report["adapters"][0]["full"] == [EMBEDDING, NORM]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    good = load_file(file)
    save_file({**good, f"base_model.model.{HEAD}": torch.ones(96, 32)}, file, metadata)
    refused(
        "1 tensors are no peanut_A or peanut_B of a module: lm_head.weight", llama, tmp_path / "adapter", tmp_path / "o"
    )
    save_file({name: tensor for name, tensor in good.items() if NORM not in name}, file, metadata)
    refused(
        "model.norm.weight was trained in full by its .* not in the file", llama, tmp_path / "adapter", tmp_path / "o"
    )
    save_file({**good, f"base_model.model.{NORM}": torch.full((32,), torch.nan)}, file, metadata)
    refused("model.norm.weight holds NaN", llama, tmp_path / "adapter", tmp_path / "o")


def test_a_tied_base_has_one_tensor_for_embedding_and_head(tied: Path, tmp_path: Path) -> None:
    full = trained(tied, EMBEDDING)
    tensors = ours(tmp_path / "adapter", full, tied={HEAD: EMBEDDING})
    assert set(load_adapter(tmp_path / "adapter").full) == {EMBEDDING, HEAD}
    merge(tied, tmp_path / "adapter", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors_of(tied).keys()
    assert torch.equal(tensors_of(tmp_path / "out")[EMBEDDING], full[EMBEDDING])
    model = load_model(tied)
    model.load_state_dict(full, strict=False)  # the head is the same parameter
    with hooked(model, tensors, 1.5, multiplicative=True):
        assert (logits(load_model(tmp_path / "out")) - logits(model)).abs().max() < LOGIT_TOLERANCE


def test_an_embedding_trained_beside_a_head_of_its_own_unties_the_base(tied: Path, tmp_path: Path, capsys) -> None:
    """The run's model did not tie them: the head stayed as it was."""
    full = trained(tied, EMBEDDING)
    ours(tmp_path / "adapter", full)
    merge(tied, tmp_path / "adapter", tmp_path / "out")
    assert "tie_word_embeddings = false in the result" in capsys.readouterr().out
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[EMBEDDING], full[EMBEDDING])
    assert torch.equal(found[HEAD], tensors_of(tied)[EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"], ["tied"]])
def test_stock_peft_on_a_tied_base(tied: Path, tmp_path: Path, modules: list[str]) -> None:
    """PEFT trains a copy of what modules_to_save names, so that the two come apart, unless it is told to keep them."""
    keeps = modules == ["tied"]
    asked = {"modules_to_save": ["embed_tokens"] if keeps else modules, "ensure_weight_tying": keeps}
    model = by_peft(tied, tmp_path / "adapter", "lora", **asked)
    with torch.no_grad():
        live = logits(model)
    merge(tied, tmp_path / "adapter", tmp_path / "out")
    assert (logits(load_model(tmp_path / "out")) - live).abs().max() < LOGIT_TOLERANCE
    assert (HEAD in tensors_of(tmp_path / "out")) == (not keeps)


@pytest.mark.parametrize("first", ["full", "pair"])
def test_a_tensor_in_full_and_another_adapters_change_in_order(llama: Path, tmp_path: Path, first: str, capsys) -> None:
    module = "model.layers.1.mlp.down_proj"
    full = trained(llama, f"{module}.weight")
    other = random_tensors({"model.layers.0.mlp.up_proj": (48, 32)}, 4, multiplicative=False)
    save_adapter(tmp_path / "full", other, kind="lora", rank=4, alpha=4, full=full, **FACTS)
    pair = multiplicative(tmp_path / "pair")
    order = [tmp_path / "full", tmp_path / "pair"] if first == "full" else [tmp_path / "pair", tmp_path / "full"]
    merge(llama, order, tmp_path / "out")
    wanted = full[f"{module}.weight"].double().numpy()
    if first == "full":
        wanted = fold64(wanted, pair[f"{module}.A"], pair[f"{module}.B"], 1.5, multiplicative=True)
    found = tensors_of(tmp_path / "out")[f"{module}.weight"].double().numpy()
    assert abs(found - wanted).max() < WEIGHT_TOLERANCE
    warned = "takes the place of what" in capsys.readouterr().err
    assert warned == (first == "pair")


def test_a_bias_in_full_is_moved_by_its_own_adapter(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.bias"
    full = trained(llama, name)
    pair = ours(tmp_path / "adapter", full, biased_targets=True)
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    A, B = pair[name.replace("bias", "A")], pair[name.replace("bias", "B")]
    wanted = fold64(full[name].double().numpy()[:, None], A, B, 1.5, multiplicative=True)
    assert abs(tensors_of(tmp_path / "out")[name].double().numpy()[:, None] - wanted).max() < WEIGHT_TOLERANCE


def test_two_adapters_with_the_same_tensor_are_refused_unless_layers_part_them(llama: Path, tmp_path: Path) -> None:
    ours(tmp_path / "one", trained(llama, NORM, seed=1))
    ours(tmp_path / "two", trained(llama, NORM, seed=2))
    both = [tmp_path / "one", tmp_path / "two"]
    refused("one and .*two both have model.norm.weight, trained in full", llama, both, tmp_path / "o")
    merge(llama, both, tmp_path / "out", layers="0:2")
    assert bytes_of(tmp_path / "out")[NORM] == bytes_of(llama)[NORM]


def test_layers_take_the_tensors_of_these_layers(llama: Path, tmp_path: Path, capsys) -> None:
    inside, outside = "model.layers.1.input_layernorm.weight", "model.layers.2.input_layernorm.weight"
    full = trained(llama, inside, outside, EMBEDDING, HEAD)
    ours(tmp_path / "adapter", full)
    merge(llama, tmp_path / "adapter", tmp_path / "out", layers="1", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found[inside], full[inside].bfloat16())
    before = tensors_of(llama)
    assert all(torch.equal(found[name], before[name].bfloat16()) for name in (outside, EMBEDDING, HEAD))
    assert "left out by --layers: 5 modules" in capsys.readouterr().out
    assert merge(llama, tmp_path / "adapter", tmp_path / "half", layers="0", scale=0.5)  # nothing in full is left in


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"scale": 0.5}, "--scale 0.5: .* has model.norm.weight, which was trained in full"),
        ({"unmerge": True}, "--unmerge: .* has model.norm.weight, .*not in the adapter"),
    ],
)
def test_what_has_neither_strength_nor_inverse(llama: Path, tmp_path: Path, asked, words: str) -> None:
    ours(tmp_path / "adapter", trained(llama, NORM))
    refused(words, llama, tmp_path / "adapter", tmp_path / "out", **asked)


def test_tensors_the_base_has_not_or_otherwise_are_refused(llama: Path, tmp_path: Path) -> None:
    ours(tmp_path / "grown", {EMBEDDING: torch.ones(100, 32)})
    refused(
        "embed_tokens.weight was trained in full as 100 × 32; .*F32 96 × 32. Was the vocabulary",
        llama,
        tmp_path / "grown",
        tmp_path / "o",
    )
    ours(tmp_path / "strange", {"model.layers.9.norm.weight": torch.ones(32)})
    refused("layers.9.norm.weight was trained in full, and .* has no such", llama, tmp_path / "strange", tmp_path / "o")
    by_peft(llama, tmp_path / "peft", "lora", modules_to_save=["norm"])
    edit_json(tmp_path / "peft" / "adapter_config.json", modules_to_save=None)
    refused(r"7 tensors are no lora_A or lora_B of a module: .*norm.weight", llama, tmp_path / "peft", tmp_path / "o")


def test_a_tensor_that_is_there_twice_is_refused(llama: Path, tmp_path: Path) -> None:
    """With PEFT's prefix and without it: one of the two would be lost."""
    by_peft(llama, tmp_path / "adapter", "lora", modules_to_save=["lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[f"base_model.model.{HEAD}"] + 1}, file)
    refused("lm_head.weight is in the file more than once", llama, tmp_path / "adapter", tmp_path / "out")


def test_values_in_fp64_pass_the_check(tmp_path: Path, monkeypatch) -> None:
    """Just above the middle of two bf16 values, where fp32 is the middle itself: half a spacing and what fp32 lost."""
    monkeypatch.setattr(fold_check, "ROWS", VOCABULARY)
    base = make_base(tmp_path / "base", dtype="bfloat16")
    head = torch.full((VOCABULARY, 32), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    ours(tmp_path / "adapter", {HEAD: head})
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert ((tensors_of(tmp_path / "out")[HEAD].double() - head).abs() <= 2.0**-8 + 2.0**-40).all()


def test_other_values_than_the_adapters_are_found(llama: Path, tmp_path: Path, monkeypatch) -> None:
    ours(tmp_path / "adapter", trained(llama, HEAD))
    monkeypatch.setattr(maps.Replaced, "on", lambda *_: lambda W, first: W)
    with pytest.raises(UserError, match=r"lm_head\.weight deviates from the fold in fp64") as caught:
        merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert caught.value.exit_code == 3


def test_norms_that_peft_tunes_take_the_bases_place(llama: Path, tmp_path: Path) -> None:
    """LN_TUNING, which is nothing but norms in full."""
    config = LNTuningConfig(target_modules=["input_layernorm", "norm"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(llama), config)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    model.save_pretrained(str(tmp_path / "adapter"))
    found = load_adapter(tmp_path / "adapter").full
    assert len(found) == 4
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, merged[name]), name
        assert (name in found) == (not torch.equal(tensor, tensors_of(llama)[name])), name
    with pytest.raises(UserError, match="--unmerge"):
        merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
