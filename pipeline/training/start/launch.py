"""How the program is started: the command to type, and whether the processes that were started can form the stages.

Needs neither torch nor DeepSpeed, so that what is wrong here is said at once.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from pipeline import processes
from pipeline.console import UserError

TORCHRUN = ("torchrun", "torch.distributed.run")  # as a program, and as a module


def command(n_processes: int, arguments: Sequence[str]) -> str:
    """What to type to start the program and its `arguments` on so many GPUs of one machine.

    `--quiet` leaves out what DeepSpeed's launcher says of itself, a dozen lines; not how a process ended.
    """
    return shlex.join([_program("deepspeed"), "--quiet", "--num_gpus", str(n_processes), *_own(arguments)])


def command_again(arguments: Sequence[str]) -> str:
    """What to type to start the program and its `arguments` as this launch was started: by which launcher, on which nodes.

    Of torchrun, and of DeepSpeed's launcher over several nodes, its own words are taken from the process above us. Where a
    line has to be typed on more than one node, a comment at its end says so.
    """
    if is_torchrun():
        words = _words_before(arguments[0], TORCHRUN) or _counted_torchrun()
        line = shlex.join([_program("torchrun"), *words, *_own(arguments)])
    elif processes.over_nodes():
        words = _words_before(arguments[0], ("deepspeed", "ds")) or ["--hostfile", "HOSTFILE"]
        line = shlex.join([_program("deepspeed"), *words, *_own(arguments)])
        if "--no_ssh" not in words:
            return f"{line}  # HOSTFILE: the one of this launch" if "HOSTFILE" in words else line
    else:
        return command(processes.world(), arguments)
    if "SLURM_STEP_ID" in os.environ:
        return f"srun --nodes {processes.nodes()} --ntasks-per-node 1 {line}"
    if not processes.over_nodes():
        return line
    own = next((word.split("=")[0] for word in words if word.replace("_", "-").startswith("--node-rank")), None)
    return f"{line}  # on each of the {processes.nodes()} nodes" + (f", each with its own {own}" if own else "")


def is_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_processes(stages: int) -> None:
    """UserError if the processes that were started cannot form `stages` stages; known before anything is read."""
    world, tasks = processes.world(), os.environ.get("SLURM_NTASKS", "1")
    if "WORLD_SIZE" not in os.environ and tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"SLURM_NTASKS = {tasks}: srun alone would make {tasks} runs of this, each on the first GPU. Let it start "
            "torchrun once a node, which starts a process for each GPU:\n"
            "  srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node GPUS_OF_A_NODE --rdzv-backend c10d "
            f"--rdzv-id $SLURM_JOB_ID --rdzv-endpoint FIRST_NODE:29500 {shlex.join(_own(sys.argv))}"
        )
    if not world % stages:
        return
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"pipeline_stages = {stages} takes {stages} processes, and no launcher started any: type\n"
            f"  {command(stages, sys.argv)}"
        )
    if processes.over_nodes():
        raise UserError(
            f"pipeline_stages = {stages} does not divide the {world} processes started on {processes.nodes()} nodes; set "
            f"pipeline_stages = {world}, or start {stages} (or a multiple of it) on all nodes together"
        )
    raise UserError(
        f"pipeline_stages = {stages} does not divide the {world} process(es) started; set pipeline_stages = {world}, "
        f"or start {stages} (or a multiple of it):\n  {command(stages, sys.argv)}"
    )


def _own(arguments: Sequence[str]) -> list[str]:
    """Without what DeepSpeed's launcher adds."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def _words_before(script: str, programs: Sequence[str]) -> list[str]:
    """What stands between a launcher and `script` on the command line of the process above us that is one of `programs`."""
    try:
        above = psutil.Process().parents()
    except psutil.Error:
        return []
    for process in above:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        called = next((i for i, word in enumerate(words) if Path(word).name in programs), None)
        if called is not None and script in words[called:]:
            return words[called + 1 : words.index(script, called)]
    return []


def _counted_torchrun() -> list[str]:
    """torchrun's options where its command line cannot be read."""
    if not processes.over_nodes():
        return ["--standalone", "--nproc-per-node", str(processes.world())]
    return ["--nnodes", str(processes.nodes()), "--nproc-per-node", str(processes.here())]


def _program(name: str) -> str:
    """A launcher of this environment, by its name where the shell finds it by that."""
    ours, found = Path(sys.executable).with_name(name), shutil.which(name)
    if not ours.exists() or (found and Path(found).samefile(ours)):
        return name
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)
