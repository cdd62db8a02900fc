"""Which saves of a run's folder stay: pruning, what killed processes left, and what belongs to a branch that is left.

Takes a run's folder; renames and deletes in it. A folder is renamed before it is deleted, and of a checkpoint the manifest
goes first: a kill at any moment leaves what is whole, or what is plainly rubbish. Nothing here is called while another run
is at work in the folder (run/folder.py holds its lock).
"""

import re
import secrets
import shutil
import time
from pathlib import Path

from pipeline.artifacts import saved_at
from pipeline.console import warn
from pipeline.files import clear_leftovers_in, rename, sync
from pipeline.training.checkpoint.manifest import MANIFEST, CheckpointError, step_in_name, verify

CHECKPOINT = "global_step"
TRASH = ".trash-"


def numbered(run_dir: Path, prefix: str) -> list[tuple[int, Path]]:
    """(N, folder) of every `<prefix><N>`, newest first."""
    form = re.compile(rf"{prefix}([0-9]+)")
    found = [(int(match[1]), path) for path in run_dir.glob(f"{prefix}*") if (match := form.fullmatch(path.name))]
    return sorted(found, reverse=True)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(N, folder) of every checkpoint, newest first, with those that a killed process was about to replace."""
    there = numbered(run_dir, CHECKPOINT)
    return sorted([*there, *_waiting(run_dir, {step for step, _ in there})], reverse=True)


def _waiting(run_dir: Path, there: set[int]) -> list[tuple[int, Path]]:
    """(N, folder) of what a kill left without its name. What was on its way out has no manifest any more."""
    found = {step_in_name(p): p for p in run_dir.glob(f"{TRASH}{CHECKPOINT}*") if (p / MANIFEST).is_file()}
    return [(step, path) for step, path in found.items() if step is not None and step not in there]


def prune(run_dir: Path, prefix: str, keep: int) -> None:
    """Keep the `keep` newest `<prefix><N>` folders; −1 keeps all."""
    if keep >= 0:
        for _, folder in numbered(run_dir, prefix)[keep:]:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a folder so that a kill half way leaves something that is plainly rubbish."""
    trash = put_away(folder)
    delete(trash)


def put_away(folder: Path) -> Path:
    """Take the name from a folder that is about to be replaced or deleted; gives its new one."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    rename(folder, trash)
    return trash


def delete(trash: Path) -> None:
    """Delete what was put away. The manifest first, and on the disk: what is left cannot be taken for a checkpoint."""
    try:
        if (trash / MANIFEST).exists():
            (trash / MANIFEST).unlink()
            sync(trash)
        shutil.rmtree(trash)
    except OSError as error:
        warn(f"{trash} could not be deleted and keeps its room: {error}")


def clear_rubbish(run_dir: Path) -> None:
    """Remove what killed saves and prunings left behind; what was being replaced, and is whole, goes back."""
    for step, path in _waiting(run_dir, {step for step, _ in numbered(run_dir, CHECKPOINT)}):
        try:
            verify(path)
        except CheckpointError:  # half deleted by an earlier version, or damaged: not worth a name
            continue
        rename(path, run_dir / f"{CHECKPOINT}{step}")
    for path in [*run_dir.glob(".staging-*-*"), *run_dir.glob(f"{TRASH}*step*")]:
        delete(path)
    clear_leftovers_in(run_dir)


def abandon_after(run_dir: Path, step: int) -> list[str]:
    """Rename saves of later steps than `step` to `abandoned-…`: the run goes on from `step`, on another branch than theirs.

    They are kept, but neither resumed from nor counted nor pruned. Gives their former names, newest step first.
    """
    later = [(n, path) for prefix in (CHECKPOINT, "step") for n, path in numbered(run_dir, prefix) if n > step]
    named = {path for _, path in later}
    for path in sorted(run_dir.iterdir()):  # best_loss, epoch<N>, what followed the training: they say it inside
        made = saved_at.step_of(path)
        if made is not None and made > step and path not in named and not path.name.startswith(("abandoned-", ".")):
            later.append((made, path))
    for _, path in (later := sorted(later, reverse=True)):
        rename(path, path.with_name(f"abandoned-{path.name}-{time.time_ns()}"))
    return [path.name for _, path in later]
