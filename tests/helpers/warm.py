"""Runs under DeepSpeed's launcher whose processes are forks of one that has imported the libraries.

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
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
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
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        request = {
            "launchers": [[*_launcher(processes, count, node, port), str(script), *arguments] for node in range(count)],
            "environment": dict(environment),
            "folders": [str(folder) for folder in nodes or (Path.cwd(),)],
            "output": output.name,
        }
        connection = _server()
        connection.sendall(json.dumps(request).encode() + b"\n")
        launcher = json.loads(_line(connection, None))
        try:
            code = json.loads(_line(connection, timeout))
        except TimeoutError:
            os.killpg(launcher, signal.SIGKILL)
            _line(connection, None)
            raise TimeoutError(output.read()) from None
        return code, output.read()


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
    """As much of `subprocess.Popen` as DeepSpeed's launcher uses, by a fork that leaves the launcher's code as `_Script`."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _put(env)
            raise _Script(*command[2:])  # after the interpreter and its -u

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode


def _put(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _launch(request: dict[str, Any]) -> list[str]:
    """Be the launcher to the end of the run; in a process that it starts, returns the script and its arguments."""
    from deepspeed.launcher import launch

    os.setsid()
    node, others = _fork_for_others(len(request["folders"]))
    itself = os.getpid()
    os.chdir(request["folders"][node])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    _put(request["environment"])
    sys.argv = [launch.__file__, *request["launchers"][node]]
    try:
        with mock.patch.object(subprocess, "Popen", _Forked):
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
