"""A saved adapter in the stages of generate.py computes what PEFT's live model does, and what training computed."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.generation import adapter as adapters
from pipeline.model.adapters.base import trainable, written
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.training.stage import families, parts
from pipeline.training.start import resolve
from tests.helpers.artifacts import load_model
from tests.helpers.builders import save_model
from tests.helpers.families import CONFIGS, by_peft, loud_base
from tests.helpers.stages import chain, hidden, token_ids
from tests.model.test_every_family import config_of


def with_adapter(base: Path, folder: Path, cuts: list[int]) -> list[Stage]:
    saved = adapters.read(folder, read_base(base), None)
    stages = chain(base, cuts)
    for stage in stages:
        adapters.put(stage, saved)
    return stages


@torch.no_grad()
def logits(stages: list[Stage], ids: Tensor) -> Tensor:
    return logit_transform(stages[-1].model.config).apply(stages[-1].head(hidden(stages, ids)))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


@pytest.mark.parametrize("case", CONFIGS)
def test_it_is_pefts(biased: Path, tmp_path: Path, case: str) -> None:
    live = by_peft(biased, tmp_path / "adapter", case)
    ids = token_ids() % live.config.vocab_size
    with torch.no_grad():
        right, of_base = live(ids).logits, None
        with live.disable_adapter():
            of_base = live(ids).logits
    assert (right - of_base).abs().max() > 0.05 * right.abs().max()
    stages = with_adapter(biased, tmp_path / "adapter", [0, 1, live.config.num_hidden_layers])
    # A folded weight is rounded once more than a live adapter: some tens of fp32's 2⁻²⁴, through the layers.
    assert (logits(stages, ids) - right).abs().max() <= 2**-17 * right.abs().max()
    with contextlib.ExitStack() as off:
        for stage in stages:
            off.enter_context(adapters_off(stage))
        assert (logits(stages, ids) - of_base).abs().max() <= 2**-20 * of_base.abs().max()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_pattern": {"layers.0.mlp.down_proj": 2}},
        {"adapter_type": "lora"},
        {"trainable_modules": ["embed_tokens", "norm"]},
        {"adapter_type": "control_adapter", "lora_alpha": None},
    ],
    ids=["multiplicative", "ranks that differ", "lora", "and in full", "control"],
)
def test_it_is_what_training_computed(base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    compare_with_training(base, tmp_path / "adapter", changes)


def compare_with_training(base: Path, folder: Path, changes: dict[str, Any]) -> None:
    """An adapter as a run trains it, saved into `folder` as a run saves it, and read from there."""
    plan = resolve.resolve(config_of(base, 1, **changes))
    stages = chain(base, [0, 4])
    parts.put_trained(stages[0], plan.trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(stages[0]).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert plan.trained.adapter is not None
    write = families.writer(plan.trained.adapter, plan.base, tied=plan.trained.tied)
    tied = plan.trained.tied
    folder.mkdir()
    write(folder, {name: t for name, t in written(stages[0]).items() if name not in tied})
    ids = token_ids()
    right = logits(stages, ids)
    for cuts in ([0, 4], [0, 2, 4]):
        assert (logits(with_adapter(base, folder, cuts), ids) - right).abs().max() <= 2**-18 * right.abs().max()


def test_experts_are_adapted_as_in_training(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    compare_with_training(tmp_path / "base", tmp_path / "adapter", {"target_modules": ["experts"]})


def test_what_only_a_fold_can_put_there_is_refused(biased: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    get_peft_model(load_model(biased), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="embed_tokens, which is no part of a layer; fold it"):
        adapters.read(tmp_path / "adapter", read_base(biased), None)
