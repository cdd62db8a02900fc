"""PEFT's own types with `adapter_type = 'peft'`: stages against each other and against stock PEFT, saved, begun with, folded."""

import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.generation import adapter as generation
from pipeline.model.adapters.base import _plain, trainable, written
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.peft.types import LOCAL, REFUSED
from pipeline.training.stage import families, initial_adapter
from pipeline.training.stage.spec import AdapterSpec
from pipeline.training.start import resolve, to_train
from tests.helpers.artifacts import tensors_of
from tests.helpers.builders import save_model
from tests.helpers.configs import small
from tests.helpers.quick import only
from tests.helpers.stages import build, hidden, token_ids

# Weights of about 1, changed by sums of at most 64 + 48 products of the same size: 112·2⁻²⁴ ≈ 7e-6; and four layers of them.
WEIGHT_TOLERANCE, TOLERANCE = 7e-6, 3e-5
KEYS: dict[str, dict[str, Any]] = {
    **{name: {"r": 4} for name in LOCAL},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 8},
    "TINYLORA": {"r": 3, "u": 5, "weight_tying": 0.6},
    "UNILORA": {"r": 2, "theta_d_length": 600},
    "VBLORA": {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 3},
    "BEFT": {},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "OSF": {},
    "PEANUT": {"r": 4, "depth": 1, "act_fn": "relu"},
    "ROAD": {"group_size": 8},
    "SUPERTUNING": {},
    "WAVEFT": {"n_frequency": 16},
}
QUICK = ("GLORA", "LOHA", "SHIRA", "VERA")
TARGETS = [
    f"model.layers.{i}.{name}" for i in (0, 1, 2) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]
