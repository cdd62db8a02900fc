"""Rows of unequal length, with targets in runs, through real processes: losses, gradients and evaluation.

Oracle: the unsplit Hugging Face model, one unpadded row at a time.
"""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.selection import Selection
from tests.helpers import builders, stage_runs, unsplit
from tests.helpers.row_store import ListStore, Row
from tests.helpers.stage_runs import Case, Result
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

STEPS, SEED = 3, 42


def drawn(count: int, seed: int) -> list[Row]:
    """Rows of 5 to 150 ids with two runs of targets."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(5, 150)
        a, b, c, d = sorted(draw.sample(range(1, length + 1), 4))
        rows.append(([draw.randint(3, 60) for _ in range(length)], [(a, b), (c, d)]))
    return rows


TRAINED, HELD_OUT = drawn(17, 0), drawn(7, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a configuration: 17 rows, two a micro-batch, three micro-batches a step; the third is half filler."""
    root = tmp_path_factory.mktemp("rows")
    builders.save_model(root / "cohere", "cohere", logit_scale=1.0)
    (root / "text.txt").write_text((builders.BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:4000])
    builders.write_config(
        root / "rows.toml",
        model=str(root / "cohere"),
        output_dir=str(root / "runs"),
        seed=SEED,
        lora_rank=None,
        lora_alpha=None,
        target_modules=None,
        full_fine_tune=True,
        layers_to_transform=None,
        micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=3,
        datasets=[{"dataset_type": "textfile", "dataset_path": str(root / "text.txt"), "sequence_len": 64}],
    )
    return root


@pytest.fixture(scope="module")
def result(root: Path) -> Callable[[int], Result]:
    """By number of stages."""

    @cache
    def get(stages: int) -> Result:
        overrides = [f"pipeline_stages={stages}", f"output_dir={str(root / str(stages))!r}"]
        case = Case("rows", root / "rows.toml", overrides, STEPS, [0], rows=(TRAINED, HELD_OUT))
        return stage_runs.run(stages, [case], root / f"{stages} stages")["rows"]

    return get


def summed(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """The sum of the losses at the row's targets."""
    ids, runs = row
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    places = torch.tensor([place for start, end in runs for place in range(start, end)])
    return torch.nn.functional.cross_entropy(logits[places - 1], torch.tensor(ids)[places], reduction="sum")


def targets(rows: list[Row]) -> int:
    return sum(end - start for _, runs in rows for start, end in runs)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_the_first_step_is_the_mean_over_its_targets(root: Path, result: Callable[[int], Result], stages: int) -> None:
    store = ListStore(TRAINED)
    loader = MicroBatches(
        [store],
        mix([Selection(store, np.arange(len(store)))], seed=SEED),
        seed=SEED,
        micro_batch_size=2,
        gradient_accumulation_steps=3,
    )
    step = [TRAINED[row] for _, row in loader.info(Position()).rows]
    model = unsplit.load(root / "cohere").requires_grad_(True)
    loss = sum(summed(model, row) for row in step) / targets(step)
    loss.backward()  # type: ignore[union-attr]
    found = result(stages)
    assert found.losses[0] == pytest.approx(float(loss), abs=LOSS_TOLERANCE)
    expected = {name: p.grad for name, p in model.named_parameters()}
    gradients = {name: g for name, g in found.gradients(1).items() if name in expected}
    assert gradients.keys() == expected.keys() - ({"lm_head.weight"} - gradients.keys())
    for name, gradient in gradients.items():
        assert size(gradient - expected[name]) <= GRADIENT_TOLERANCE * size(expected[name]), name


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_evaluation_is_the_mean_over_its_targets(root: Path, result: Callable[[int], Result], stages: int) -> None:
    model = unsplit.load(root / "cohere")
    expected = sum(float(summed(model, row)) for row in HELD_OUT) / targets(HELD_OUT)
    assert result(stages).evaluation(0)["held_out"] == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_more_stages_train_the_same(result: Callable[[int], Result]) -> None:
    """Three steps, the last with filler: losses agree, as each is the mean over its own targets."""
    one, two = result(1).losses, result(2).losses
    assert len(one) == STEPS
    assert one == pytest.approx(two, abs=STEPS * LOSS_TOLERANCE)
