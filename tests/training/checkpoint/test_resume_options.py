"""What a resumed run may do otherwise: a constant learning rate, a fresh optimizer; and checkpoints by the minute.

Oracle of the first resumed step: the unsplit Hugging Face model in a plain PyTorch loop with a new AdamW (optimi's), from
the checkpoint's weights and on the rows that come next.
"""

from pathlib import Path
from typing import Any, NamedTuple

import optimi
import pytest
import torch
from torch import Tensor

from tests.helpers import builders, unsplit
from tests.training.checkpoint.test_resume import final_state, numbers, run_plan

PEAK, CONSTANT, EPS, DECAY, RANK, ALPHA, CLIP = 1e-2, 3e-3, 1e-3, 0.1, 4, 8, 1.0
STOPPED_AT, STEPS, WARMUP = 2, 5, 4


class Runs(NamedTuple):
    """Folders of the runs of one launch, by what is special about them."""

    toml: Path
    base: Path
    fresh: str
    usual: str
    by_the_minute: str
    rarely: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("options")
    builders.save_model(folder / "base")
    toml = builders.write_config(
        folder / "c.toml",
        model=str(folder / "base"),
        output_dir=str(folder / "runs"),
        max_steps=STEPS,
        lr_scheduler="cosine",
        warmup_steps=WARMUP,
        gradient_clipping=CLIP,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        optimizer={"type": "adamw_kahan", "lr": PEAK, "eps": EPS, "weight_decay": DECAY},
    )
    afresh = ["load_optimizer_states=false", f"force_constant_lr={CONSTANT}", "checkpoint_every_n_minutes=1e-6"]
    stopped: dict[str, Any] = {"config": str(toml), "stop_after": STOPPED_AT}
    done = run_plan(
        folder,
        2,
        [
            stopped,
            {"config": str(toml), "resume": 0, "overrides": afresh},
            stopped,
            {"config": str(toml), "resume": 2, "overrides": ["checkpoint_every_n_minutes=1e-6"]},
            {"config": str(toml), "overrides": ["checkpoint_every_n_minutes=1e-6"]},
            {"config": str(toml), "overrides": ["checkpoint_every_n_minutes=1000"]},
        ],
    )
    assert done["codes"] == [75, 0, 75, 0, 0, 0]
    return Runs(toml, folder / "base", done["runs"][1], done["runs"][3], done["runs"][4], done["runs"][5])


def rates(run: str) -> list[float]:
    return [line["train/lr"] for line in numbers(run) if "train/loss" in line]


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


@pytest.mark.slow
def test_a_constant_rate_is_taken_whatever_the_schedule_says(runs: Runs) -> None:
    """Warmup from PEAK/4 over four steps: PEAK·(1/4 + 3/4·k/4), k = 0 … 3, and PEAK at the fifth."""
    scheduled = [PEAK * (0.25 + 0.75 * k / WARMUP) for k in range(WARMUP)] + [PEAK]
    assert rates(runs.usual) == pytest.approx(scheduled, rel=1e-12)
    assert rates(runs.fresh) == pytest.approx(scheduled[:STOPPED_AT] + [CONSTANT] * (STEPS - STOPPED_AT), rel=1e-12)


@pytest.mark.slow
def test_without_optimizer_states_the_first_step_is_a_fresh_optimizers(runs: Runs) -> None:
    before = under(final_state(runs.fresh, STOPPED_AT), "weights/")
    after = final_state(runs.fresh, STOPPED_AT + 1)
    steps, _ = unsplit.rows(runs.toml, [], STOPPED_AT + 1)
    model = unsplit.load(runs.base)
    leaves = unsplit.with_multiplicative(model, before, ALPHA / RANK)

    def new_adamw(parameters: list[Tensor]) -> Any:
        return optimi.AdamW(parameters, lr=CONSTANT, betas=(0.9, 0.99), eps=EPS, weight_decay=DECAY)

    expected = unsplit.train(model, leaves, steps[STOPPED_AT:], new_adamw, CLIP)
    losses = [line["train/loss"] for line in numbers(runs.fresh) if "train/loss" in line]
    assert losses[STOPPED_AT] == pytest.approx(expected.losses[0], rel=0, abs=unsplit.LOSS_TOLERANCE)
    ours, usual = under(after, "weights/"), under(final_state(runs.usual, STOPPED_AT + 1), "weights/")
    assert ours.keys() == expected.weights.keys() == usual.keys()
    for name, weight in expected.weights.items():
        tolerance = unsplit.weight_tolerance(expected, name, CONSTANT, EPS)
        assert unsplit.size(ours[name] - weight) <= tolerance, name
        assert unsplit.size(usual[name] - weight) > 100 * tolerance, f"{name}: with its states it goes elsewhere"
    assert {int(count) for key, count in after.items() if key.endswith("/step")} == {1}
    with_states = final_state(runs.usual, STOPPED_AT + 1)
    assert {int(count) for key, count in with_states.items() if key.endswith("/step")} == {STOPPED_AT + 1}


@pytest.mark.slow
def test_checkpoints_by_the_minute(runs: Runs) -> None:
    """A millionth of a minute has passed at every boundary, a thousand minutes at none: then only the end is kept."""
    saved = {run: {p.name for p in Path(run).glob("global_step*")} for run in (runs.by_the_minute, runs.rarely)}
    assert saved[runs.by_the_minute] == {f"global_step{step}" for step in range(1, STEPS + 1)}
    assert saved[runs.rarely] == {f"global_step{STEPS}"}
    first, last = (final_state(runs.by_the_minute, step) for step in (1, STEPS))
    assert any(not torch.equal(first[key], last[key]) for key in first if key.startswith("weights/"))
    theirs = final_state(runs.rarely, STEPS)
    assert all(torch.equal(last[key], theirs[key]) for key in theirs), "saving changed a number"