BIASED = [name for name in TARGETS if "mlp" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, whose q, k and v have biases; weights with rows of about 1."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    model = save_model(path, "qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def on_meta(folder: Path) -> PreTrainedModel:
    return empty_model(read_model_config(folder), torch.float32, None)


def config_of(folder: Path, peft_type: str, **changes: Any) -> Any:
    raw = {
        "model": str(folder),
        "adapter_type": "peft",
        "lora_rank": None,
        "lora_alpha": None,
        "lora_weight_dtype": "float32",
        "model_weight_dtype": "float32",
        "peft": {"type": peft_type, **KEYS.get(peft_type, {})},
    }
    return loading.validate(small(**{**raw, **changes}), "x.toml")


def spec_of(config: Any, on_meta: PreTrainedModel, targets: list[str] = TARGETS) -> AdapterSpec:
    asked = to_train.asked_of(config.peft.model_dump(), config.lora_dropout, targets, on_meta)
    return replace(to_train.adapter_of(config, targets), by_peft=asked)


def stages_with(folder: Path, adapter: AdapterSpec, cuts: list[int]) -> list[Stage]:
    stages = [build(folder, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, adapter)
        stage.eval()  # of PVERA's vector the mean, as it is used
    return stages


def trained(stages: list[Stage]) -> dict[str, nn.Parameter]:
    return {name: p for stage in stages for name, p in trainable(stage).items()}


@torch.no_grad()
def move(stages: list[Stage]) -> None:
    """As after training: every trained parameter moved, the same whatever the cut."""
    for stage in stages:  # of what stages share, each copy
        for name, parameter in trainable(stage).items():
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)


def save(config: Any, adapter: AdapterSpec, stages: list[Stage], output: Path) -> Path:
    output.mkdir()
    tensors = {name: t for stage in stages for name, t in written(stage).items()}
    families.writer(adapter, resolve.base_of(config))(output, tensors)
    return output


def stock(folder: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def theirs(model: Any) -> Tensor:
    return model.model(token_ids(), use_cache=False).last_hidden_state  # type: ignore[no-any-return]


@pytest.mark.parametrize("peft_type", only(QUICK, LOCAL))
@torch.no_grad()
def test_off_it_is_the_base_to_the_bit(folder: Path, on_meta: PreTrainedModel, peft_type: str) -> None:
    """So it is where preferences are trained: the reference is the model with its adapters off."""
    stages = stages_with(folder, spec_of(config_of(folder, peft_type), on_meta), [0, 4])
    move(stages)
    base, moved = hidden([build(folder, 0, 4)], token_ids()), hidden(stages, token_ids())
    assert not torch.equal(moved, base)
    with adapters_off(stages[0]):
        assert torch.equal(hidden(stages, token_ids()), base)
    assert torch.equal(hidden(stages, token_ids()), moved)


@pytest.mark.parametrize("peft_type", only(QUICK, LOCAL))
def test_stages_are_stock_peft(folder: Path, on_meta: PreTrainedModel, tmp_path: Path, peft_type: str) -> None:
    """One, two and three stages begin alike; what they save, stock PEFT loads, computes, trains and merges as they and the fold
    do; a run begins with it, and text is generated with it."""
    config = config_of(folder, peft_type)
    adapter = spec_of(config, on_meta, BIASED if LOCAL[peft_type].changes == "bias" else TARGETS)
    one, two, three = (stages_with(folder, adapter, cuts) for cuts in ([0, 4], [0, 1, 4], [0, 1, 2, 4]))
    for stages in (two, three):
        assert trained(stages).keys() == trained(one).keys()
        assert all(torch.equal(p, trained(one)[name]) for name, p in trained(stages).items())
    for stages in (one, two, three):
        move(stages)
    ours = hidden(three, token_ids()).detach()
    assert torch.equal(ours, hidden(one, token_ids()))
    assert torch.equal(ours, hidden(two, token_ids()))
    saved = save(config, adapter, two, tmp_path / "adapter")
    _check_begins_with(folder, config, adapter, saved, ours)

    merged = stock(folder, saved).merge_and_unload().state_dict()
    merge(folder, saved, tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name
    with torch.no_grad():
        folded = hidden([build(tmp_path / "out", 0, 4)], token_ids())
        torch.testing.assert_close(folded, ours, rtol=0, atol=TOLERANCE)
        assert (ours - hidden([build(folder, 0, 4)], token_ids())).abs().max() > 1e-2, "the adapter does nothing"

    model = stock(folder, saved)
    _check_one_step(model, two, hidden(two, token_ids()))


def _check_begins_with(folder: Path, config: Any, adapter: AdapterSpec, saved: Path, ours: Tensor) -> None:
    """Another start and another cut, and the adapter as generate.py puts it."""
    begun = stages_with(folder, replace(adapter, seed=7), [0, 2, 4])
    tensors = families.saved(adapter, str(saved))
    for stage in begun:
        initial_adapter.put(stage, tensors)
    with torch.no_grad():
        assert torch.equal(hidden(begun, token_ids()), ours)
        plain = [build(folder, 0, 1), build(folder, 1, 4)]
        read = generation.read(saved, read_base(folder), None)
        for stage in plain:
            generation.put(stage, read)
        torch.testing.assert_close(hidden(plain, token_ids()), ours, rtol=0, atol=TOLERANCE)


def _check_one_step(model: Any, stages: list[Stage], ours: Tensor) -> None:
    """The same hidden state, gradients, and hidden state after a step of SGD."""
    found = theirs(model.base_model.model)
    torch.testing.assert_close(found, ours, rtol=0, atol=TOLERANCE)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    (ours * g).sum().backward()
    (found * g).sum().backward()
    right = {_plain(n): p for n, p in model.base_model.model.named_parameters() if p.requires_grad}
    own: dict[str, list[nn.Parameter]] = {}  # of what stages share, each copy
    for stage in stages:
        for name, parameter in trainable(stage).items():
            own.setdefault(name, []).append(parameter)
    assert own.keys() == right.keys()
    gradients: dict[str, Tensor] = {}
    for name, copies in own.items():
        found_here = [one.grad for one in copies if one.grad is not None]
        if not found_here:  # PVERA's vector of deviations, where nothing is drawn
            assert right[name].grad is None, name
            continue
        gradients[name] = torch.stack(found_here).sum(0)
        # Through four layers rounding is near 1e-5 of the largest entry; in q and k gradients are differences of larger ones.
        assert (gradients[name] - right[name].grad).abs().max() <= 1e-4 * right[name].grad.abs().max(), name
    with torch.no_grad():
        for name, gradient in gradients.items():
            for parameter in (*own[name], right[name]):
                parameter -= 1e-3 * gradient
        torch.testing.assert_close(theirs(model.base_model.model), hidden(stages, token_ids()), rtol=0, atol=TOLERANCE)


# What [peft] has otherwise than {"type": "LOHA", "r": 4}; what is said of it.
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"type": "LOOHA"}, "peft.type.*local to a module: ADALORA, BEFT"),
    "ours already": ({"type": "hra"}, "peft.type.*adapter_type = 'hra'"),
    "needs all layers": ({"type": "frod"}, "peft.type"),
    "of a LoRA only": (
        {"type": "ADALORA", "total_step": 9, "use_rslora": True},
        "peft.use_rslora: has no meaning for PEFT.s ADALORA",
    ),
    "no end": ({"type": "ADALORA"}, "PEFT refuses these keys: AdaLoRA does not work when .total_step. is None"),
    "unknown key": ({"alfa": 4}, r"peft.alfa: PEFT's LOHA has no such key; did you mean 'alpha'\?"),
    "wrong type": ({"r": "4"}, "peft.r = '4': input should be a valid integer"),
    "no number for a bool": ({"r": True}, "peft.r = True: input should be a valid integer"),
    "two at once": ({"r": 4.5, "alpha": "x"}, "(?s)peft.r = 4.5.*peft.alpha = 'x'"),
    "targets": ({"target_modules": ["q_proj"]}, "peft.target_modules: decided by target_modules above the tables"),
    "no place": ({"type": "ROAD", "group_size": 7}, "ROAD.*"),
    "does not divide": ({"type": "C3A", "block_size": 7}, "PEFT makes no C3A of model.layers.0.self_attn.q_proj"),
    "no rank": ({"r": 0}, "PEFT makes no LOHA of .*positive"),
    "a pattern of nothing": ({"rank_pattern": {"up_proj": 2}}, "peft.rank_pattern: 'up_proj' matches none"),
    "recomputed otherwise": ({"type": "PVERA", "generator_seed": 3}, "peft.generator_seed: a layer that is recomputed"),
    "multiplicative": ({"type": "PEANUT", "depth": 0, "act_fn": "linear"}, "adapter_type = 'multiplicative_lora'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_go_is_refused_by_its_key(folder: Path, on_meta: PreTrainedModel, case: str) -> None:
    keys, said = REFUSALS[case]
    table = {"type": "LOHA", "r": 4, **keys} if "type" not in keys else keys
    with pytest.raises(UserError, match=said):
        families.check_fits(spec_of(config_of(folder, "LOHA", peft=table), on_meta), on_meta)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft": None}, "peft: required with adapter_type = 'peft'"),
        ({"adapter_type": "lora", "lora_rank": 4, "lora_alpha": 4}, "peft: has no meaning with adapter_type = 'lora'"),
        ({"lora_rank": 4}, "lora_rank: has no meaning with adapter_type = 'peft'"),
        ({"lora_dropout": 0.1}, "lora_dropout: PEFT's LOHA has no dropout"),
        ({"quantization": {"bnb": {"load_in_4bit": True}}}, "peft.type: PEFT's LOHA reads the weight itself"),
        ({"peft": {"type": "DELORA"}, "model_weight_dtype": "bfloat16"}, "lora_weight_dtype.*'bfloat16'"),
        ({"peft": {"type": "VERA"}, "lora_weight_dtype": "bfloat16"}, "lora_weight_dtype.*'float32'"),
        ({"adapter_type": "loha"}, "adapter_type = 'peft' and .peft. type = 'LOHA'"),
        ({"adapter_type": "xlora"}, "twice through all stages"),
    ],
)
def test_keys_that_do_not_go_together(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_of(folder, "LOHA", **changes)


def test_every_type_of_peft_is_trained_or_refused_with_a_reason() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    known = {str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_TUNER_MAPPING}
    assert known <= LOCAL.keys() | REFUSED.keys()
    assert not LOCAL.keys() & REFUSED.keys()


def test_ranks_by_pattern_and_dropout(folder: Path, on_meta: PreTrainedModel, tmp_path: Path) -> None:
    """rank_pattern as PEFT takes it, in training, in its file and in the fold; lora_dropout is the type's own."""
    keys = {"type": "LOHA", "r": 4, "alpha": 8, "rank_pattern": {r"layers\.\d\.mlp.down_proj": 2}}
    config = config_of(folder, "LOHA", peft=keys)
    adapter = spec_of(config, on_meta)
    stages = stages_with(folder, adapter, [0, 2, 4])
    move(stages)
    assert {p.shape[1] for name, p in trained(stages).items() if "down_proj.hada_w1_a" in name} == {2}
    saved = save(config, adapter, stages, tmp_path / "adapter")
    merged = stock(folder, saved).merge_and_unload().state_dict()
    merge(folder, saved, tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name
    asked = spec_of(config_of(folder, "MISS", lora_dropout=0.25), on_meta).by_peft
    assert asked is not None
    assert asked.settings["miss_dropout"] == 0.25


def test_a_change_of_biases_needs_biases(folder: Path, on_meta: PreTrainedModel, tmp_path: Path) -> None:
    config = config_of(folder, "BEFT")
    adapter = spec_of(config, on_meta)
    stages = stages_with(folder, adapter, [0, 4])
    move(stages)
    with pytest.raises(UserError, match=r"down_proj\.bias to take it, so PEFT cannot merge it"):
        merge(folder, save(config, adapter, stages, tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_budget_has_dropped_is_saved_as_peft_saves_it(
    folder: Path, on_meta: PreTrainedModel, tmp_path: Path
) -> None:
    """A rank_pattern from which stock PEFT makes smaller modules, also one of nothing; the fold; a run that begins with it."""
    config = config_of(folder, "ADALORA")
    adapter = spec_of(config, on_meta)
    stages = stages_with(folder, adapter, [0, 2, 4])
    move(stages)
    masks = {name: torch.rand(4, generator=torch.Generator().manual_seed(n)) > 0.5 for n, name in enumerate(TARGETS)}
    masks[TARGETS[1]] = torch.zeros(4, dtype=torch.bool)
    for stage in stages:
        for name, layer in stage.model.named_modules():
            if name in masks:
                layer.kept = masks[name].to(torch.uint8).clone
                with torch.no_grad():
                    layer.lora_E["default"][~masks[name]] = 0.0
    with torch.no_grad():
        ours = hidden(stages, token_ids())
    saved = save(config, adapter, stages, tmp_path / "adapter")
    tensors = tensors_of(saved)
    assert all(tensors[f"base_model.model.{name}.lora_A"].shape[0] == int(mask.sum()) for name, mask in masks.items())
    model = stock(folder, saved)
    with torch.no_grad():
        torch.testing.assert_close(theirs(model.base_model.model), ours, rtol=0, atol=TOLERANCE)
    merged = model.merge_and_unload().state_dict()
    merge(folder, saved, tmp_path / "out")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name
    again = config_of(folder, "ADALORA", peft={"type": "ADALORA", **KEYS["ADALORA"], "tinit": 3})
    _check_begins_with(folder, again, spec_of(again, on_meta), saved, ours)
