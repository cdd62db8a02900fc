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
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline import processes
from pipeline.console import EXIT_CHECKPOINT, EXIT_DISK_FULL, gib, is_out_of_space, space_message, warn
from pipeline.files import SEEN_S, rename
from pipeline.formats.safetensors import write_tensors
from pipeline.training.checkpoint import manifest as manifests
from pipeline.training.checkpoint import retention
from pipeline.training.checkpoint.manifest import FORMAT, MANIFEST, CheckpointError, verify

POLL_S = 0.02
PEER_TIMEOUT_S = 600.0
FAILED = "FAILED"


class Superseded(Exception):
    """Another process is committing a later step; save that one instead."""


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return run_dir / f"global_step{step}"


def save(
    run_dir: Path,
    launch: str,
    rank: int,
    world: int,
    step: int,
    tensors: dict[str, Tensor],
    facts: dict[str, Any],
    settle: Callable[[], None] = lambda: None,
) -> Path:
    """Write this process's part and return when the checkpoint of all `world` processes is in place.

    `settle` is called at the end, also of a failure: it returns when the other nodes know what is in the folder.
    Raises CheckpointError (exit code 28 for a full disk) on every process if any of them failed, and Superseded when a
    process has started to commit a later step.
    """
    staging = run_dir / f".staging-{step}-{launch}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        _write_shard(staging, rank, step, tensors, facts)
        if rank == 0:
            _commit(staging, folder_of(run_dir, step), world, step)
        else:
            _await(staging, rank, step)
    except Superseded:
        raise
    except Exception as error:  # whatever it is, the others must hear of it
        needed = gib(sum(t.nbytes for t in tensors.values()))
        failure = explained(error, f"the checkpoint of step {step} to {run_dir}", run_dir, needed)
        if rank == 0 or not isinstance(error, CheckpointError):
            with contextlib.suppress(OSError):  # the folder could not even be made, or there is no room for a line
                _say_failed(staging, rank, failure)
        settle()
        raise failure from error
    settle()
    return folder_of(run_dir, step)


def explained(error: Exception, what: str, folder: Path, needed: str) -> CheckpointError:
    """Why `what` was not written into `folder`, which would have taken `needed`; an error that says so itself as it is."""
    if isinstance(error, CheckpointError):
        return error
    full = is_out_of_space(error)
    why = space_message(error, folder, needed) if full else str(error)
    return CheckpointError(f"cannot write {what}: {why}", EXIT_DISK_FULL if full else EXIT_CHECKPOINT)


def _say_failed(staging: Path, rank: int, failure: CheckpointError) -> None:
    """The first process tells all, any other tells the first, in place of its sidecar. The shard must not keep its room."""
    (staging / f"rank-{rank}.safetensors").unlink(missing_ok=True)
    name = FAILED if rank == 0 else f"rank-{rank}.json"
    manifests.write(staging / name, {"error": str(failure), "full": failure.exit_code == EXIT_DISK_FULL})


