"""The fold's numbers: PEFT's merge_and_unload for additive adapters, fp64 by hand and hooks for multiplicative ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeanutConfig, get_peft_model
from transformers import GenerationConfig

from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold.merge import merge
from pipeline.formats.choices import OUTPUT_DTYPES, OutputDtype
from tests.helpers.artifacts import (
    FACTS,
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

pytestmark = pytest.mark.usefixtures("small_blocks")

# Logits of about 1 after three layers in fp32: rounding is below 1e-6, a wrong adapter is above 1e-2.
LOGIT_TOLERANCE = 1e-5
# Weights of about 0.1 to 1, changed by sums of at most 48 + 4 products of the same size: 52·2⁻²⁴ ≈ 3e-6.
WEIGHT_TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "llama", mlp_bias=True)


@pytest.fixture(scope="module")
def cohere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "cohere", "cohere", shard="20KB")


ADDITIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "target_modules": ["down_proj", "q_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        "alpha_pattern": {"q_proj": 11, r"layers\.2\.mlp.*": 3},
    },
    "patterns and rsLoRA": {"use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("case", ADDITIVE)
def test_additive_adapters_against_peft(request, tmp_path: Path, family: str, case: str) -> None:
    base = request.getfixturevalue(family)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["down_proj", "v_proj"], **ADDITIVE[case]})
    model = get_peft_model(load_model(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors_of(base).keys()
    changed = 0
    for name, before in tensors_of(base).items():
        assert (found[name] - expected[name]).abs().max() < WEIGHT_TOLERANCE, name
        changed += not torch.equal(found[name], before)
    assert changed == sum("lora_A" in name for name in tensors_of(tmp_path / "adapter"))


@pytest.mark.parametrize("family", ["llama", "cohere"])
@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_multiplicative_adapters_against_hooks_and_fp64(request, tmp_path: Path, family: str, scale: float) -> None:
    """llama has biases on its MLP here: the fold moves them too, or the hooks would give other logits."""
    base = request.getfixturevalue(family)
    tensors = multiplicative(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", scale=scale)
    with hooked(model := load_model(base), tensors, 1.5 * scale, multiplicative=True):
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    folded = 0
    for module in down_proj():
        for name in (f"{module}.weight", f"{module}.bias"):
            if name in before:
                W, A, B = before[name].double().numpy(), tensors[f"{module}.A"], tensors[f"{module}.B"]
                by_hand = fold64(W, A, B, 1.5 * scale, multiplicative=True)
                assert np.abs(after[name].double().numpy() - by_hand).max() < WEIGHT_TOLERANCE
                assert np.abs(W - by_hand).max() > 1e-3
                folded += 1
    assert folded == (6 if family == "llama" else 3)


def test_our_additive_adapter_on_square_weights_needs_no_kind(llama: Path, tmp_path: Path) -> None:
    tensors = random_tensors({"model.layers.1.self_attn.q_proj": (32, 32)}, 4, multiplicative=False)
    save_adapter(tmp_path / "adapter", tensors, kind="lora", rank=4, alpha=4, **FACTS)
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    with hooked(model := load_model(llama), tensors, 1.0, multiplicative=False):
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE


def test_a_peanut_adapter_by_stock_peft_folds_as_peft_merges_it(llama: Path, tmp_path: Path) -> None:
    """PEFT leaves the bias as it is: that was the function trained, so it is the one folded."""
    config = PeanutConfig(r=4, scaling=0.7, act_fn="linear", depth=0, target_modules=["down_proj"], init_weights=False)
    model = get_peft_model(load_model(llama), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    expected = model.merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - expected[name]).abs().max() < WEIGHT_TOLERANCE, name
        assert torch.equal(tensor, tensors_of(llama)[name]) != name.endswith("down_proj.weight")


@pytest.mark.parametrize("saved_as", ["safetensors", "bin"])
def test_the_founding_methods_adapters_are_recognised_by_shape(llama: Path, tmp_path: Path, saved_as: str) -> None:
    """Type LORA, lora_A of shape rank × out_features, as the hacked PEFT of qlora-pipe wrote it."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj"])
    get_peft_model(load_model(llama), config).save_pretrained(str(tmp_path / "adapter"))
    tensors = random_tensors(down_proj(), 4, multiplicative=True)
    named = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": t.bfloat16() for n, t in tensors.items()}
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    if saved_as == "bin":
        torch.save(named, tmp_path / "adapter" / "adapter_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(named, tmp_path / "adapter" / "adapter_model.safetensors")
    merge(llama, tmp_path / "adapter", tmp_path / "out")
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    with hooked(model := load_model(llama), rounded, 1.5, multiplicative=True):
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everything_else_is_copied_byte_for_byte(tmp_path: Path, shard: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, shard=shard)
    multiplicative(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = bytes_of(base), bytes_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {n for n in before if before[n] != after[n]} == {f"{module}.weight" for module in down_proj()}
    assert all(before[name][:2] == after[name][:2] for name in before)
    files = {path.name for path in base.iterdir()} - {"pytorch_model.bin"} | {"fold_report.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for name in files:
        if not name.endswith((".safetensors", "fold_report.json")):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    headers = [
        [
            path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
            for path in sorted(folder.glob("*.safe*s"))
        ]
        for folder in (base, tmp_path / "out")
    ]
    for one, other in zip(*headers, strict=True):
        assert json.loads(one) == json.loads(other)  # names, places and file metadata
    assert len(headers[0]) == (1 if shard == "50GB" else len(headers[0]))
    assert shard == "50GB" or len(headers[0]) > 2


@pytest.mark.parametrize("dtype", OUTPUT_DTYPES[1:])
def test_another_dtype_for_every_float(tmp_path: Path, dtype: OutputDtype) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", shard="10KB")
    tensors = multiplicative(tmp_path / "adapter")
    edit_json(base / "config.json", extra={"torch_dtype": "bfloat16", "rope_dtype": "bfloat16"})
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    wanted = getattr(torch, dtype)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        assert after[name].dtype == wanted
        if "down_proj" not in name:
            assert torch.equal(after[name], tensor.to(wanted))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["extra"]["torch_dtype"] == dtype
    assert config["extra"]["rope_dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    model = load_model(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    with hooked(original := load_model(base), tensors, 1.5, multiplicative=True):
        expected = logits(original)
    # The weights' last rounding, 2⁻⁸ (bf16) or 2⁻¹¹ (fp16) of each, reaches logits of about 1 through three layers.
    tolerance = {"bfloat16": 2e-2, "float16": 3e-3, "float32": LOGIT_TOLERANCE}[dtype]
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < tolerance


def test_a_config_that_names_no_dtype_gets_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps(config))
    multiplicative(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert load_model(tmp_path / "out", dtype="auto").dtype == torch.float16


@pytest.mark.parametrize("keep", [True, False])
def test_the_training_logit_scale_is_kept_or_dropped(cohere: Path, tmp_path: Path, capsys, keep: bool) -> None:
    tensors = multiplicative(tmp_path / "adapter", train_logit_scale=1.1)
    merge(cohere, tmp_path / "adapter", tmp_path / "out", keep_logit_scale=keep)
    with hooked(model := load_model(cohere), tensors, 1.5, multiplicative=True):
        expected = logits(model) * (1.1 if keep else 1.0)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["logit_scale"] == pytest.approx(0.06875 if keep else 0.0625)
    said = capsys.readouterr().out
    assert (
        "logits times 1.1; kept: logit_scale 0.0625 → 0.06875" in said
        if keep
        else "writes logit_scale = 0.06875" in said
    )


def test_granite_divides_its_logits_so_the_scale_is_kept_by_dividing(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    from tests.helpers.artifacts import LLAMA

    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=4.0)).save_pretrained(tmp_path / "base")
    tensors = multiplicative(tmp_path / "adapter", train_logit_scale=0.9)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", keep_logit_scale=True)
    with hooked(model := load_model(tmp_path / "base"), tensors, 1.5, multiplicative=True):
        expected = 0.9 * logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE


def test_the_formula_is_printed_with_its_numbers(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    multiplicative(tmp_path / "adapter")
    merge(llama, tmp_path / "adapter", tmp_path / "out", scale=0.5)
    said = capsys.readouterr().out
    assert "W' = W + s·B·(A·W) in fp32, s = alpha / rank = 6 / 4 × 0.5 (--scale) = 0.75" in said
    assert "3 weights and 3 biases (b' = b + s·B·A·b)" in said


def test_a_peft_user_can_go_on_from_the_result(llama: Path, tmp_path: Path) -> None:
    """What came out is an ordinary model: it takes another adapter and folds again."""
    first = multiplicative(tmp_path / "one")
    merge(llama, tmp_path / "one", tmp_path / "out")
    second = multiplicative(tmp_path / "two", size=0.1)
    merge(tmp_path / "out", tmp_path / "two", tmp_path / "again")
    with (
        hooked(model := load_model(llama), first, 1.5, multiplicative=True),
        hooked(model, second, 1.5, multiplicative=True),
    ):
        expected = logits(model)
    assert (logits(load_model(tmp_path / "again")) - expected).abs().max() < LOGIT_TOLERANCE


@pytest.mark.parametrize("has_file", [True, False])
def test_where_turns_end_is_where_the_merged_model_stops(
    llama: Path, tmp_path: Path, has_file: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """ChatML on a base model: the end of a turn that was learnt comes beside the base's own stops."""
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "generation_config.json").unlink(missing_ok=True)
    edit_json(base / "config.json", eos_token_id=2, bos_token_id=1, pad_token_id=None)
    if has_file:
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    multiplicative(tmp_path / "adapter", stops=[7, 2])
    merge(base, [tmp_path / "adapter"], tmp_path / "merged")
    assert "stops    eos_token_id in generation_config.json gets 7 too" in capsys.readouterr().out
    found = json.loads((tmp_path / "merged/generation_config.json").read_text())
    wanted = (
        {"eos_token_id": [2, 3, 7], "temperature": 0.6} if has_file else {"bos_token_id": 1, "eos_token_id": [2, 7]}
    )
    assert found == wanted
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == wanted["eos_token_id"]
    merge(tmp_path / "merged", [tmp_path / "adapter"], tmp_path / "again", unmerge=True)
    assert json.loads((tmp_path / "again/generation_config.json").read_text()) == wanted  # it is no weight
