"""Several nodes on one machine: launchers of their own over 127.0.0.1, each in a working folder of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import warm
from tests.helpers.builders import ROOT, environment

# Where a machine's name leads is its own matter; here all is on the loopback.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}


def folders(folder: Path, nodes: int = 2) -> list[Path]:
    """A working folder for each node."""
    made = [folder / f"node{node}" for node in range(nodes)]
    for each in made:
        each.mkdir(exist_ok=True)
    return made


def agents(
    folder: Path, *arguments: str, options: tuple[str, ...] = (), script: str = "train.py", **extra: str
) -> list[subprocess.Popen[str]]:
    """`torchrun --nnodes 2 --nproc-per-node 1 train.py …` on two nodes; the first one's process is rank 0. `extra`: variables."""
    port = warm.free_port()
    return [
        subprocess.Popen(
            [
                str(Path(sys.executable).parent / "torchrun"),
                *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), *options),
                str(ROOT / script),
                *arguments,
            ],
            cwd=where,
            env=environment(**LOOPBACK, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for node, where in enumerate(folders(folder))
    ]


def warm_agents(folder: Path, *arguments: str) -> warm.Launched:
    """As `agents`, in forks of an interpreter that has the libraries: torchrun's own code, and the run's."""
    return warm.torchrun(arguments, ROOT / "train.py", environment(**LOOPBACK), tuple(folders(folder)))


def ended(launchers: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What each printed, when all have ended."""
    said = []
    try:
        for launcher in launchers:
            said.append(launcher.communicate(timeout=timeout)[0])
    except subprocess.TimeoutExpired:
        for launcher in launchers:
            os.killpg(launcher.pid, signal.SIGKILL)
        raise AssertionError("timed out:\n" + "\n".join(launcher.communicate()[0] for launcher in launchers)) from None
    return said


def deepspeed(folder: Path, *arguments: str, expect: int = 0, timeout: float = 240, per_node: int = 1) -> str:
    """`deepspeed --hostfile … --no_ssh train.py …` on two nodes, to its end; what both printed."""
    where = tuple(folders(folder))
    code, output = warm.run(per_node, ROOT / "train.py", arguments, environment(**LOOPBACK), timeout, where)
    assert code == expect, f"exit code {code}, expected {expect}:\n{output}"
    return str(output)
