"""Killed before any change it makes to the file system, a process leaves checkpoints that are whole, and rubbish.

A forked process dies at its n-th change, for every n: Python's audit events tell of each before it is made.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import saved_at
from pipeline.files import atomic_folder
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.checkpoint import retention
from pipeline.training.checkpoint.manifest import CheckpointError, verify
from tests.helpers.checkpoints import facts

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink"}
MOST = 200  # changes that nothing here comes near


def save(run: Path, step: int, value: float | None = None) -> Path:
    tensors = {"w": torch.full((8,), float(step if value is None else value))}
    return checkpoint.save(run, "launch", 0, 1, step, tensors, facts(1))


def killed_at(n: int, do: Callable[[], object]) -> bool:
    """Whether a process that does `do` was killed before its n-th change."""
    child = os.fork()
    if child == 0:
        left = [n]

        def count(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            do()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return os.WIFSIGNALED(status)


def values(folder: Path) -> set[float]:
    return {float(x) for _, value in checkpoint.read(folder, verify(folder)) for x in value()}


def replaced(run: Path) -> None:
    save(run, 4, value=40.0)


def pruned(run: Path) -> None:
    retention.prune(run, "global_step", 1)


def saved_and_pruned(run: Path) -> None:
    save(run, 6)
    retention.prune(run, "global_step", 2)


def cleared(run: Path) -> None:
    retention.clear_rubbish(run)


@pytest.mark.parametrize("do", [save, replaced, pruned, saved_and_pruned])
def test_a_kill_at_every_change_leaves_whole_checkpoints(tmp_path: Path, do: Callable) -> None:
    """Found before anything is cleared, and still there after; then killed while clearing, and cleared again."""
    for n in range(1, MOST):
        run = tmp_path / f"run{n}"
        for step in (2, 4):
            save(run, step)
        killed = killed_at(n, lambda run=run: do(run, 6) if do is save else do(run))
        folder, manifest = checkpoint.find(run, newest_run=False)
        assert manifest["step"] in (4, 6)
        assert values(folder) <= {float(manifest["step"]), 40.0}
        clears = 0
        while killed_at(clears + 1, lambda run=run: cleared(run)):
            clears += 1
            assert checkpoint.find(run, newest_run=False)[1] == manifest
        assert checkpoint.find(run, newest_run=False)[0] == run / f"global_step{manifest['step']}"
        for _, each in retention.numbered(run, "global_step"):
            verify(each)
        assert {p.name.split("step")[0] for p in run.iterdir()} == {"global_"}
        if not killed:
            assert n > 5
            return
    raise AssertionError("it never came to its end")


def test_a_kill_at_every_change_of_a_replaced_adapter_leaves_one(tmp_path: Path) -> None:
    """`best_loss` is replaced; what stood there comes back when the run does."""

    def improve(run: Path, step: int) -> None:
        with atomic_folder(run / "best_loss", replace=True) as folder:
            saved_at.mark(folder, step)

    for n in range(1, MOST):
        run = tmp_path / f"run{n}"
        run.mkdir()
        improve(run, 2)
        killed = killed_at(n, lambda run=run: improve(run, 4))
        retention.clear_rubbish(run)
        assert saved_at.step_of(run / "best_loss") in (2, 4)
        assert [p.name for p in run.iterdir()] == ["best_loss"]
        if not killed:
            return
    raise AssertionError("it never came to its end")


def test_what_waits_to_be_put_back_is_found_by_its_name_too(tmp_path: Path) -> None:
    folder = retention.put_away(save(tmp_path, 4))
    assert checkpoint.find(tmp_path / "global_step4", newest_run=False)[0] == folder
    save(tmp_path, 4, value=40.0)
    assert values(checkpoint.find(tmp_path / "global_step4", newest_run=False)[0]) == {40.0}


def test_a_checkpoint_half_deleted_by_an_earlier_version_is_not_put_back(tmp_path: Path) -> None:
    """It deleted the shards first and kept the manifest."""
    save(tmp_path, 2)
    trash = save(tmp_path, 4).rename(tmp_path / ".trash-global_step4-4711")
    (trash / "rank-0.safetensors").unlink()
    assert checkpoint.find(tmp_path, newest_run=False)[1]["step"] == 2
    retention.clear_rubbish(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["global_step2"]


def test_what_cannot_be_deleted_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some network file systems keep what another process holds open."""
    save(tmp_path, 2)

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", busy)
    retention.prune(tmp_path, "global_step", 0)
    assert "could not be deleted" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        checkpoint.find(tmp_path, newest_run=False)


def test_what_was_saved_later_than_the_step_is_put_aside_whatever_its_name(tmp_path: Path) -> None:
    """Of the abandoned branch are its best loss, its epochs and what followed it; of ours, what is as old as the step."""
    made = {"best_loss": 5, "epoch1": 3, "epoch2": 6, "merged": 6, "step2": 2, "step6": 6}
    for name, step in made.items():
        (tmp_path / name).mkdir()
        saved_at.mark(tmp_path / name, step)
    for step in (2, 3, 5):
        (tmp_path / f"global_step{step}").mkdir()
    (tmp_path / "notes").mkdir()
    assert set(retention.abandon_after(tmp_path, 3)) == {"best_loss", "epoch2", "merged", "step6", "global_step5"}
    there = {p.name for p in tmp_path.iterdir()}
    assert {n for n in there if not n.startswith("abandoned-")} == {
        "epoch1",
        "step2",
        "global_step2",
        "global_step3",
        "notes",
    }
    assert {n.split("-")[1] for n in there if n.startswith("abandoned-")} == {
        "best_loss",
        "epoch2",
        "merged",
        "step6",
        "global_step5",
    }
    assert retention.abandon_after(tmp_path, 3) == []
