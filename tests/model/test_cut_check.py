"""A model is tried out on a tiny copy before a weight is read: what its stages and adapters would get wrong is refused."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model import cut_check, tiny_copy
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.stage import Stage, empty_model
from pipeline.model.structure import build
from pipeline.model.structure.stand_ins import Arrival
from pipeline.model.unsupported import named, router_loss
from pipeline.training.start import prepare, resolve
from pipeline.training.start.resolved import Resolved
from tests.helpers.builders import model_config, save_model
from tests.helpers.configs import small

TWO, FOUR = [(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]


def config_of(kind: str, layers: int = 4, **changes: Any) -> Any:
    """A family's own sizes, of billions of parameters, with few layers."""
    return AutoConfig.for_model(kind, num_hidden_layers=layers, **changes)


def saved_config(folder: Path, config: Any, **changes: Any) -> Any:
    """A run's configuration over a folder that holds config.json alone."""
    config.save_pretrained(folder)
    return loading.validate(small(model=str(folder), model_weight_dtype="float32", **changes), "x.toml")


# The cut


def test_a_norm_before_the_first_layer_runs_once() -> None:
    """nanochat runs its final norm there too: stages that all did it were silently wrong."""
    for ranges in ([(0, 4)], TWO, FOUR, [(0, 3), (3, 4)]):
        cut_check.check(config_of("nanochat"), ranges)


def test_more_than_one_hidden_state_between_layers_is_found() -> None:
    """inkling2's layers are given the states of all blocks before, which the model's own code puts together."""
    config = config_of("inkling2_text", n_layers_per_attn_res_block=2)
    for ranges in ([(0, 4)], TWO):  # before the first block that is kept, and where one begins
        cut_check.check(config, ranges)
    for ranges in (FOUR, [(0, 3), (3, 4)]):
        with pytest.raises(UserError, match=r"'inkling2_text' cannot be cut.*differ.*pipeline_stages = 1"):
            cut_check.check(config, ranges)


@pytest.mark.parametrize("kind", ["cohere", "gemma2", "granite", "qwen3_moe", "mixtral"])
def test_real_sizes_are_tried_in_a_copy_of_a_few_million_weights(kind: str) -> None:
    config = config_of(kind, layers=6)
    assert sum(p.numel() for p in empty_model(config, torch.bfloat16, None).parameters()) > 500e6
    cut_check.check(config, [(0, 1), (1, 5), (5, 6)])
    copy, _ = tiny_copy.tiny_copy(config)
    assert sum(p.numel() for p in copy.parameters()) < 50e6
    assert len(copy.base_model.layers) == 6, "the config itself is as it was"
    assert config.vocab_size > 1000, "the config itself is as it was"


def test_what_the_stage_of_training_does_is_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these makes `Stage` compute something else for one family."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match="'granite' cannot be cut"):
        patch.setattr(Arrival, "hidden", lambda self, given: given)  # granite multiplies what it is given
        cut_check.check(config_of("granite", embedding_multiplier=3.0), TWO)
    forward = Stage.forward
    monkeypatch.setattr(Stage, "forward", lambda self, inputs: forward(self, (inputs[0], inputs[1] + 1)))
    cut_check.check(config_of("cohere"), [(0, 4)])  # RoPE knows differences only
    monkeypatch.setattr(Stage, "forward", lambda self, inputs: forward(self, (inputs[0], inputs[1] * 2)))
    with pytest.raises(UserError, match="'cohere' changes its logits"):
        cut_check.check(config_of("cohere"), [(0, 4)])


