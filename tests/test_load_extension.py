"""DeepSpeed's compiled extension: a lock file left by a killed build does not stop the start, a living builder does.

A process of its own loads a copy of what was built (nothing is compiled), from a folder with torch's lock in it.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from builders import ROOT, environment
from torch.utils.file_baton import FileBaton

NAME, OURS = "deepspeed_shm_comm", ".one-at-a-time"
LOAD = "from pipeline.training import engine; engine._load_extension(); print('loaded')"


def waits_for(process: subprocess.Popen[str], file: Path, within_s: float) -> bool:
    """Whether the process comes to the point where it has `file` open and sleeps."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and process.poll() is None:
        if any(Path(opened.path) == file for opened in psutil.Process(process.pid).open_files()):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_stale_lock_is_cleared_and_a_living_builder_is_waited_for(tmp_path: Path) -> None:
    built = Path(environment()["TORCH_EXTENSIONS_DIR"]) / NAME
    if not (built / f"{NAME}.so").exists():
        pytest.skip("the extension has not been built here")
    shutil.copytree(
        built, tmp_path / NAME, ignore=shutil.ignore_patterns("lock")
    )  # times too: ninja finds it up to date
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / NAME).glob("*.so")}
    lock = tmp_path / NAME / "lock"
    lock.touch()
    assert not FileBaton(str(lock)).try_acquire(), "torch takes it for a build under way"
    with (tmp_path / OURS).open("a") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)  # a process that builds
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD], cwd=ROOT, env=environment(TORCH_EXTENSIONS_DIR=str(tmp_path)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            assert waits_for(process, tmp_path / OURS, 120), process.communicate()[0]
            time.sleep(0.5)
            assert lock.exists() and process.poll() is None, "the lock of a living builder was taken away"
            fcntl.flock(ours, fcntl.LOCK_UN)  # it has ended, or was killed: the system frees its lock
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0 and "loaded" in output, output
    assert not lock.exists()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / NAME).glob("*.so")} == times, (
        "it was built again"
    )
    assert os.listdir(tmp_path) and (tmp_path / OURS).exists()
