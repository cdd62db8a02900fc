"""Bases that are stored under other names, or transposed, than the model runs. Oracle: stock PEFT on the running model."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.adapter.stored_form import CONV1D_MODULES, CONV1D_TYPES
from pipeline.artifacts.export.additive import additive_form
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold import match as fold_match
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.publishing import after_training
from tests.helpers.artifacts import VOCABULARY, bytes_of, fold64, hooked, load_model, logits, multiplicative, tensors_of

pytestmark = pytest.mark.usefixtures("small_blocks")

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
# model_type: its config, targets that are stored under another name, and what that is called.
RENAMED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "exaone": (SMALL, ["q_proj", "down_proj"], "transformer.h.0.mlp.c_proj.weight"),
    "hy_v3": (
        {**SMALL, **EXPERTS},
        ["shared_experts.down_proj", "o_proj"],
        "model.layers.1.mlp.shared_mlp.down_proj.weight",
    ),
    "laguna": (
        {**SMALL, **EXPERTS},
        ["shared_experts.up_proj", "o_proj"],
        "model.layers.1.mlp.shared_expert.up_proj.weight",
    ),
    "sarvam_moe": (
        {**SMALL, **EXPERTS},
        ["q_proj", "v_proj", "o_proj"],
        "model.layers.0.attention.query_key_value.weight",
    ),
    "hrm_text": (SMALL, ["up_proj", "k_proj", "o_proj"], "model.L_module.layers.0.attn.gqkv_proj.weight"),
    "nemotron_h": (SMALL, ["in_proj", "up_proj"], "backbone.layers.0.mixer.in_proj.weight"),
}


def loud(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() >= 2 and "router" not in name and "gate.weight" not in name:
                parameter *= 4
    return model.eval()


def random_model(model_type: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    return loud(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)))


def adapted(model: Any, folder: Path, **config: Any) -> torch.Tensor:
    """A LoRA on `model` by PEFT with random values, saved to `folder`; the live model's logits."""
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(peft.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(str(folder))
    return logits(peft.eval())


def close(found: torch.Tensor, live: torch.Tensor) -> bool:
    return bool((found - live).abs().max() < 3e-6 * max(10.0, float(live.abs().max())))


@pytest.mark.parametrize("model_type", RENAMED)
def test_weights_stored_under_other_names_are_folded(tmp_path: Path, model_type: str) -> None:
    """Each target of its own rank and alpha, so that pairs that meet in one tensor are told apart."""
    config, targets, name = RENAMED[model_type]
    random_model(model_type, config).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    before = logits(base)
    patterns = {"rank_pattern": {targets[0]: 2}, "alpha_pattern": {targets[0]: 5}}
    live = adapted(base, tmp_path / "adapter", target_modules=targets, **patterns)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found, stored = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "base")
    assert found.keys() == stored.keys()
    assert found[name] != stored[name]
    assert close(logits(load_model(tmp_path / "out")), live)
    assert (live - before).abs().max() > 1e-2
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    first = tensors_of(tmp_path / "base")
    assert all((tensor - first[key]).abs().max() < 1e-5 for key, tensor in tensors_of(tmp_path / "back").items())


QWEN = {"qwen3_5": {}, "qwen3_5_moe": EXPERTS | {"shared_expert_intermediate_size": 32}}


@pytest.mark.parametrize("model_type", QWEN)
def test_the_text_half_of_a_model_of_text_and_pictures(tmp_path: Path, model_type: str) -> None:
    """It is saved as ForConditionalGeneration, and trained as ForCausalLM. The fold keeps the folder's names."""
    sizes = {"hidden_size": 64, "num_heads": 4, "depth": 1, "intermediate_size": 64, "out_hidden_size": 64}
    config = AutoConfig.for_model(
        model_type,
        text_config={**SMALL, **QWEN[model_type], "layer_types": ["linear_attention", "full_attention"]},
        vision_config=sizes,
    )
    torch.manual_seed(7)
    whole = getattr(
        transformers, {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[model_type] + "ForConditionalGeneration"
    )
    loud(whole(config)).save_pretrained(tmp_path / "base")
    targets = ["o_proj", "out_proj", "in_proj_qkv"]
    live = adapted(load_model(tmp_path / "base"), tmp_path / "adapter", target_modules=targets)
    modules = load_adapter(tmp_path / "adapter").modules
    assert modules
    assert not any(f"{module}.weight" in tensors_of(tmp_path / "base") for module in modules)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert bytes_of(tmp_path / "out").keys() == bytes_of(tmp_path / "base").keys()
    assert close(logits(load_model(tmp_path / "out")), live)
    assert not close(logits(load_model(tmp_path / "base")), live)
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "peft", format="peft")
    assert load_adapter(tmp_path / "peft").modules == modules


def test_multiplicative_pairs_of_weights_that_lie_in_one_tensor(tmp_path: Path) -> None:
    """(I + s·B·A)·W of q and of v, each on its own rows of [q; k; v]: by hand in fp64; and the export's A' = A·W."""
    config, _, stored = RENAMED["sarvam_moe"]
    random_model("sarvam_moe", config).save_pretrained(tmp_path / "base")
    q, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    pairs = multiplicative(tmp_path / "adapter", {q: (64, 64), v: (32, 64)})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    W = tensors_of(tmp_path / "base")[stored].double().numpy()
    wanted = W.copy()
    for module, rows in ((q, slice(0, 64)), (v, slice(96, 128))):
        wanted[rows] = fold64(W[rows], pairs[f"{module}.A"], pairs[f"{module}.B"], 1.5, multiplicative=True)
    found = tensors_of(tmp_path / "out")[stored].double().numpy()
    assert abs(found - wanted).max() < 5e-6
    assert abs(wanted - W).max() > 1e-2
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "peft", format="peft")
    A = tensors_of(tmp_path / "peft")[f"base_model.model.{v}.lora_A.weight"].double()
    assert (A - pairs[f"{v}.A"].double() @ torch.from_numpy(W[96:128])).abs().max() < 5e-6


