"""The processes of one launch on this machine: a name that they share, and work that one of them does while the others wait.

Takes what the launcher set in the environment; needs no process group, and nothing but psutil.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from pipeline.console import rank

LET_FIRST_RANK_S = 5.0


def launched_by() -> str:
    """A name all processes of this launch share and no other launch has: the launcher's process id and start time."""
    launcher = psutil.Process(os.getppid() if "WORLD_SIZE" in os.environ else os.getpid())
    return f"{launcher.pid}-{int(launcher.create_time() * 1000)}"


def remove_of_dead_launches(folder: Path, prefix: str) -> None:
    """Remove the files `<prefix><launched_by()>…` of launches whose launcher is gone."""
    for left in folder.glob(f"{prefix}[0-9]*-*"):
        if not psutil.pid_exists(int(left.name.removeprefix(prefix).split("-")[0])):
            left.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(lock: Path, done: Callable[[], bool]) -> Iterator[None]:
    """Hold the file `lock`, which is made where it is not; the system frees it when a process dies, however it dies.

    Unless the work is `done`, other ranks give the first some seconds to begin: it is the one that shows progress.
    """
    with open(lock, "a") as file:
        patience = time.monotonic() + (LET_FIRST_RANK_S if rank() else 0)
        while time.monotonic() < patience and not done() and not _is_held(file):
            time.sleep(0.02)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
