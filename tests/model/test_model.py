"""Stages in a row against the whole Hugging Face model: the same numbers, or a clear refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pipeline.kernels.cross_entropy import LogitTransform
from torch import nn

from pipeline.console import UserError
from pipeline.model import stage as stage_module
from pipeline.model.stage import Stage, check_head, empty_model, read_model_config
from pipeline.model.structure.build import logit_transform
from pipeline.model.structure.stand_ins import PassThrough
from tests.helpers.builders import model_config, save_model
from tests.helpers.stages import build, chain, hidden, token_ids

# Families with whatever could go wrong at a cut: parallel blocks and logit scale (cohere), layer types and windows
# (cohere2, gemma2), soft caps (gemma2), multipliers (granite), biases (qwen2), routers (mixtral, qwen3_moe).
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.25},
    "llama": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 5.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 5.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "qwen2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
CUTS = [[0, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and whole model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {kind: (root / kind, save_model(root / kind, kind, **changes)) for kind, changes in FAMILIES.items()}


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_stages_equal_the_whole_model(models: dict, kind: str, cuts: list[int]) -> None:
    folder, whole = models[kind]
    ids = token_ids(rows=2, length=24)  # longer than the sliding windows
    stages = chain(folder, cuts)
    normed = hidden(stages, ids)
    assert (normed - whole.base_model(input_ids=ids)[0]).abs().max() == 0.0
    logits = logit_transform(whole.config).apply(stages[-1].head(normed))
    theirs = whole(input_ids=ids).logits
    assert theirs.std() > 0.02
    # Scaling and capping are a handful of fp32 operations, which may stand in another order: 2⁻²⁴ each.
    assert ((logits - theirs).abs() <= 4 * 2**-24 * theirs.abs() + 4 * 2**-24).all()


@pytest.mark.parametrize("kind", ["llama", "granite", "gemma2"])
def test_gradients_through_stages_equal_the_whole_models(models: dict, kind: str) -> None:
    folder, whole = models[kind]
    whole.requires_grad_(True).zero_grad()
    stages, ids = chain(folder, [0, 1, 3, 4]), token_ids(rows=1)
    for stage in stages:
        stage.requires_grad_(True)
    weight = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))
    (hidden(stages, ids) * weight).sum().backward()
    (whole.base_model(input_ids=ids)[0] * weight).sum().backward()
    right = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    found = {name: p.grad for stage in stages for name, p in stage.model.named_parameters() if p.grad is not None}
    assert found.keys() == right.keys()
    assert len(right) > 30
    for name, gradient in right.items():
        assert (found[name] - gradient).abs().max() == 0.0, name


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_separate_rows(models: dict, kind: str) -> None:
    """Positions that restart are all it takes; documents of unequal length, other ones in the second row."""
    stages = chain(models[kind][0], [0, 2, 4])
    lengths = [(5, 12, 7), (10, 2, 12)]
    ids = token_ids(rows=2, length=24)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed, whole_rows = hidden(stages, ids, positions), hidden(stages, ids)
    for row, parts in enumerate(lengths):
        for document, found in zip(ids[row].split(parts), packed[row].split(parts), strict=True):
            alone = hidden(stages, document.unsqueeze(0))[0]
            # fp32 in another order: four layers of sums of at most 64 products of a normed state of about 1.
            assert (found - alone).abs().max() <= 4 * 64 * 2**-24 * max(1.0, float(alone.abs().max()))
    assert (packed - whole_rows).abs().max() > 1e-3, "without the restart, documents would see each other"


def test_what_passes_between_stages(models: dict) -> None:
    first, middle, _ = chain(models["llama"][0], [0, 1, 3, 4])
    ids, positions = token_ids(), torch.arange(24).expand(2, 24)
    output = first((ids, positions))
    assert [t.is_floating_point() for t in output] == [True, False]
    assert output[1] is positions
    assert output[0].shape == (2, 24, 32)
    assert not output[0].requires_grad, "nothing to train up to here"
    assert not middle(output)[0].requires_grad
    passed = middle((output[0].requires_grad_(), positions))[0]
    assert passed.requires_grad, "the gradient of the hidden state goes through"
    assert not passed.is_leaf, "the gradient of the hidden state goes through"


def test_empty_model_has_meta_parameters_and_real_buffers() -> None:
    model = empty_model(model_config("gemma2"), torch.bfloat16, None)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    buffers = list(model.buffers())
    assert buffers
    assert not any(b.is_meta for b in buffers)


def test_other_stages_layers_are_gone(models: dict) -> None:
    stage = build(models["cohere2"][0], 1, 2)
    layers = stage.model.base_model.layers
    assert [isinstance(layer, PassThrough) for layer in layers] == [True, False, True, True]
    assert list(stage.layers) == [1]
    assert isinstance(stage.model.base_model.embed_tokens, PassThrough)
    assert isinstance(stage.model.base_model.norm, PassThrough)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_head_accepts_every_family(models: dict, kind: str, dtype: torch.dtype) -> None:
    check_head(build(models[kind][0], 3, 4, dtype))


# In bf16 the two sides may differ by a few of its units of 2⁻⁷: only what is larger can be seen.
CHANGED = [(torch.float32, 1.001), (torch.bfloat16, 1.1)]


@pytest.mark.parametrize(("dtype", "factor"), CHANGED, ids=str)
@pytest.mark.parametrize("kind", ["cohere", "cohere2", "llama"])
def test_check_head_refuses_logits_that_are_not_what_config_says(
    models: dict, kind: str, dtype: torch.dtype, factor: float
) -> None:
    """The config changed after the model was built from it."""
    stage = build(models[kind][0], 3, 4, dtype)
    stage.model.config.logit_scale = factor * (getattr(stage.model.config, "logit_scale", None) or 1.0)
    with pytest.raises(UserError, match=f"'{kind}' changes its logits in a way"):
        check_head(stage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cohere", "cohere2", "granite", "gemma2"])
def test_check_head_refuses_families_that_are_not_known_to_change_their_logits(
    models: dict, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "logit_transform", lambda config: LogitTransform())
    with pytest.raises(UserError, match=f"'{kind}' changes its logits in a way"):
        check_head(build(models[kind][0], 3, 4, dtype))


def test_check_head_refuses_a_model_that_does_something_else(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that adds a constant to one token's logit, as a model with a bias of its own would."""
    stage = build(models["llama"][0], 2, 4)
    forward = stage.model.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[..., 7] += 0.01
        return output

    monkeypatch.setattr(stage.model, "forward", biased)
    with pytest.raises(UserError, match="changes its logits"):
        check_head(stage)


