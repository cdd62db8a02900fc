"""README.md's and docs's commands run as they stand, in a checkout laid out as they assume; those that cannot are named here."""

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.builders import environment
from tests.helpers.docs_layout import Command, commands, lay_out
from tests.helpers.paths import ROOT

COMMANDS = commands()
# Two processes where the page's machine has two GPUs: "On a machine without a GPU say how many processes to start".
LAUNCHER = ("deepspeed train.py", "deepspeed --num_gpus 2 train.py")
# The environment is there.
MAKE = ("make ", "make -o .venv/.installed ")
WRITTEN = ("OUT", "MERGED", "EXPORTED", "X.gguf", "config.toml", "comparison.html", "comparison.png", "adapter.html")
CONVERSATION = "The salt was\nand then?\n"
NEEDS_TWO_NODES = (
    "two machines on a network: tests/training/run/test_namespaces.py runs its like between two namespaces"
)
NEEDS_VLLM = "vLLM is not installed beside this torch: docs/serving.md says what was run by hand"
NEEDS_LLAMA = "llama.cpp is not a Python package of ours: tests/house/test_serving_llama_cpp.py loads its files"
NOT_RUN = {
    "git clone ADDRESS mulora-pipe && cd mulora-pipe && make train": "clones: tests/house/test_readme.py runs the rest",
    "hf download mistralai/Mistral-7B-Instruct-v0.3": "downloads 14 GB",
    "make train": "minutes: tests/house/test_readme.py runs it",
    "make test": "it is what runs this",
    "export GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1": NEEDS_TWO_NODES,
    "torchrun --nnodes 2 --nproc-per-node 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29500 train.py "
    "--config my_run.toml": NEEDS_TWO_NODES,
    "deepspeed --hostfile hosts --master_addr 10.0.0.1 train.py --config my_run.toml": NEEDS_TWO_NODES,
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id my-run --rdzv-endpoint 10.1.0.4:29500 "
    "--max-restarts 3 train.py --config my_run.toml": NEEDS_TWO_NODES,
    'srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS_OF_A_NODE" \\': "SLURM: tests/house/test_clusters.py",
    "python evaluate_lora.py --config EVAL.toml --tasks arc_easy hellaswag --adapters base ADAPTER": "the tasks' data is on "
    "the Hub: tests/evaluation/test_harness.py runs tasks of its own",
    "vllm serve MERGED": NEEDS_VLLM,
    "vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules style=EXPORTED": NEEDS_VLLM,
    "python convert_hf_to_gguf.py MERGED --outfile merged.gguf --outtype bf16": NEEDS_LLAMA,
    "llama-server -m merged.gguf": NEEDS_LLAMA,
    "llama-server -m base.gguf --lora X.gguf": NEEDS_LLAMA,
    "llama-server -m base.gguf --lora-scaled X.gguf:0.5": NEEDS_LLAMA,
}
# What it says besides: the next commands, ready to paste; of the doctor a line for each thing it looks at.
SAYS = {
    "deepspeed train.py": ("python generate.py", "python inspect_lora.py", "python merge_lora.py", "report.html"),
    "merge_lora.py": ("Verdict: ", "python generate.py"),
    "--format peft": ("python generate.py",),
    "--format gguf": ("llama-server -m",),
    "make_adapter.py": ("python generate.py", "python merge_lora.py"),
    "make doctor": (
        *("Python ", "packages", "main memory", "/dev/shm", "open files", "room on disk", "disk ", "GPU ", "bf16"),
        *("between stages", "bitsandbytes", "Triton", "flash attention"),
    ),
}
SERVERS = [command for command in COMMANDS if command.line.startswith("tensorboard ")]
RUN = [command for command in COMMANDS if command.line not in NOT_RUN and command not in SERVERS]


def named(command: Command) -> str:
    return f"{command.page} {command.line}"


def test_what_is_not_run_is_still_there_and_so_are_the_tests_named_instead() -> None:
    assert set(NOT_RUN) <= {command.line for command in COMMANDS}
    for why in NOT_RUN.values():
        for test in re.findall(r"(?:tests|docs)/[\w/]+\.(?:py|md)", why):
            assert (ROOT / test).exists(), test


def test_most_are_run() -> None:
    assert len(RUN) > 2 * len(NOT_RUN)
    assert {command.page for command in RUN} >= {"README.md", "samples.md", "serving.md", "evaluation.md", "recipes.md"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("docs") / "mulora-pipe"
    lay_out(tree)
    return tree


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def in_a_terminal(line: str, tree: Path, typed: str) -> tuple[int, str]:
    """Run a line as at a terminal where `typed` is typed, then Ctrl-D; the exit code and what it printed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["bash", "-c", line],
        cwd=tree,
        env=environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        os.close(theirs)
        os.write(ours, f"{typed}\x04".encode())
        try:
            said, _ = running.communicate(timeout=200)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            os.close(ours)
    return running.returncode, said


def ensure_trained(tree: Path) -> None:
    """A run in OUTPUT_DIR: README.md's training command, if it has not been run yet."""
    if not list(tree.glob("OUTPUT_DIR/*/step*")):
        (line,) = {c.line for c in RUN if c.line.startswith("deepspeed train.py") and "--resume" not in c.line}
        code, said = in_a_terminal(line.replace(*LAUNCHER), tree, "")
        assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=named)
def test_it_runs(tree: Path, command: Command) -> None:
    """In the order of the pages: a run that one starts another resumes. What one wrote is not in the next one's way."""
    for name in WRITTEN:
        remove(tree / name)
    if "--resume_from_checkpoint" in command.line:
        ensure_trained(tree)
    code, said = in_a_terminal(command.line.replace(*LAUNCHER).replace(*MAKE), tree, CONVERSATION)
    assert code == 0, said
    assert "Traceback" not in said, said
    for script, words in SAYS.items():
        if script in command.line and "--dry-run" not in command.line:
            assert all(word in said for word in words), said


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVERS, ids=named)
def test_tensorboard_shows_the_runs(tree: Path, command: Command) -> None:
    """Until it knows the loss of a run."""
    if "OUTPUT_DIR" in command.line:
        ensure_trained(tree)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(["bash", "-c", f"exec {command.line} --port {port}"], cwd=tree, env=environment())
    try:
        assert '"train/loss"' in answer(f"http://127.0.0.1:{port}/data/plugin/scalars/tags", within_s=100)
    finally:
        server.terminate()
        server.wait(20)


def answer(url: str, within_s: float) -> str:
    """What the server says there as soon as it says more than an empty object."""
    until, said = time.monotonic() + within_s, ""
    while time.monotonic() < until and len(said) < 3:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(url, timeout=10) as found:
                said = found.read().decode()
        except (urllib.error.URLError, ConnectionError):
            continue
    return said
