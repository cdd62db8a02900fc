"""`target_parameters`, LoRA on what holds all experts of a layer: stages against stock PEFT on the unsplit model, saved, begun
with.

The fold is tests/artifacts/fold/test_merge_parameters.py.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.generation import adapter as generation
from pipeline.model.adapters.base import trainable, written
from pipeline.model.adapters.switch import adapters_off
from pipeline.training.stage import families, initial_adapter
from pipeline.training.start import resolve
from tests.helpers.artifacts import tensors_of
from tests.helpers.configs import problems, small
from tests.helpers.mixtures import LAYERS, config_of, randomise, save_mixture
from tests.helpers.stages import build, hidden

OF_LORA: dict[str, Any] = {
    "adapter_type": "lora",
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "down_proj"],
    "layers_per_stage": None,
}
KINDS = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-5  # of the largest logit: two ways to sum P_e + s·B_e·A_e, through three layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's model, made once."""

    @cache
    def get(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("mixtures") / kind
        save_mixture(folder, kind)
        return folder

    return get


def stages_of(folder: Path, cuts: list[int], **changes: Any) -> tuple[list[Any], Any, Any]:
    """Stages with the adapter as it starts, what resolved it, and its configuration."""
    config = config_of(folder, len(cuts) - 1, **{**OF_LORA, **changes})
    plan = resolve.resolve(config)
    stages = [build(folder, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    return stages, plan, config


def trained(stages: list[Any]) -> dict[str, Tensor]:
    return {name: p for stage in stages for name, p in trainable(stage).items()}


def save(stages: list[Any], plan: Any, folder: Path) -> Path:
    folder.mkdir()
    tensors = {name: t for stage in stages for name, t in written(stage).items()}
    families.writer(plan.trained.adapter, plan.base)(folder, tensors)
    return folder


def stock(folder: Path, adapter: Path) -> Any:
    """Stock PEFT's unsplit model with the saved adapter, and its parameters by our names."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            own = name.replace(".base_layer", "")
            own += f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            found[f"{own}.A"], found[f"{own}.B"] = module.lora_A["default"].weight, module.lora_B["default"].weight
    return model, found


@KINDS
def test_stages_are_stock_peft_unsplit(saved: Any, tmp_path: Path, kind: str) -> None:
    """Logits and gradients of one and of two stages against stock PEFT's, which loads what two stages save."""
    folder = saved(kind)
    one, _, _ = stages_of(folder, [0, LAYERS])
    two, plan, _ = stages_of(folder, [0, 1, LAYERS])
    assert trained(one).keys() == trained(two).keys()
    assert all(torch.equal(p, trained(one)[name]) for name, p in trained(two).items()), "they start differently"
    assert {n.removesuffix(".A") for n in trained(two) if "experts" in n and n.endswith("A")} == {
        f"model.layers.{i}.mlp.experts.{own}" for i in range(LAYERS) for own in ("gate_up_proj", "down_proj")
    }
    with torch.no_grad(), adapters_off(one[0]):
        plain = one[0].head(hidden(one, IDS))
    for stages in (one, two):
        randomise(trained(stages))
    logits = one[0].head(hidden(one, IDS))
    others = two[-1].head(hidden(two, IDS))
    assert torch.equal(logits, others)
    assert (logits - plain).abs().max() > 1e-2, "the adapter does nothing"
    model, right = stock(folder, save(two, plan, tmp_path / "adapter"))
    theirs = model(input_ids=IDS, use_cache=False).logits
    assert (others - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    for result in (logits, others, theirs):
        result.square().mean().backward()
    assert right.keys() == trained(two).keys()
    for name, parameter in trained(two).items():
        assert torch.equal(parameter, right[name]), name
        assert torch.equal(parameter.grad, trained(one)[name].grad), name
        assert bool(parameter.grad.any()), name
        # Through three layers, rounding is near 1e-5 of the largest entry.
        assert (parameter.grad - right[name].grad).abs().max() <= 1e-4 * right[name].grad.abs().max(), name


def test_ranks_by_pattern_are_begun_with_and_spoken_with(saved: Any, tmp_path: Path) -> None:
    """Ranks that differ are saved as one, which another cut begins with, and generate.py puts on its stages; norms are of all
    matrices."""
    folder = saved("qwen3_moe")
    changes = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"q_proj": 4}}
    stages, plan, _ = stages_of(folder, [0, 2, LAYERS], **changes)
    randomise(trained(stages))
    assert trained(stages)["model.layers.0.mlp.experts.down_proj.A"].shape == (4 * 2, 24)
    adapter = save(stages, plan, tmp_path / "adapter")
    begun, _, _ = stages_of(folder, [0, LAYERS], seed=3, **changes)
    tensors = families.saved(plan.trained.adapter, str(adapter))
    initial_adapter.put(begun[0], tensors)
    with torch.no_grad():
        ours = hidden(stages, IDS)
        assert torch.equal(hidden(begun, IDS), ours)
        model, _ = stock(folder, adapter)
        theirs = model.base_model.model.model(IDS, use_cache=False).last_hidden_state
        torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)
        plain = [build(folder, 0, 1), build(folder, 1, LAYERS)]
        before = hidden(plain, IDS)
        read = generation.read(adapter, read_base(folder), None)
        with generation.worn(plain[0], read), generation.worn(plain[1], read):
            torch.testing.assert_close(hidden(plain, IDS), ours, rtol=0, atol=TOLERANCE)
        assert torch.equal(hidden(plain, IDS), before)
    name = "model.layers.2.mlp.experts.down_proj"
    delta = wrapper_of(model, name).get_delta_weight("default")
    assert families.norms(stages[1], plan.trained.adapter)[name] == pytest.approx(float(delta.norm()), rel=1e-5)


def wrapper_of(model: Any, name: str) -> Any:
    """Stock PEFT's wrapper of a parameter."""
    holder, _, own = name.rpartition(".")
    return next(
        module
        for found, module in model.base_model.model.named_modules()
        if isinstance(module, ParamWrapper)
        and found.replace(".base_layer", "") == holder
        and module.parameter_name == own
    )


def test_parameters_alone(saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages, plan, _ = stages_of(saved("gpt_oss"), [0, LAYERS], target_modules=[], layers_to_transform="1:2")
    said = capsys.readouterr().out
    assert "lora on the weights of no linear module, layers 1 to 2" in said
    assert (
        "a pair for each matrix of the parameters mlp.experts.gate_up_proj (4 × 32 × 48), mlp.experts.down_proj" in said
    )
    assert len(trained(stages)) == 2 * 2 * 2
    tensors = tensors_of(save(stages, plan, tmp_path / "adapter"))
    assert tensors["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"].shape == (4 * 4, 32)
    assert tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].shape == (32, 4 * 4)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora: not with target_parameters: PEFT has no DoRA"),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout: not with target_parameters"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: not with target_parameters"),
    "norms": ({"scale_weight_norms": 1.0}, "scale_weight_norms: not with target_parameters"),
    "family": ({"adapter_type": "moslora"}, "target_parameters: has no meaning with adapter_type = 'moslora'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_keys_that_do_not_go_together(case: str) -> None:
    changes, said = REFUSALS[case]
    assert [
        line
        for line in problems(small(**{**OF_LORA, "target_modules": ["q_proj"], **changes}))
        if line.startswith(said)
    ]


def test_what_is_refused(saved: Any) -> None:
    folder = saved("mixtral")
    with pytest.raises(
        UserError, match=r"no parameter 'w1' of .* there are mlp.experts.down_proj, mlp.experts.gate_up_proj"
    ):
        stages_of(folder, [0, LAYERS], target_parameters=["w1"])
    with pytest.raises(
        UserError, match=r"experts\.gate_up_proj is quantised, and PEFT adds to the experts' own tensors"
    ):
        stages_of(folder, [0, LAYERS], quantization={"bnb": {"load_in_4bit": True}})
    with pytest.raises(UserError, match="target_modules: names no module; leave the key out"):
        loading.validate(small(target_modules=[]), "x.toml")