def test_windows_are_shorter_than_the_copys_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its attention_type a pass-through in front changes the masks of gemma2."""
    config = config_of("gemma2", layer_types=["sliding_attention", "full_attention"] * 2)
    cut_check.check(config, TWO)
    before = tiny_copy.tiny_copy(config)[1]
    config.sliding_window = 4
    assert not torch.equal(before, tiny_copy.tiny_copy(config)[1])


def test_logits_that_are_not_what_the_config_says_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_check, "logit_transform", lambda config: build.LogitTransform())
    for ranges in ([(0, 4)], TWO):
        with pytest.raises(UserError, match="'cohere' changes its logits in a way"):
            cut_check.check(config_of("cohere", logit_scale=0.3), ranges)


@pytest.mark.parametrize("kind", ["zaya", "hy_v4"])
def test_more_than_a_hidden_state_between_layers_is_a_refusal(kind: str) -> None:
    cut_check.check(config_of(kind), [(0, 4)])
    with pytest.raises(
        UserError, match=rf"'{kind}' cannot be cut into stages here: .*a second tensor.*pipeline_stages = 1"
    ):
        cut_check.check(config_of(kind), TWO)


@pytest.mark.slow
def test_a_family_without_a_tiny_copy_is_not_cut_and_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    """It takes the hidden state of another model."""
    config = AutoConfig.for_model("gemma4_unified_assistant")
    with pytest.raises(
        UserError, match=r"'gemma4_unified_assistant': no tiny copy.*inputs_embeds.*pipeline_stages = 1"
    ):
        cut_check.check(config, [(0, 10), (10, 30)])
    cut_check.check(config, [(0, 30)])
    assert "warning: model_type 'gemma4_unified_assistant': no tiny copy" in capsys.readouterr().err


def test_nothing_of_a_copy_is_the_identity_and_what_is_tied_is_one() -> None:
    copy, logits = tiny_copy.tiny_copy(model_config("cohere2"))
    assert all(float(p.std()) > 0.01 for p in copy.parameters())
    assert copy.get_output_embeddings().weight is copy.base_model.embed_tokens.weight
    assert torch.equal(copy(input_ids=tiny_copy.token_ids()).logits, logits)


def test_a_copy_that_was_observed_is_the_one_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = model_config("llama", layers=3), []
    make = tiny_copy._made
    monkeypatch.setattr(tiny_copy, "_made", lambda config: made.append(1) or make(config))
    whole, logits = make(config)
    empty_model(deepcopy(config), torch.bfloat16, None)
    cut_check.check(config, [(0, 1), (1, 3)])
    assert len(made) == 1
    again, same = tiny_copy.tiny_copy(config)  # nobody else's
    assert len(made) == 2
    assert torch.equal(logits, same)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_layer_of_experts_is_never_in_memory() -> None:
    """glm4_moe's experts are one parameter of 128 × 1408 × 2 × 4096; deepseek_v3's would be 30 GB, for a moment, each."""
    seen: list[bool] = []
    register = nn.Module.register_parameter

    def spy(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.numel() >= build.LARGE:
            seen.append(parameter.is_meta)
        register(module, name, parameter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", spy)
        model = empty_model(config_of("glm4_moe"), torch.bfloat16, None)
    assert seen
    assert all(seen)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


# Adapters


def plan(folder: Path, config: Any, **changes: Any) -> Resolved:
    return resolve.resolve(saved_config(folder, config, **changes))


def tiny_config(kind: str, layers: int = 4, **changes: Any) -> Any:
    return tiny_copy.tiny_copy(config_of(kind, layers, **changes))[0].config


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("phimoe", set()),  # its router computes something else than a linear module
        ("qwen2_moe", {"mlp.shared_expert_gate"}),
        ("deepseek_v32", {f"self_attn.indexer.{name}" for name in ("wq_b", "wk", "weights_proj")}),
        ("jetmoe", {"mlp.router.layer", "self_attention.experts.router.layer"}),
    ],
)
def test_all_linear_leaves_out_what_only_chooses(
    kind: str, left_out: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan(tmp_path, tiny_config(kind), adapter_type="lora")
    within = {name.split(".", 3)[3] for name in made.trained.targets}
    assert within
    assert not within & left_out
    assert not any("router" in n or "indexer" in n or n == "gate" for n in within)
    said = capsys.readouterr().out
    assert all(name in said for name in left_out)
    assert ("which only choose" in said) == bool(left_out)


def test_an_adapter_that_gets_no_gradient_is_refused(tmp_path: Path) -> None:
    """The indexer of sparse attention only chooses keys."""
    with pytest.raises(
        UserError, match=r"target_modules: an adapter in model.layers.\*.self_attn.indexer.wk gets no gradient"
    ):
        plan(tmp_path, tiny_config("deepseek_v32"), target_modules=["wk", "o_proj"], pipeline_stages=1)


def test_a_module_that_is_linear_in_name_only_is_told_by_its_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no linear module 'router'.*it is a PhimoeTopKRouter"):
        plan(tmp_path, tiny_config("phimoe"), target_modules=["router"])


@pytest.mark.parametrize("kind", ["glm4_moe", "qwen3_next"])
@pytest.mark.parametrize("names", [["down_proj"], ["gate_proj", "up_proj", "down_proj"], "all-linear"], ids=str)
def test_lora_is_in_the_modules_that_are_named(kind: str, names: Any) -> None:
    """PEFT, which knows the model's type, puts it into the experts' parameters instead."""
    model, _ = tiny_copy.tiny_copy(config_of(kind))
    targets = resolve_targets(model, names, [0, 1, 2, 3])
    stage = Stage(model.requires_grad_(False), 1, 4)
    inject_lora(stage, targets, 2, 4.0, 0.0, torch.float32, 0)
    mine = {name for name in targets if not name.startswith("model.layers.0.")}
    assert mine
    assert {name.rpartition(".")[0] for name in trainable(stage)} == mine


def test_the_workaround_is_still_needed() -> None:
    """Given the whole model, PEFT 0.21.2 puts no adapter into a glm4_moe's down_proj. Once it does: one call."""
    model, _ = tiny_copy.tiny_copy(config_of("glm4_moe"))
    target = "model.layers.0.mlp.down_proj"
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[target]), model)
    assert not hasattr(model.get_submodule(target), "lora_A")


