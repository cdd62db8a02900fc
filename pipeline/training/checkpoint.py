"""Checkpoints: the state of a completed step as a folder of safetensors that is whole, or not there.

Takes what each process has to say (tensors by global name, facts); gives `global_step<N>/` with one shard a process and
`manifest.json`. Tensors are keyed by the parameter's name in the whole model, so a run saved with two stages resumes
with one or three. Nothing is a pickle.

The commit: every process writes its shard and a sidecar with its SHA-256 into `.staging-<step>-<launch>/`; the first
process waits for all sidecars, writes the manifest, syncs, and renames the folder to its final name. The processes meet
through the folder and not through a collective, so the same protocol serves a save at the step boundary and one from
the watching thread while the main thread hangs in a step (stop.py). Loading verifies every hash and falls back to the
next older checkpoint.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.console import EXIT_CHECKPOINT, EXIT_DISK_FULL, UserError, warn

MANIFEST = "manifest.json"
FORMAT = 2
POLL_S = 0.02
PEER_TIMEOUT_S = 600.0


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or could not be written."""

    def __init__(self, message: str, exit_code: int = EXIT_CHECKPOINT) -> None:
        super().__init__(message, exit_code)


class Superseded(Exception):
    """Another process is committing a later step; save that one instead."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run_dir / f"global_step{step}"


def save(
    run_dir: Path, launch: str, rank: int, world: int, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> Path:
    """Write this process's part and return when the checkpoint of all `world` processes is in place.

    Raises CheckpointError (exit code 28 for a full disk) on every process if any of them failed, and Superseded when a
    process has started to commit a later step.
    """
    staging = run_dir / f".staging-{step}-{launch}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        _write_shard(staging, rank, step, tensors, facts)
        if rank == 0:
            _commit(staging, folder_of(run_dir, step), world, step)
    except (OSError, SafetensorError) as error:
        full = is_disk_full(error)
        message = f"cannot write the checkpoint of step {step}: {'the disk is full' if full else error} ({staging})"
        (staging / f"rank-{rank}.safetensors").unlink(missing_ok=True)  # room for the note
        with contextlib.suppress(OSError):  # the folder could not even be made, or there is no room for a line
            _note(staging, "FAILED" if rank == 0 else f"rank-{rank}.json", {"error": message, "full": full})
        raise CheckpointError(message, EXIT_DISK_FULL if full else EXIT_CHECKPOINT) from error
    if rank != 0:
        _await(staging, step)
    return folder_of(run_dir, step)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of room; safetensors says so in words only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def _write_shard(staging: Path, rank: int, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    shard = staging / f"rank-{rank}.safetensors"
    save_file(tensors, shard, metadata={"step": str(step)})
    shard.chmod(0o644)
    _sync(shard)
    _note(
        staging,
        f"rank-{rank}.json",
        {"step": step, "sha256": _sha256(shard), "size": shard.stat().st_size, "facts": facts},
    )


def _commit(staging: Path, final: Path, world: int, step: int) -> None:
    """The first process: wait for all sidecars, write the manifest, rename."""
    sidecars: dict[int, dict[str, Any]] = {}
    for _ in _waiting(staging, step, "the other processes' parts of the checkpoint"):
        for rank in range(world):
            if rank not in sidecars and (found := _read(staging / f"rank-{rank}.json")) is not None:
                sidecars[rank] = found
        if errors := [s for s in sidecars.values() if "error" in s]:
            _note(staging, "FAILED", errors[0])
            raise _failure(errors[0])
        if len(sidecars) == world:
            break
    files = {f"rank-{rank}.safetensors": {"sha256": s["sha256"], "size": s["size"]} for rank, s in sidecars.items()}
    _note(staging, MANIFEST, {"format": FORMAT, "step": step, "files": files, **sidecars[0]["facts"]})
    _sync(staging)
    replaced = final.with_name(f".trash-{final.name}-{os.getpid()}")
    if final.exists():
        final.rename(replaced)
    staging.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _await(staging: Path, step: int) -> None:
    """The other processes: until the first one has renamed the folder, or said why it cannot."""
    for _ in _waiting(staging, step, "the first process to commit the checkpoint"):
        if (failed := _read(staging / "FAILED")) is not None:
            raise _failure(failed)
        if not staging.exists():
            return


def _failure(note: dict[str, Any]) -> CheckpointError:
    return CheckpointError(note["error"], EXIT_DISK_FULL if note.get("full") else EXIT_CHECKPOINT)


def _waiting(staging: Path, step: int, what: str) -> Iterator[None]:
    deadline = time.monotonic() + PEER_TIMEOUT_S
    suffix = staging.name.split("-", 2)[2]
    while time.monotonic() < deadline:
        yield
        later = [p for p in staging.parent.glob(f".staging-*-{suffix}") if int(p.name.split("-")[1]) > step]
        if later:
            raise Superseded
        time.sleep(POLL_S)
    raise CheckpointError(f"waited {PEER_TIMEOUT_S:.0f} s for {what} of step {step}")


def remove(folder: Path) -> None:
    """Delete a folder so that a kill half way leaves something that is plainly rubbish."""
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    folder.rename(trash)
    shutil.rmtree(trash)


def clear_rubbish(run_dir: Path) -> None:
    """Remove what killed saves and prunings left behind; a checkpoint that was being replaced goes back."""
    for path in run_dir.glob(".trash-global_step*"):
        final = run_dir / path.name.removeprefix(".trash-").rsplit("-", 1)[0]
        if (path / MANIFEST).exists() and not final.exists():
            path.rename(final)
    unfinished = (*run_dir.glob(".staging-*-*"), *run_dir.glob(".*.partial-*"))  # of a checkpoint, of an adapter
    for path in [*unfinished, *run_dir.glob(".trash-*step*")]:
        shutil.rmtree(path, ignore_errors=True)


def abandon_after(run_dir: Path, step: int) -> list[str]:
    """Rename saves of later steps than `step` to `abandoned-…`: the run goes on from `step`, on another branch than theirs.

    They are kept, but neither resumed from nor counted nor pruned.
    """
    renamed = []
    for prefix in ("step", "global_step"):
        for number, folder in numbered(run_dir, prefix):
            if number > step:
                target = folder.with_name(f"abandoned-{folder.name}-{time.time_ns()}")
                folder.rename(target)
                renamed.append(folder.name)
    return renamed


def prune(run_dir: Path, prefix: str, keep: int) -> None:
    """Keep the `keep` newest `<prefix><N>` folders; −1 keeps all."""
    if keep >= 0:
        for _, folder in numbered(run_dir, prefix)[keep:]:
            remove(folder)


def numbered(run_dir: Path, prefix: str) -> list[tuple[int, Path]]:
    """(N, folder) of every `<prefix><N>`, newest first."""
    found = [
        (int(p.name.removeprefix(prefix)), p)
        for p in run_dir.glob(f"{prefix}*")
        if p.name.removeprefix(prefix).isdigit()
    ]
    return sorted(found, reverse=True)


def find(where: Path, newest_run: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to resume from, verified, and its manifest.

    `where`: a checkpoint; a run's folder (its newest whole checkpoint); or, with `newest_run`, the folder of all runs
    (the newest run that has one). Damaged checkpoints are passed over with a warning; a checkpoint named itself must be
    whole. Never gives up silently: raises CheckpointError when there is nothing to resume from.
    """
    if (where / MANIFEST).is_file() or where.name.startswith("global_step"):
        return where, verify(where)
    runs = sorted((p for p in where.glob("*") if p.is_dir()), reverse=True) if newest_run else [where]
    refused = []
    for run in runs:
        for _, folder in numbered(run, "global_step"):
            try:
                return folder, verify(folder)
            except CheckpointError as error:
                refused.append(str(error))
                warn(f"{error}; trying the next older checkpoint")
    raise CheckpointError(
        f"nothing to resume from: {where} has no complete checkpoint{': ' + '; '.join(refused) if refused else ''}"
    )


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` after checking size and SHA-256 of every file it names."""
    manifest = _read(folder / MANIFEST)
    if manifest is None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no readable {MANIFEST}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {manifest.get('format')}; this program reads {FORMAT}")
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != known["size"] or _sha256(path) != known["sha256"]:
            raise CheckpointError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: it does not match the manifest's SHA-256"
            )
    return manifest


def read(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, lazily read tensor) of every shard; `value()` reads it. Call after `verify`."""
    for name in manifest["files"]:
        with safe_open(folder / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                yield key, lambda shard=shard, key=key: shard.get_tensor(key)


def _note(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a small JSON file whole."""
    temporary = folder / f".{name}.tmp"
    temporary.write_text(json.dumps(content, indent=1))
    _sync(temporary)
    temporary.rename(folder / name)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
