"""A checkpoint's facts: what its manifest says, and whether the folder is what its manifest says.

Takes a folder; gives the manifest after its own digest, its form, the folder's name and the SHA-256 of every shard were
checked. Whatever is wrong with a checkpoint, and whatever reading it raises, is a CheckpointError: the caller passes over
to an older one. The small JSON files of a checkpoint carry the SHA-256 of their own content (`digest`).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.console import EXIT_CHECKPOINT, UserError
from pipeline.files import write_text
from pipeline.foreign import printable, read_object

MANIFEST = "manifest.json"
FORMAT = 3
WITHOUT_DIGEST = 2  # the format before: read, as runs of it may be going on

Count = Annotated[int, Field(ge=0, lt=2**63)]


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or could not be written."""

    def __init__(self, message: str, exit_code: int = EXIT_CHECKPOINT) -> None:
        super().__init__(message, exit_code)


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Group(_Form, extra="allow"):
    names: list[str]
    type: str | None = None


class _Optimizer(_Form, extra="allow"):
    type: str
    groups: list[_Group] = []


class _Config(_Form, extra="allow"):
    """Of the run's configuration what resuming reads without a default."""

    optimizer: _Optimizer


class _Facts(_Form):
    """What every process says of the run: state.Progress, begin.facts."""

    epoch: Count
    rows: Count
    order: str
    best_loss: float | None
    settled: bool
    waited: Count = 0
    waited_from: float | None = None
    tokens: Count = 0
    trained: list[str]
    config: _Config
    layout: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]  # stages, replicas
    versions: dict[str, str]
    reference: dict[str, str] = {}  # files of the run that a resumption needs, with the SHA-256 of what they hold


class _Shard(_Form):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Count


class _Manifest(_Facts):
    format: int
    digest: str | None = None
    step: Count
    files: dict[str, _Shard]


class _Sidecar(_Shard):
    """What a process says of its shard while the checkpoint is put together."""

    digest: str
    step: Count
    facts: _Facts


class _Failure(_Form):
    """What a process that could not write its shard says instead."""

    digest: str
    error: str
    full: bool


def write(file: Path, content: dict[str, Any]) -> None:
    """Write `content` and its digest, whole."""
    write_text(file, json.dumps({**content, "digest": digest(content)}, indent=1) + "\n")


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of `content`, but for its own digest, as canonical JSON."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_note(file: Path) -> dict[str, Any] | None:
    """A process's sidecar or its failure; None while there is none. Raises CheckpointError for one that is damaged."""
    if not file.exists():
        return None
    try:
        content = read_object(file, "a note between the processes of a run")
        _check_digest(content)
        (_Failure if "error" in content else _Sidecar).model_validate(content)
    except Exception as error:
        raise _unreadable(file, error) from error
    return content


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` after checking it, and size and SHA-256 of every file that it names."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}")
    try:
        manifest = read_object(folder / MANIFEST, "a checkpoint's manifest")
        _check(folder, manifest)
        for name, known in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != known["size"] or sha256(path) != known["sha256"]:
                raise CheckpointError(f"{path} is damaged: it does not match the manifest's SHA-256")
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing") from error
    except Exception as error:  # whatever damage leads to
        raise _unreadable(folder / MANIFEST, error) from error
    return manifest


def step_in_name(folder: Path) -> int | None:
    """N of `global_step<N>`, also while the folder waits to be put back or was put aside; None for another name."""
    match = re.fullmatch(r"(?:\.trash-|abandoned-)?global_step([0-9]+)(?:-.*)?", folder.name)
    return int(match[1]) if match else None


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise for a manifest that is damaged, of another format or of another folder."""
    if manifest.get("format") not in (FORMAT, WITHOUT_DIGEST):
        raise CheckpointError(
            f"{folder} has checkpoint format {printable(manifest.get('format'))}; this program reads "
            f"{WITHOUT_DIGEST} and {FORMAT}"
        )
    if manifest["format"] == FORMAT:
        _check_digest(manifest)
    elif "digest" in manifest:
        raise ValueError(f"format {WITHOUT_DIGEST} has no digest")
    _Manifest.model_validate(manifest)
    stages, replicas = manifest["layout"]
    if set(manifest["files"]) != {f"rank-{rank}.safetensors" for rank in range(stages * replicas)}:
        raise ValueError(f"{stages} stages by {replicas} replicas do not go with {len(manifest['files'])} shards")
    named = step_in_name(folder)
    if named is not None and named != manifest["step"]:
        raise CheckpointError(f"{folder} holds the checkpoint of step {manifest['step']}, not the one in its name")


def _check_digest(content: dict[str, Any]) -> None:
    if content.get("digest") != digest(content):
        raise ValueError("its content does not match its own digest")


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return CheckpointError(f"{file} is damaged: {printable(where)}: {printable(first['msg'])}")
    return CheckpointError(f"{file} is damaged or cannot be read: {printable(error)}")
