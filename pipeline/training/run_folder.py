"""A run's folder: a new one, or the one a resumed run goes on in.

Takes where to look and what to go on from; gives the folder, locked for this run, and the checkpoint's manifest. The
first process decides; the others are told.
"""

import fcntl
import json
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.console import UserError, say
from pipeline.training import checkpoint
from pipeline.training.engine import Place
from pipeline.training.stop import STOP_FILE

LOCK = ".lock"
RESUME = "--resume_from_checkpoint"


def find_checkpoint(output_dir: Path, resume: bool | str) -> tuple[Path, dict[str, Any]] | None:
    """What `resume_from_checkpoint` means: None, or a verified checkpoint and its manifest. CheckpointError if there is none."""
    if not resume:
        return None
    return checkpoint.find(output_dir if resume is True else Path(resume), newest_run=resume is True)


def open_run(
    output_dir: Path, resumed: tuple[Path, dict[str, Any]] | None, place: Place, config_toml: str
) -> tuple[Path, Path | None, dict[str, Any] | None]:
    """(the run's folder, the checkpoint to go on from or None, its manifest), the same on all processes.

    `resumed` counts on the first process only. Raises UserError, everywhere, if another run is at work in the folder.
    """
    told: list[Any] = [None, None]
    if place.rank == 0:
        try:
            told = [(*_take_folder(output_dir, resumed, config_toml), resumed and resumed[1]), None]
        except UserError as error:
            told = [None, str(error)]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise UserError(told[1])
    run_dir, folder, manifest = told[0]
    say(f"run:      {run_dir}")
    return Path(run_dir), folder and Path(folder), manifest


def _take_folder(
    output_dir: Path, resumed: tuple[Path, dict[str, Any]] | None, config_toml: str
) -> tuple[str, str | None]:
    folder = resumed[0] if resumed else None
    # A checkpoint that was copied somewhere alone starts a new run: what lies beside it is not ours.
    is_run = folder is not None and (folder.parent / "metrics.jsonl").exists()
    run_dir = folder.parent if folder is not None and is_run else _new_folder(output_dir)
    _lock(run_dir)
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    checkpoint.clear_rubbish(run_dir)
    if resumed and (abandoned := checkpoint.abandon_after(run_dir, resumed[1]["step"])):
        say(f"later than the checkpoint, renamed to abandoned-…: {', '.join(abandoned)}")
    (run_dir / "config.toml").write_text(config_toml, encoding="utf-8")
    return str(run_dir), str(folder) if folder else None


def _new_folder(output_dir: Path) -> Path:
    """A folder named by the UTC time; runs that start within one second wait for their own."""
    while True:
        run_dir = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            time.sleep(0.2)


def _lock(run_dir: Path) -> None:
    """Hold the folder's lock as long as this process lives; the system frees it however the process ends."""
    file = (run_dir / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is at work in {run_dir}; stop it before resuming it") from None
    _LOCKS.append(file)


_LOCKS: list[Any] = []  # open files: closing one would free its lock


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each key whose value is another than in the checkpoint's configuration."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = (json.dumps(c.get(key), default=str) for c in (saved, current))
        if old != new and key != "resume_from_checkpoint":
            lines.append(f"  {key}: {old} → {new}")
    return lines


def resume_line(arguments: list[str], processes: int, run_dir: Path) -> str:
    """The command that goes on with this run: the one it was started with, `--set` and all, and where to resume."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip and not argument.startswith("--"):
            skip = False
            continue
        skip = argument == RESUME
        if not skip and not argument.startswith((f"{RESUME}=", "--local_rank")):
            kept.append(argument)
    return shlex.join(["deepspeed", "--num_gpus", str(processes), "train.py", *kept, RESUME, str(run_dir)])