def test_a_family_that_is_no_pair_is_not_folded_into_a_part_of_a_tensor(tmp_path: Path) -> None:
    from peft import IA3Config

    config, _, _ = RENAMED["sarvam_moe"]
    random_model("sarvam_moe", config).save_pretrained(tmp_path / "base")
    peft = get_peft_model(load_model(tmp_path / "base"), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    peft.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"stores model.layers.0.self_attn.k_proj with other weights in .*query_key"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_no_fold_can_change_is_refused_before_the_training(tmp_path: Path) -> None:
    """--check with after_training = ['merge'], by the same function as the fold. Experts lie one by one on disk."""
    model = random_model("mixtral", {**SMALL, **EXPERTS})
    model.save_pretrained(tmp_path / "base")
    experts = [name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("experts.down_proj")]
    asked: dict[str, Any] = {"base": tmp_path / "base", "output_dir": tmp_path, "kind": "lora", "biased_targets": False}
    after_training.check(["merge"], targets=["model.layers.0.self_attn.q_proj"], **asked)
    with pytest.raises(
        UserError, match=r"after_training: 'merge' cannot be done: .* stores .*experts.* in another form"
    ):
        after_training.check(["merge"], targets=[f"{experts[0]}.gate"], **asked)
    with pytest.raises(UserError, match=r"'export:peft' cannot be done: .* in another form"):
        after_training.check(["export:peft"], targets=[f"{experts[0]}.gate"], **asked)
    with pytest.raises(UserError, match=r"stores model.layers.7.norm.weight in another form"):
        fold_match.check_names(read_base(tmp_path / "base"), [], ["model.layers.7.norm.weight"])


GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("says", [True, False], ids=["fan_in_fan_out", "not fan_in_fan_out"])
@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "c_proj", "c_fc"]], ids=["square", "all"])
def test_the_base_says_how_its_weights_are_stored(tmp_path: Path, says: bool, targets: list[str]) -> None:
    """Of Conv1D [D_in, D_out]; what a foreign adapter's configuration says is not asked, as in PEFT."""
    random_model("gpt2", GPT2).save_pretrained(tmp_path / "base")
    live = adapted(load_model(tmp_path / "base"), tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": says}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
    assert not close(logits(load_model(tmp_path / "base")), live)


def test_a_linear_base_is_not_transposed_by_a_word(tmp_path: Path) -> None:
    random_model("llama", SMALL).save_pretrained(tmp_path / "base")
    live = adapted(load_model(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)


def test_a_multiplicative_pair_on_a_transposed_weight(tmp_path: Path) -> None:
    """The bias too; taken out again, the base; an additive form, which would need A·W, is refused."""
    random_model("gpt2", GPT2).save_pretrained(tmp_path / "base")
    modules = {"transformer.h.0.attn.c_attn": (192, 64), "transformer.h.1.mlp.c_proj": (64, 256)}
    tensors = multiplicative(tmp_path / "adapter", modules, biased_targets=True)
    model = load_model(tmp_path / "base")
    with hooked(model, tensors, 6 / 4, multiplicative=True):
        live = logits(model)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
    assert not close(logits(model), live)
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    assert close(logits(load_model(tmp_path / "back")), logits(model))
    with pytest.raises(UserError, match=r"transposed \(Conv1D\): of a multiplicative adapter there no additive form"):
        additive_form(read_base(tmp_path / "base"), load_adapter(tmp_path / "adapter"), kind=None, dtype="F32")


@pytest.mark.slow
def test_every_model_with_conv1d_is_known() -> None:
    """Read from transformers' source, so that a new one is noticed."""
    models = Path(transformers.__file__).parent / "models"
    users, names = set(), set()
    for file in models.glob("*/modeling_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Call(func=ast.Name(id="Conv1D"))):
                    users.add(file.parent.name)
                    names.add(name)
    assert users == {"gpt2", "openai", "imagegpt", "decision_transformer", "clvp"}
    assert names == set(CONV1D_MODULES)
    assert set(CONV1D_TYPES) == {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}


def test_names_that_are_in_the_folder_ask_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.artifacts.adapter import stored_form

    random_model("llama", SMALL).save_pretrained(tmp_path / "base")
    adapted(load_model(tmp_path / "base"), tmp_path / "adapter", target_modules=["down_proj"])
    monkeypatch.setattr(stored_form, "stored_names", lambda base: pytest.fail("transformers was asked"))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_that_automodel_saved(tmp_path: Path, tied: bool) -> None:
    """Without the prefix `model.`; a head of its own it has not saved, so that only a tied one is whole."""
    random_model("llama", {**SMALL, "tie_word_embeddings": tied}).save_pretrained(tmp_path / "base")
    live = adapted(load_model(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    file = tmp_path / "base" / "model.safetensors"
    save_file({n.removeprefix("model."): t for n, t in load_file(file).items()}, file, {"format": "pt"})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
