"""Flags of train.py that contradict each other, and what a run's length says about its warmup."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.data.selection import Streams, whole
from pipeline.peft.types import Asked
from pipeline.training.data import specs
from pipeline.training.data.batches import describe_steps, micro_batches
from pipeline.training.data.read import Data
from pipeline.training.start import plan as planned
from pipeline.training.start import to_train
from pipeline.training.start.resolved import Updates
from tests.helpers.builders import ROOT, environment
from tests.helpers.configs import small
from tests.helpers.data import store


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--plan", "--check"), "give one"),
        (("--plan", "--preview", "2"), "give one"),
        (("--prepare", "--check"), "give one"),
        (("--devices", "2x48GiB"), "add --plan"),
        (("--check", "--devices", "2x48GiB"), "add --plan"),
        (("--profile", "0"), "1 to 100"),
    ],
)
def test_flags_that_contradict_each_other(flags: tuple[str, ...], said: str) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "--config", "config_creative_writer.toml", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --")
    assert said in done.stderr


@pytest.mark.parametrize(("text", "stages"), [("3x48GiB", 2), ("48GiB", 2), ("4xA6000", 2), ("2x48GiB", 1)])
def test_devices_are_one_for_each_stage(text: str, stages: int) -> None:
    with pytest.raises(UserError, match=f"pipeline_stages = {stages}"):
        planned._described(text, stages)
    assert len(planned._described(f"{stages}x48GiB", stages).usable) == stages


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"max_steps": 5, "warmup_steps": 5}, True),
        ({"max_steps": 5, "warmup_steps": 4}, False),
        ({"max_steps": None, "epochs": 1, "warmup_steps": 1000}, True),
        ({"max_steps": None, "epochs": 2, "warmup_steps": 0.5}, False),
    ],
)
def test_warmup_that_outlasts_the_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, float | None], warns: bool
) -> None:
    config = loading.validate(small(**{"epochs": None, **changes}), "x")
    rows = whole(Streams(store(tmp_path / "store", 8, 40)))
    spec = specs.data_of(config)
    updates = Updates(config.optimizer, 1.0, None, None, config.lr_scheduler, config.warmup_steps, None)
    describe_steps(spec, updates, micro_batches(spec, Data([rows], {})), replicas=1)
    assert ("never reaches optimizer.lr" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(("planned", "warns"), [(5, False), (6, True)])
def test_a_budget_of_ranks_that_outlasts_the_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: int, warns: bool
) -> None:
    config = loading.validate(small(epochs=None, max_steps=5), "x")
    asked = Asked("ADALORA", {"total_step": planned}, {})
    spec, adapter = specs.data_of(config), replace(to_train.adapter_of(config, ["layers.0.q_proj"]), by_peft=asked)
    updates = Updates(config.optimizer, 1.0, None, None, config.lr_scheduler, config.warmup_steps, None)
    batches = micro_batches(spec, Data([whole(Streams(store(tmp_path / "store", 8, 40)))], {}))
    describe_steps(spec, updates, batches, 1, adapter)
    said = capsys.readouterr().err
    assert ("peft.total_step = 6 in a run of 5 steps" in said and "set peft.total_step = 5" in said) == warns


@pytest.mark.parametrize(
    ("script", "typed", "offered"),
    [("train.py", "--pre", {"--preview", "--prepare"}), ("merge_lora.py", "--base-q", {"--base-quant"})],
)
def test_a_shell_is_told_how_the_line_may_go_on(tmp_path: Path, script: str, typed: str, offered: set[str]) -> None:
    """As argcomplete's shell function asks: the line in the environment, the answer on file descriptor 8."""
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / script).read_text()[:1024]
    line = f"{script} {typed}"
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
    }
    subprocess.run([sys.executable, script], cwd=ROOT, env=environment(**asked), check=False, timeout=60)
    assert {word.strip() for word in answer.read_text().split("\x0b")} == offered
