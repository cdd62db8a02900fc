"""The processes of one launch: where they are, a name that they share, and work that one of them does while others wait.

Takes what the launcher set in the environment; needs no process group, and nothing but psutil. A node is a machine, or
what a launcher takes for one: its processes were started by one launcher process.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from pipeline.console import rank

LET_FIRST_RANK_S = 5.0


def world() -> int:
    """Processes of this launch on all nodes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here() -> int:
    """Processes of this launch on this node: DeepSpeed's LOCAL_SIZE, torchrun's LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world())


def over_nodes() -> bool:
    """Whether the launch has processes on another node."""
    return here() != world()


def nodes() -> int:
    """Nodes of this launch, as torchrun or DeepSpeed counts them."""
    return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("CROSS_SIZE") or 1) if over_nodes() else 1


def node() -> int:
    """The number of this node, as torchrun or DeepSpeed counts them; 0 where there is one."""
    return int(os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or 0) if over_nodes() else 0


def is_first_here() -> bool:
    """Whether this is the first process of its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def host() -> str:
    """The name of this machine, as it calls itself."""
    return socket.gethostname()


def launcher() -> str:
    """The name of this node's launcher: host, process id and start time. torchrun's stays when it restarts its processes."""
    process = psutil.Process(os.getppid() if "WORLD_SIZE" in os.environ else os.getpid())
    return f"{host()}-{process.pid}-{int(process.create_time() * 1000)}"


def attempt() -> int:
    """How often torchrun has restarted the processes of this launch (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launched_by() -> str:
    """A name all processes of this launch on this node share and no other launch has, nor an earlier attempt of it."""
    return f"{launcher()}.{attempt()}"


def remove_of_dead_launches(folder: Path, prefix: str) -> None:
    """Remove the files `<prefix><launched_by()>…` of this host's launches whose launcher is gone.

    Another host's process ids mean nothing here, so its files stay.
    """
    ours = re.compile(rf"{re.escape(prefix + host())}-(\d+)-\d+\.\d+(?:-.*)?")
    for left in folder.iterdir():
        if (found := ours.fullmatch(left.name)) and not psutil.pid_exists(int(found[1])):
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
