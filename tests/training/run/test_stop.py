"""Stop signals to every process of the tree, signal files and lost processes: one saved state, no orphan."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.console import RankError
from pipeline.training.run import errors
from pipeline.training.run.stop import Watcher
from tests.helpers.builders import finish, metrics, only_run, start, write_config
from tests.helpers.paths import WORKERS


def test_out_of_memory_while_loading_is_said_as_such() -> None:
    """There is no run's folder yet in which the others could be told."""
    with (
        pytest.raises(RankError, match="out of memory: no room") as caught,
        errors.explained(Watcher(set()), lambda: None),
    ):
        raise torch.OutOfMemoryError("no room")
    assert caught.value.exit_code == 5


def started(folder: Path, base: Path) -> tuple[subprocess.Popen[str], list[int], Path]:
    """A long run over two stages that has done a step: its launcher, its ranks' process ids, its folder."""
    toml = write_config(
        folder / "c.toml", model=str(base), output_dir=str(folder / "runs"), max_steps=100000, epochs=1000
    )
    launcher = start(2, "--config", str(toml))
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert launcher.poll() is None, launcher.communicate()
        files = list((folder / "runs").glob("2*/metrics.jsonl"))
        if files and files[0].read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    below = psutil.Process(launcher.pid).children(recursive=True)
    ranks = [
        p.pid
        for p in below
        if "--local_rank" in " ".join(p.cmdline()) and "launcher.launch" not in " ".join(p.cmdline())
    ]
    assert len(ranks) == 2
    return launcher, ranks, only_run(folder / "runs")


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "whom",
    [
        *(pytest.param(whom, marks=pytest.mark.slow) for whom in ("one rank", "the group", "launch.py", "save_quit")),
        "the deepspeed command",
        pytest.param("killed launcher", marks=pytest.mark.slow),
    ],
)
def test_a_stop_ends_in_a_saved_state_and_no_orphan(tmp_path: Path, base: Path, whom: str) -> None:
    launcher, ranks, run = started(tmp_path, base)
    launch_py = psutil.Process(ranks[0]).ppid()
    if whom == "one rank":
        os.kill(ranks[1], signal.SIGTERM)
    elif whom == "the group":
        os.killpg(launcher.pid, signal.SIGINT)  # Ctrl-C in a terminal
    elif whom == "launch.py":
        os.kill(launch_py, signal.SIGTERM)
    elif whom == "the deepspeed command":
        os.kill(launcher.pid, signal.SIGTERM)
    elif whom == "killed launcher":
        os.kill(launch_py, signal.SIGKILL)
    else:
        (run / "save_quit").touch()
    assert gone(ranks, 30), "orphans"
    output, _ = launcher.communicate(timeout=60)
    if whom in ("one rank", "save_quit"):
        assert launcher.returncode == 75, output
    assert "--resume_from_checkpoint" in output
    done = max(line["step"] for line in metrics(run))
    assert (run / f"global_step{done}/manifest.json").exists()
    assert not list(run.glob(".staging-*"))
    if whom == "save_quit":
        assert (run / f"step{done}/adapter_model.safetensors").exists()
        assert not (run / "save_quit").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(tmp_path: Path, base: Path) -> None:
    launcher, ranks, _ = started(tmp_path, base)
    os.kill(ranks[1], signal.SIGKILL)
    assert gone(ranks, 40)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert f"error: rank 0: lost rank 1 (process {ranks[1]}): step " in output
    assert "killed by SIGKILL, as the system does when memory runs out" in output or "it is gone" in output
    assert "no checkpoint had been written yet" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_the_last_step_saved(tmp_path: Path, base: Path) -> None:
    """It sleeps in the forward pass of step 3; its second thread can still save."""
    toml = write_config(
        tmp_path / "c.toml", model=str(base), output_dir=str(tmp_path / "runs"), hang_timeout_minutes=0.05
    )
    faulty = WORKERS / "faulty_train.py"
    output = finish(start(2, "--config", str(toml), script=faulty, FAULT="step-hang:3"), expect=6, timeout=240)
    assert re.search(
        r"error: no progress for \d+\.\d s\. rank 1 hangs:\n  rank 1 \(process \d+\): step 3, the forward", output
    )
    assert re.search(r"the others wait:\n  rank 0 \(process \d+\): step 3, ", output)
    assert "rank 1 stands at faulty_train.py:" in output
    assert "stopped after step 2; resume with" in output
    assert (only_run(tmp_path / "runs") / "global_step2/manifest.json").exists()


@pytest.mark.slow
def test_a_run_that_was_paused_goes_on_and_so_does_one_with_a_file_named_save(tmp_path: Path, base: Path) -> None:
    launcher, ranks, run = started(tmp_path, base)
    for _ in range(3):
        os.killpg(launcher.pid, signal.SIGSTOP)  # Ctrl-Z
        time.sleep(0.5)
        os.killpg(launcher.pid, signal.SIGCONT)
        time.sleep(0.2)
    (run / "save").touch()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (list(run.glob("global_step*")) and list(run.glob("step*"))):
        time.sleep(0.1)
    assert list(run.glob("global_step*"))
    assert list(run.glob("step*"))
    assert launcher.poll() is None
    os.kill(ranks[0], signal.SIGQUIT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75
