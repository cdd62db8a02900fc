"""What goes by the best evaluation: a run that ends early, and what follows a run. Oracle: losses that cannot change."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import saved_at
from pipeline.training.checkpoint.state import Progress
from tests.helpers.builders import metrics, only_run, save_model, train, write_config
from tests.helpers.publishing import make_run


@pytest.mark.parametrize(
    ("losses", "min_delta", "waited"),
    [
        ([3.0, 2.0, 1.0], 0.0, [0, 0, 0]),
        ([3.0, 3.0, 3.0], 0.0, [0, 1, 2]),
        ([3.0, 4.0, 2.9, 3.5], 0.0, [0, 1, 0, 1]),
        ([3.0, 2.95, 2.85, 2.9], 0.1, [0, 1, 0, 1]),  # small gains add up
        ([3.0, 2.9, 2.8], 0.5, [0, 1, 2]),
    ],
)
def test_evaluations_that_are_no_better_are_counted(losses: list[float], min_delta: float, waited: list[int]) -> None:
    progress, counted, least = Progress(), [], losses[0]
    for loss in losses:
        progress, least = progress.evaluated(loss, min_delta), min(least, loss)
        counted.append(progress.waited)
        assert progress.best_loss == least
    assert counted == waited


def test_a_checkpoint_of_before_there_was_a_patience_has_waited_for_nothing() -> None:
    older = {"step": 4, "epoch": 0, "rows": 8, "order": "0f", "best_loss": 2.5, "settled": True, "format": 3}
    assert Progress.of(older) == Progress(4, 0, 8, "0f", 2.5, True, 0, None)


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_and_its_best_is_what_follows(tmp_path: Path) -> None:
    """With updates that change no weight, the first evaluation is the best, and the third ends the run."""
    save_model(tmp_path / "base")
    keys: dict[str, Any] = {
        "model": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "runs"),
        "optimizer": {"type": "adamw", "lr": 1e-30},
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "load_best_at_end": True,
        "max_steps": 9,
        "pipeline_stages": 1,
        "after_training": ["merge"],
    }
    toml = str(write_config(tmp_path / "c.toml", **keys))
    output = train(1, "--config", toml)
    run = only_run(tmp_path / "runs")
    assert max(line["step"] for line in metrics(run)) == 3
    assert "ended early: 2 evaluations in a row were not clearly better than" in output
    still = re.search(r"after 3 steps (\d+) of (\d+) trained tensors have not moved", output)
    assert still, "it ends before it would be asked"
    assert 2 * int(still[1]) == int(still[2]), "every A; a B of zeros becomes 1e-30"
    assert saved_at.last_or_best(run, 3, best=True) == (run / "best_loss", 1)
    assert saved_at.step_of(run / "merged") == 1
    assert f"--lora {run / 'best_loss'}" in output

    again = train(1, "--config", toml, "--resume_from_checkpoint")
    assert "step 4/" not in again
    assert "have not moved" not in again, "of no step there is nothing to say"
    assert "ended early" in again
    more = train(1, "--config", toml, "--resume_from_checkpoint", "--set", "early_stopping_patience=3")
    assert "step 4/9" in more
    assert "step 5/9" not in more


def test_without_a_best_save_what_follows_takes_the_last(tmp_path: Path) -> None:
    run = make_run(tmp_path, [])
    assert saved_at.last_or_best(run.run_dir, run.step, best=True) == (run.saved, run.step)
    assert saved_at.last_or_best(run.run_dir, run.step, best=False) == (run.saved, run.step)
