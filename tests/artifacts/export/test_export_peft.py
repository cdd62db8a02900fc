"""The PEFT export: stock PEFT loads, runs and merges it, and computes what the adapter computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.export import additive
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats import safetensors
from tests.helpers.artifacts import (
    FACTS,
    down_proj,
    hooked,
    load_model,
    logits,
    make_base,
    multiplicative,
    random_tensors,
    tensors_of,
)

# fp32, three layers of width 32 to 48: a few hundred roundings of 6e-8, most of which cancel. A wrong adapter is at 1e-2.
RELATIVE = 1e-5
OUTPUTS = {**down_proj(), **{f"model.layers.{i}.self_attn.o_proj": (32, 32) for i in range(3)}}
BIASED = {**down_proj(), "model.layers.1.self_attn.v_proj": (16, 32)}  # mlp_bias: v_proj has none


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows of 48: matrices of 32 rows fall into three and a rest, as real ones do at the real size."""
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 500)
    monkeypatch.setattr(additive, "BLOCK_ITEMS", 10)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "llama", mlp_bias=True)


@pytest.fixture(scope="module")
def cohere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "cohere", "cohere", shard="20KB")


def by_peft(base: Path, adapter: Path) -> Any:
    """The adapter on the base, both by PEFT and transformers alone."""
    return PeftModel.from_pretrained(load_model(base), str(adapter)).eval()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("modules", [down_proj(), OUTPUTS], ids=["down_proj", "down_proj and o_proj"])
def test_peft_computes_what_the_multiplicative_adapter_does(cohere: Path, tmp_path: Path, modules: dict) -> None:
    """Against hooks on the outputs, and against stock PEFT's own PEANUT on the adapter as it was trained."""
    tensors = multiplicative(tmp_path / "adapter", modules)
    export(cohere, tmp_path / "adapter", tmp_path / "out", format="peft")
    with hooked(model := load_model(cohere), tensors, 1.5, multiplicative=True):
        expected = logits(model)
    exported = by_peft(cohere, tmp_path / "out")
    assert distance(logits(exported), expected) < RELATIVE
    assert distance(logits(by_peft(cohere, tmp_path / "adapter")), expected) < RELATIVE
    assert distance(logits(exported.merge_and_unload()), expected) < RELATIVE
    assert distance(logits(load_model(cohere)), expected) > 1e-2


@pytest.mark.parametrize("modules", [down_proj(), BIASED], ids=["all biased", "one without"])
def test_a_moved_bias_is_the_bias_of_lora_B(llama: Path, tmp_path: Path, modules: dict) -> None:
    tensors = multiplicative(tmp_path / "adapter", modules, biased_targets=True)
    export(llama, tmp_path / "adapter", tmp_path / "out", format="peft")
    with hooked(model := load_model(llama), tensors, 1.5, multiplicative=True):
        expected = logits(model)
    exported = by_peft(llama, tmp_path / "out")
    assert distance(logits(exported), expected) < RELATIVE
    stored, before = tensors_of(tmp_path / "out"), tensors_of(llama)
    for module in down_proj():
        A, B, b = (t.double() for t in (tensors[f"{module}.A"], tensors[f"{module}.B"], before[f"{module}.bias"]))
        c = stored[f"base_model.model.{module}.lora_B.bias"].double()
        assert (c - B @ A @ b).abs().max() < 1e-6
        assert c.abs().max() > 1e-2
    if modules is BIASED:
        assert not stored["base_model.model.model.layers.1.self_attn.v_proj.lora_B.bias"].any()
    else:
        assert distance(logits(exported.merge_and_unload()), expected) < RELATIVE


def test_biases_that_are_zero_or_not_moved_leave_no_trace(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = make_base(tmp_path / "base", mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias.data.zero_()
    model.save_pretrained(base)
    multiplicative(tmp_path / "adapter", biased_targets=True)
    export(base, tmp_path / "adapter", tmp_path / "out", format="peft")
    assert not [name for name in tensors_of(tmp_path / "out") if name.endswith("bias")]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_bias"] is False


ADDITIVE: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "ranks and alphas that differ": {
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8},
        "alpha_pattern": {"q_proj": 11, r"layers\.2\.mlp.*": 3},
    },
}