def _write_shard(staging: Path, rank: int, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    shard = staging / f"rank-{rank}.safetensors"
    write_tensors(shard, tensors, {"step": str(step)}, replace=True)
    known = {"sha256": manifests.sha256(shard), "size": shard.stat().st_size}
    manifests.write(staging / f"rank-{rank}.json", {"step": step, **known, "facts": facts})


def _commit(staging: Path, final: Path, world: int, step: int) -> None:
    """The first process: wait for all sidecars, write the manifest, rename."""
    sidecars: dict[int, dict[str, Any]] = {}
    for _ in _waiting(staging, step, "the other processes' parts of the checkpoint"):
        os.listdir(staging)  # asks an NFS server anew, which a look at a name that was not there does not
        for rank in range(world):
            if rank not in sidecars and (found := manifests.read_note(staging / f"rank-{rank}.json")) is not None:
                sidecars[rank] = found
        if errors := [s for s in sidecars.values() if "error" in s]:
            raise _failure(errors[0])
        if len(sidecars) == world:
            break
    files = {f"rank-{rank}.safetensors": {"sha256": s["sha256"], "size": s["size"]} for rank, s in sidecars.items()}
    for (name, known), sidecar in zip(files.items(), sidecars.values(), strict=True):
        if sidecar["step"] != step or not _has_size(staging / name, known["size"]):
            raise CheckpointError(f"{staging / name} is not the shard of step {step} that its process has written")
    manifests.write(staging / MANIFEST, {"format": FORMAT, "step": step, "files": files, **sidecars[0]["facts"]})
    replaced = retention.put_away(final) if final.exists() else None
    rename(staging, final)
    if replaced is not None:
        retention.delete(replaced)
    for earlier in [other for other in _stagings(staging) if _staged_step(other) < step]:
        # Superseded. Whoever has a part in this commit has left it.
        retention.delete(earlier)


def _await(staging: Path, rank: int, step: int) -> None:
    """The other processes: until the first one has renamed the folder, or said why it cannot."""
    for _ in _waiting(staging, step, "the first process to commit the checkpoint"):
        if (failed := manifests.read_note(staging / FAILED)) is not None:
            (staging / f"rank-{rank}.safetensors").unlink(
                missing_ok=True
            )  # nobody commits it: it must not keep its room
            raise _failure(failed)
        if staging.name not in os.listdir(staging.parent):
            return


def _has_size(shard: Path, size: int) -> bool:
    """Whether the file has all its bytes, or has them soon: its writer has synced it, but maybe on another node."""
    deadline = time.monotonic() + SEEN_S
    while True:
        with contextlib.suppress(FileNotFoundError), shard.open("rb") as opened:  # a look at the name may be remembered
            if os.fstat(opened.fileno()).st_size == size:
                return True
        if not processes.over_nodes() or time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)


def _failure(note: dict[str, Any]) -> CheckpointError:
    return CheckpointError(note["error"], EXIT_DISK_FULL if note.get("full") else EXIT_CHECKPOINT)


def _waiting(staging: Path, step: int, what: str) -> Iterator[None]:
    deadline = time.monotonic() + PEER_TIMEOUT_S
    while time.monotonic() < deadline:
        yield
        if any(_staged_step(other) > step for other in _stagings(staging)):
            raise Superseded
        time.sleep(POLL_S)
    raise CheckpointError(f"waited {PEER_TIMEOUT_S:.0f} s for {what} of step {step}")


def _stagings(staging: Path) -> list[Path]:
    """The other folders in which this launch puts checkpoints together."""
    launch = staging.name.split("-", 2)[2]
    return [path for path in staging.parent.glob(f".staging-*-{launch}") if path != staging]


def _staged_step(staging: Path) -> int:
    return int(staging.name.split("-")[1])


def find(where: Path, newest_run: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to resume from, verified, and its manifest.

    `where`: a checkpoint; a run's folder (its newest whole checkpoint); or, with `newest_run`, the folder of all runs
    (the newest run that has one). Damaged checkpoints are passed over with a warning; a checkpoint named itself must be
    whole. Never gives up silently: raises CheckpointError when there is nothing to resume from.
    """
    if (where / MANIFEST).is_file() or where.name.startswith(retention.CHECKPOINT):
        return _found(_named(where))
    runs = sorted((p for p in where.glob("*") if p.is_dir()), reverse=True) if newest_run else [where]
    refused = []
    for run in runs:
        for _, folder in retention.checkpoints(run):
            try:
                return _found(folder)
            except CheckpointError as error:
                refused.append(str(error))
                warn(f"{error}; trying the next older checkpoint")
    raise CheckpointError(
        f"nothing to resume from: {where} has no complete checkpoint{': ' + '; '.join(refused) if refused else ''}"
    )


def _named(where: Path) -> Path:
    """`where`, or what was there until a process was killed that was about to replace it."""
    waiting = [] if where.exists() else retention.checkpoints(where.parent)
    return next((path for step, path in waiting if where.name == f"{retention.CHECKPOINT}{step}"), where)


def _found(folder: Path) -> tuple[Path, dict[str, Any]]:
    manifest = verify(folder)
    if manifest["format"] != FORMAT:
        warn(f"{folder} is of an earlier version: its manifest has no digest, so damage to what it says would not show")
    return folder, manifest


def keys_of(shard: Path) -> list[str]:
    """What a shard holds."""
    with safe_open(shard, framework="pt") as opened:
        return list(opened.keys())


def read(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, lazily read tensor) of every shard; `value()` reads it. Call after `verify`."""
    for name in manifest["files"]:
        with safe_open(folder / name, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                yield key, lambda shard=shard, key=key: shard.get_tensor(key)
