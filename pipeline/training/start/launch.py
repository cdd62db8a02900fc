"""How the program is started: the command to type, and whether the processes that were started can form the stages.

Needs neither torch nor DeepSpeed, so that what is wrong here is said at once.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.console import UserError


def command(processes: int, arguments: Sequence[str]) -> str:
    """What to type to start the program and its `arguments` on so many GPUs.

    `--quiet` leaves out what DeepSpeed's launcher says of itself, a dozen lines; not how a process ended.
    """
    kept = [argument for argument in arguments if not argument.startswith("--local_rank")]
    return shlex.join([_deepspeed(), "--quiet", "--num_gpus", str(processes), *kept])


def check_processes(stages: int) -> None:
    """UserError if the processes that were started cannot form `stages` stages; known before anything is read."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world)
    if here != world:
        raise UserError(f"{world} processes over several machines, {here} of them here: a run lives on one machine")
    if not world % stages:
        return
    if "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"pipeline_stages = {stages} takes {stages} processes, and no launcher started any: type\n"
            f"  {command(stages, sys.argv)}"
        )
    raise UserError(
        f"pipeline_stages = {stages} does not divide the {world} process(es) started; set pipeline_stages = {world}, "
        f"or start {stages} (or a multiple of it):\n  {command(stages, sys.argv)}"
    )


def _deepspeed() -> str:
    """The launcher of this environment, by its name where the shell finds it by that."""
    ours, found = Path(sys.executable).with_name("deepspeed"), shutil.which("deepspeed")
    if not ours.exists() or (found and Path(found).samefile(ours)):
        return "deepspeed"
    return str(ours.relative_to(Path.cwd()) if ours.is_relative_to(Path.cwd()) else ours)