@pytest.mark.parametrize("case", ADDITIVE)
def test_an_additive_adapter_is_the_same_function_with_one_rank_and_one_alpha(
    llama: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM reads it: the same alpha / r for every module, whatever the shapes. No weight of the base is read."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj", "q_proj"], **ADDITIVE[case])
    model = get_peft_model(load_model(llama), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = logits(model)

    def unread(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors, "read_pieces", unread)
    export(llama, tmp_path / "adapter", tmp_path / "out", format="peft", kind="lora")
    monkeypatch.undo()
    assert distance(logits(by_peft(llama, tmp_path / "out")), expected) < RELATIVE
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not written["use_rslora"]
    assert "rank_pattern" not in written
    assert "alpha_pattern" not in written
    deltas = {
        name: module.get_delta_weight("default")
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    stored = tensors_of(tmp_path / "out")
    assert len(stored) == 2 * len(deltas) == 12
    for name, delta in deltas.items():
        A, B = (stored[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert len(A) == written["r"]
        assert (written["lora_alpha"] / written["r"] * (B @ A) - delta).abs().max() < 1e-6


def test_a_founding_methods_adapter_with_patterns_keeps_biases_and_strengths(llama: Path, tmp_path: Path) -> None:
    """Type LORA with A of rank × out_features; ranks 4 and 2, s = 6/4 and 1/2, on modules with biases."""
    low, high = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"
    tensors = random_tensors({high: (32, 48)}, 4, multiplicative=True)
    narrow = random_tensors({low: (32, 48)}, 2, multiplicative=True, seed=1)
    named = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": t for n, t in {**tensors, **narrow}.items()}
    (tmp_path / "adapter").mkdir()
    save_file(named, tmp_path / "adapter" / "adapter_model.safetensors")
    patterns = {"rank_pattern": {r"layers\.1\.mlp.*": 2}, "alpha_pattern": {r"layers\.1\.mlp.*": 1}}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["down_proj"], **patterns}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    export(llama, tmp_path / "adapter", tmp_path / "out", format="peft")
    model = load_model(llama)
    with hooked(model, tensors, 1.5, multiplicative=True), hooked(model, narrow, 0.5, multiplicative=True):
        expected = logits(model)
    assert distance(logits(by_peft(llama, tmp_path / "out")), expected) < RELATIVE


def test_our_own_programs_read_the_export_and_fold_it_to_the_same_model(cohere: Path, tmp_path: Path) -> None:
    """On square weights as well, where the shapes could not tell which kind it is."""
    multiplicative(tmp_path / "adapter", OUTPUTS, base_model="owner/name", train_logit_scale=2.0)
    export(cohere, tmp_path / "adapter", tmp_path / "out", format="peft")
    adapter = load_adapter(tmp_path / "out")
    assert (adapter.kind, adapter.base_model, adapter.train_logit_scale) == ("lora", "owner/name", 2.0)
    merge(cohere, tmp_path / "adapter", tmp_path / "folded")
    merge(cohere, tmp_path / "out", tmp_path / "folded_from_export")
    expected = tensors_of(tmp_path / "folded")
    for name, tensor in tensors_of(tmp_path / "folded_from_export").items():
        assert (tensor - expected[name]).abs().max() < 3e-6, (
            name
        )  # 52 products of the size of 1 · 2⁻²⁴, as in test_merge


@pytest.mark.parametrize(("dtype", "half_step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_sixteen_bit_results_are_rounded_once(cohere: Path, tmp_path: Path, dtype: str, half_step: float) -> None:
    tensors = multiplicative(tmp_path / "adapter")
    export(cohere, tmp_path / "adapter", tmp_path / "out", format="peft", dtype=dtype)
    before = tensors_of(cohere)
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert tensor.dtype == getattr(torch, dtype)
        module, letter = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        exact = tensors[f"{module}.{letter}"].double()
        if letter == "A":
            exact = exact @ before[f"{module}.weight"].double()
        # Half a step of the dtype, and what fp32 left of 32 products (relative to the largest, below which they cancel).
        allowed = half_step * exact.abs() + 2**-20 * exact.abs().max()
        assert ((tensor.double() - exact).abs() <= allowed).all()


def test_of_the_base_only_the_targets_are_read(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    pieces = safetensors.read_pieces

    def counted(tensor: Any, size: int) -> Any:
        read.append(tensor.name)
        return pieces(tensor, size)

    monkeypatch.setattr(safetensors, "read_pieces", counted)
    chosen = {"model.layers.1.mlp.down_proj": (32, 48)}
    multiplicative(tmp_path / "adapter", chosen, biased_targets=True)
    export(llama, tmp_path / "adapter", tmp_path / "out", format="peft")
    assert sorted(read) == ["model.layers.1.mlp.down_proj.bias", "model.layers.1.mlp.down_proj.weight"]


def test_a_value_too_large_for_the_dtype_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = {
        n: t * (1e6 if n.endswith("A") else 1) for n, t in random_tensors(down_proj(), 4, multiplicative=True).items()
    }
    save_adapter(tmp_path / "adapter", tensors, kind="multiplicative_lora", rank=4, alpha=4, **FACTS)
    with pytest.raises(UserError, match=r"A' of .*does not fit.*F16"):
        export(base, tmp_path / "adapter", tmp_path / "out", format="peft", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