# What does not fit


def tiny(name: str, **changes: Any) -> transformers.PretrainedConfig:
    return getattr(transformers, name)(**changes)


@pytest.mark.parametrize(
    ("config", "model_type", "lacks"),
    [
        (
            tiny("HrmTextConfig", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64),
            "hrm_text",
            "no list of decoder layers in a module that takes inputs_embeds",
        ),
        (tiny("T5Config", d_model=16, num_layers=2, num_heads=2, vocab_size=64), "t5", "cannot build it"),
    ],
)
def test_structures_that_do_not_fit_are_refused_by_name(config: Any, model_type: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"model_type '{model_type}'.*{lacks}") as caught:
        empty_model(config, torch.float32, None)
    assert caught.value.exit_code == 2


def test_attention_that_is_not_there_is_a_user_error() -> None:
    with pytest.raises(UserError, match="attn_implementation = 'no_such_attention': model_type 'llama'"):
        empty_model(model_config("llama"), torch.float32, "no_such_attention")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no config.json"),
        ("{", "does not read as JSON"),
        (json.dumps({"model_type": "no_such_model"}), "cannot read its config.json"),
        (json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}), "cannot read its config.json"),
    ],
    ids=["none", "broken", "unknown", "remote code"],
)
def test_config_json_that_cannot_be_read(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    (tmp_path / "own.py").write_text("raise SystemExit('code from the model folder was run')")
    with pytest.raises(UserError, match=said):
        read_model_config(str(tmp_path))


def test_stage_keeps_the_modules_names(models: dict) -> None:
    folder, whole = models["mixtral"]
    names = set(dict(whole.named_parameters()))
    for stage in chain(folder, [0, 1, 2, 4]):
        own = set(dict(stage.model.named_parameters()))
        assert own
        assert own <= names
        names -= own
    assert not names, "every parameter is on exactly one stage"
    assert isinstance(stage, Stage)
    assert isinstance(stage.head, nn.Linear)