def test_a_target_that_peft_passes_over_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inject = peft.inject_adapter_in_model

    def all_but_one(config: Any, model: nn.Module) -> None:
        config.target_modules = set(sorted(config.target_modules)[1:])
        inject(config, model)

    monkeypatch.setattr(peft, "inject_adapter_in_model", all_but_one)
    model, _ = tiny_copy.tiny_copy(model_config("llama"))
    targets = resolve_targets(model, ["o_proj"], [0, 1, 2, 3])
    with pytest.raises(UserError, match=r"target_modules: PEFT puts no adapter into model.layers.0.self_attn.o_proj"):
        inject_lora(Stage(model, 0, 4), targets, 2, 4.0, 0.0, torch.float32, 0)


# What is said


def test_layers_and_weights_without_an_adapter_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of six layers, three are mixtures, whose experts the family does not reach; layer 0 is not chosen."""
    config = tiny_config("qwen2_moe", layers=6, mlp_only_layers=[0, 2, 4])
    keys = {"adapter_type": "lora", "target_modules": ["down_proj"], "layers_to_transform": "1:5", "pipeline_stages": 1}
    made = plan(tmp_path, config, **keys)
    assert [name.removeprefix("model.layers.") for name in made.trained.targets] == [
        "1.mlp.shared_expert.down_proj",
        "2.mlp.down_proj",
        "3.mlp.shared_expert.down_proj",
        "4.mlp.down_proj",
        "5.mlp.shared_expert.down_proj",
    ]
    said = capsys.readouterr().out
    assert "in 3 of 5 layers: mlp.shared_expert.down_proj; in 2 of 5 layers: mlp.down_proj" in said
    layers = dict(made.meta_model.shared.base_model.layers.named_parameters())
    held = sum(p.numel() for name, p in layers.items() if name.endswith("down_proj.weight") and name[0] != "0")
    share = 100 * held / sum(p.numel() for p in layers.values())
    assert f"on {share:.3g} % of the weights of all layers" in said
    assert share < 10


def test_layers_that_have_no_such_module_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(tmp_path, tiny_config("mimo_v2_flash"), target_modules=["down_proj"], pipeline_stages=1)
    said = capsys.readouterr().out
    assert [name.removeprefix("model.layers.") for name in made.trained.targets] == [
        "0.mlp.down_proj",
        *(f"{layer}.mlp.experts" for layer in (1, 2, 3)),
    ]
    assert "in 3 of 4 layers: mlp.experts; in 1 of 4 layers: mlp.down_proj" in said


def test_routers_whose_loss_the_config_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = tiny_config("mixtral")
    plan(tmp_path / "quiet", quiet, target_modules=["o_proj"])
    assert quiet.router_aux_loss_coef
    assert not capsys.readouterr().err
    asked = tiny_config("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    assert plan(tmp_path / "asked", asked, target_modules=["o_proj"]).router_loss == 0.5
    assert not capsys.readouterr().err
    assert router_loss(config_of("mixtral", output_router_logits=True, router_aux_loss_coef=0.0)) is None
    assert "router_aux_loss_coef = 0.5), which is not trained" in (router_loss(asked) or "")


# Errors


def test_whatever_is_raised_while_a_model_is_looked_at_is_one_message() -> None:
    with (
        pytest.raises(UserError, match=r"model_type 'own': looking fails: KeyError: 'x' \(test_cut_check.py:\d+\)"),
        named("own", "looking"),
    ):
        {}["x"]
    with pytest.raises(UserError, match=r"^as it is$"), named("own", "looking"):
        raise UserError("as it is")
    with pytest.raises(MemoryError), named("own", "looking"):
        raise MemoryError


def test_a_config_that_transformers_cannot_build_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_type 'nemotron': transformers cannot build it: TypeError"):
        plan(tmp_path, config_of("nemotron"))  # whose keys and values have no number of heads


def test_a_mixture_whose_experts_are_not_there_is_refused_before_it_is_quantised(tmp_path: Path) -> None:
    """Its experts are stored one by one, and one of them is missing; the attention alone is most of this one's weights."""
    model, _ = tiny_copy.tiny_copy(config_of("glm4_moe", moe_intermediate_size=4))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if ".experts.1.down_proj" not in n}, tmp_path / "model.safetensors")
    config = loading.validate(
        small(model=str(tmp_path), quantization={"bnb": {"load_in_4bit": True}}, output_dir=str(tmp_path / "out")),
        "x.toml",
    )
    made = resolve.resolve(config)
    with pytest.raises(UserError, match=r"quantization: .*'glm4_moe' in another form than it runs"):
        prepare.check_files(config.model, config.output_dir, made.meta_model)


@pytest.mark.parametrize("stages", [1, 2])
def test_check_still_takes_a_model_with_weights(tmp_path: Path, stages: int) -> None:
    save_model(tmp_path, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = loading.validate(small(model=str(tmp_path), pipeline_stages=stages, adapter_type="lora"), "x.toml")
    prepare.check_files(config.model, str(tmp_path), resolve.resolve(config).meta_model)
