"""Memory or disk that runs out, refused by the system itself, ends a run with its exit code and says why.

Runs are `tests/workers/faulty_train.py`: the command, in which the allocator is asked for 4 PiB, or the metrics lie on /dev/full.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.console import RankError, run_command
from pipeline.training.metrics import Metrics
from pipeline.training.run import errors
from pipeline.training.run.stop import Watcher
from tests.helpers.builders import ROOT, finish, metrics, only_run, start, train, write_config


def no_memory_on_the_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_main_memory() -> None:
    torch.empty(2**52, dtype=torch.uint8)


def no_main_memory_for_python() -> None:
    bytearray(2**62)


def no_pinned_memory() -> None:
    raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


@pytest.mark.parametrize("ask", [no_memory_on_the_gpu, no_main_memory, no_main_memory_for_python, no_pinned_memory])
def test_every_way_of_running_out_of_memory_is_said_as_such(ask: Callable[[], None], tmp_path: Path) -> None:
    """And the last completed step is saved, by all processes: they are asked through `.stop`, which has the exit code."""
    saved: list[int] = []
    watcher = Watcher(set())
    watcher._run_dir = tmp_path
    with (
        pytest.raises(RankError, match=r"out of memory: .") as caught,
        errors.explained(watcher, lambda: saved.append(1)),
    ):
        ask()
    assert caught.value.exit_code == 5
    assert saved == [1]
    assert (tmp_path / ".stop").read_text() == "5"


def test_another_error_is_not_taken_for_one_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape") as caught, errors.explained(Watcher(set()), lambda: None):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")
    assert not isinstance(caught.value, RankError)


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    written = Metrics(tmp_path, 0, True)
    written._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    with (
        pytest.raises(RankError, match=r"the disk is full: .* free at .*No space left on device") as caught,
        errors.out_of_space_explained(tmp_path),
        errors.explained(Watcher(set()), lambda: None),
    ):
        written.log(1, {"train/loss": 1.0})
    assert caught.value.exit_code == 28


def test_events_on_a_full_disk(tmp_path: Path) -> None:
    """TensorBoard writes them in a thread of its own; the next sync has its error, and does not wait for it for ever."""
    written = Metrics(tmp_path, 0, True)
    record_writer = written._events.file_writer.event_writer._async_writer._writer
    record_writer._writer = Path("/dev/full").open("wb")  # noqa: SIM115
    with (
        pytest.raises(RankError, match=r"the disk is full: .* free at .*No space left on device") as caught,
        errors.out_of_space_explained(tmp_path),
        errors.explained(Watcher(set()), lambda: None),
    ):
        written.log(1, {"train/loss": 1.0})
        written.sync()
    assert caught.value.exit_code == 28


@pytest.mark.parametrize("code", [5, 6, 28])
def test_who_has_lost_the_others_lets_their_exit_code_come_first(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher looks once a second, and ends with the first code it sees."""
    done: list[float] = []
    # Of that module alone: other threads of this process sleep too.
    monkeypatch.setattr("pipeline.console.time", SimpleNamespace(sleep=done.append))
    monkeypatch.setattr("pipeline.console.os._exit", sys.exit)

    def main() -> int:
        raise RankError("it went wrong", code)

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code
    assert done == ([5.0] if code == 6 else [])


def faulty(folder: Path, base: Path, fault: str, expect: int) -> str:
    toml = write_config(folder / "c.toml", model=str(base), output_dir=str(folder / "runs"))
    launched = start(2, "--config", str(toml), script=ROOT / "tests/workers/faulty_train.py", FAULT=fault)
    return finish(launched, expect, timeout=120)


@pytest.mark.slow
def test_out_of_memory_in_a_step_saves_the_step_before(tmp_path: Path, base: Path) -> None:
    """Stage 1 fails in step 4; stage 0, which waits for it there, saves step 3 too. The run goes on from it to its end."""
    output = faulty(tmp_path, base, "step-memory:4", expect=5)
    assert "error: rank 1: out of memory: " in output
    assert "can't allocate memory" in output
    assert "Try activation_checkpointing" in output
    assert "Traceback" not in output
    run = only_run(tmp_path / "runs")
    assert [p.name for p in run.glob("global_step*")] == ["global_step3"]
    assert (run / "global_step3/manifest.json").exists()
    assert not list(run.glob(".staging-*"))
    train(2, "--config", str(tmp_path / "c.toml"), "--resume_from_checkpoint")
    assert [line["step"] for line in metrics(run) if "train/loss" in line] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_out_of_memory_while_loading(tmp_path: Path, base: Path) -> None:
    output = faulty(tmp_path, base, "load-memory", expect=5)
    assert "error: rank 1: out of memory: " in output
    assert "Traceback" not in output
    assert not [p for p in (tmp_path / "runs").iterdir() if (p / "config.toml").exists()]


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_metrics(tmp_path: Path, base: Path) -> None:
    output = faulty(tmp_path, base, "metrics-disk:3", expect=28)
    assert "error: rank 0: the disk is full: " in output
    assert "No space left on device" in output
    assert "Traceback" not in output
    assert [line["step"] for line in metrics(only_run(tmp_path / "runs"))] == [1, 2]
