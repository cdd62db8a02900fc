"""Runs under DeepSpeed's launcher, or torchrun, whose processes are forks of one that has imported the libraries.

`deepspeed train.py` imports torch and DeepSpeed in the launcher, in its part on the node and, with transformers, in every
process of the run: some eight seconds of CPU each, far more than the tests' runs take. Here DeepSpeed's own `launch.main` is
run, and the script in the processes that it starts, with the environment, arguments and session that they would have. What
is left out is `deepspeed`'s search for GPUs and hosts, and that interpreters are new: tests of starting, stopping and memory use
`builders.start`.
"""

import atexit
import base64
import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from tests.helpers.paths import ROOT

LIBRARIES = (
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.cohere.modeling_cohere",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "pyarrow.parquet",
    "pydantic",
    "rich.progress",
)


def run(
    processes: int,
    script: Path,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    timeout: float,
    nodes: tuple[Path, ...] = (),
) -> Any:
    """Run `script` in so many processes to its end; its exit code and what it printed.

    With `nodes`, a working folder for each, every one has a launcher of its own, with so many processes: as
    `deepspeed --hostfile … --no_ssh` starts them. Raises TimeoutError, with what was printed, when it takes longer than
    `timeout` seconds; nothing of it is left then.
    """
    count, port = max(1, len(nodes)), free_port() if nodes else 29500
    launchers = [[*_launcher(processes, count, node, port), str(script), *arguments] for node in range(count)]
    launched = Launched("deepspeed.launcher.launch", launchers, environment, nodes or (Path.cwd(),))
    return launched.ended(timeout)


def torchrun(
    options: tuple[str, ...], script: Path, environment: Mapping[str, str], nodes: tuple[Path, ...]
) -> "Launched":
    """`torchrun --nnodes … --nproc-per-node 1 SCRIPT` on `nodes`, each in its working folder; `options` go to the script."""
    at = ("--nnodes", str(len(nodes)), "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    port = str(free_port())
    launchers = [
        [*at, "--master-port", port, "--node-rank", str(node), str(script), *options] for node in range(len(nodes))
    ]
    return Launched("torch.distributed.run", launchers, environment, nodes)


class Launched:
    """A launch that is under way, with a launcher on each node: its `main`, run in a fork. One at a time."""

    def __init__(
        self, module: str, launchers: list[list[str]], environment: Mapping[str, str], folders: tuple[Path, ...]
    ) -> None:
        self._output = tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace")  # noqa: SIM115
        request = {
            "module": module,
            "launchers": launchers,
            "environment": dict(environment),
            "folders": [str(folder) for folder in folders],
            "output": self._output.name,
        }
        self._connection = _server()
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self.launchers: list[int] = [json.loads(_line(self._connection, None))]  # process ids, of each node
        while len(self.launchers) < len(folders):
            below = Path(f"/proc/{self.launchers[0]}/task/{self.launchers[0]}/children")
            self.launchers[1:] = [int(child) for child in below.read_text().split()[: len(folders) - 1]]

    def said(self) -> str:
        """What all of it has printed so far."""
        return Path(self._output.name).read_text(encoding="utf-8", errors="replace")

    def ended(self, timeout: float) -> Any:
        """The first launcher's exit code and what was printed, when all have ended; TimeoutError as in `run`."""
        with self._output:
            try:
                code = json.loads(_line(self._connection, timeout))
            except TimeoutError:
                os.killpg(self.launchers[0], signal.SIGKILL)
                _line(self._connection, None)
                raise TimeoutError(self._output.read()) from None
            return code, self._output.read()


def _launcher(processes: int, nodes: int, node: int, port: int) -> list[str]:
    """The launcher's own arguments, as `deepspeed --quiet --num_gpus N` gives them to its part on a node."""
    hosts = {f"node{number}" if nodes > 1 else "localhost": list(range(processes)) for number in range(nodes)}
    world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
    return [
        f"--world_info={world}",
        f"--node_rank={node}",
        "--master_addr=127.0.0.1",
        f"--master_port={port}",
        "--quiet",
    ]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@cache
def _server() -> socket.socket:
    """The connection to this process's server, started at the first call and ended with this process."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.helpers.warm", str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    atexit.register(server.wait)
    atexit.register(ours.close)  # called first; the server ends where nobody listens
    return ours


def _line(connection: socket.socket, timeout: float | None) -> bytes:
    connection.settimeout(timeout)
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(1)
        assert piece, "the server of warm runs has died"
        line += piece
    return line


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """In the server: fork for every request and tell how it ended, until nobody listens. In a fork: the request."""
    with connection.makefile("r") as requests:
        for line in requests:
            launcher = os.fork()
            if not launcher:
                return json.loads(line)  # type: ignore[no-any-return]
            connection.sendall(f"{launcher}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
            connection.sendall(f"{code}\n".encode())
    return None


class _Script(BaseException):
    """In a process that was started: what it has to run."""


class _Forked:
    """As much of `subprocess.Popen` as the launchers use, by a fork that leaves the launcher's code as `_Script`."""

    def __init__(
        self, args: list[str], env: Mapping[str, str], *, start_new_session: bool = False, **_streams: None
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # the launcher's handlers do not outlive an exec
            _put(env)
            raise _Script(*args[2:])  # after the interpreter and its -u

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired."""
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _put(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _launch(request: dict[str, Any]) -> list[str]:
    """Be the launcher to the end of the run; in a process that it starts, returns the script and its arguments."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    launch = importlib.import_module(request["module"])
    os.setsid()
    node, others = _fork_for_others(len(request["folders"]))
    itself = os.getpid()
    os.chdir(request["folders"][node])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    _put(request["environment"])
    sys.argv = [str(launch.__file__), *request["launchers"][node]]
    try:
        with mock.patch.object(subprocess, "Popen", _Forked), mock.patch.object(subprocess_handler, "Popen", _Forked):
            launch.main()
    except _Script as script:
        return list(script.args)
    finally:
        for other in others if os.getpid() == itself else ():
            os.waitpid(other, 0)
    sys.exit()


def _fork_for_others(nodes: int) -> tuple[int, list[int]]:
    """A process for every node but the first, which knows the others; the node of this one."""
    others = []
    for node in range(1, nodes):
        if not (other := os.fork()):
            return node, []
        others.append(other)
    return 0, others


def main() -> NoReturn:
    """Import, serve, and be what is asked for."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for library in LIBRARIES:
        importlib.import_module(library)
    request = _serve(connection)
    if request is None:
        sys.exit()
    connection.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=True)  # type: ignore[union-attr]  # as the interpreter's -u
    sys.argv = _launch(request)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    main()
