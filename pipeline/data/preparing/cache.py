"""The cache of prepared data: a folder a dataset, keyed by all that decides its rows, built by one process.

Takes a dataset's files and whatever else decides its rows (format, tokenizer, settings); gives a path that appears when the
rows are whole, or not at all. The other processes wait for the one that builds.
"""

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from pipeline.console import UserError, progress, rank
from pipeline.data.preparing.hashes import sha256_of
from pipeline.data.reading.sources import Source
from pipeline.files import explain_out_of_space, rename
from pipeline.foreign import printable

LET_FIRST_RANK_S = 5.0


def folder(cache_dir: Path, name: str, sources: list[Source], content: list[Any]) -> Path:
    """Where the rows of dataset `name` belong: 20 hex digits of the SHA-256 of the files, their names and `content` (JSON)."""
    try:
        statuses = [path.stat() for path, _ in sources]
    except OSError as error:
        raise UserError(f"{printable(error.filename)}: cannot be read: {error.strerror}") from error
    total = sum(status.st_size for status in statuses)
    with progress(f"checking {name}", total) if total > 2**30 else nullcontext(lambda n: None) as advance:
        hashed = sha256_of([path for path, _ in sources], statuses, advance)
    files = [(file_name, digest) for (_, file_name), digest in zip(sources, hashed, strict=True)]
    digest = hashlib.sha256(json.dumps([name, files, content]).encode()).hexdigest()[:20]
    return cache_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:64] or 'dataset'}-{digest}"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of the cache that `path` is in; the system frees it when a process dies, however it dies.

    Where `path` has to be built, other ranks give the first some seconds to begin: it is the one that shows progress.
    """
    with explain_out_of_space(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with explain_out_of_space(path), open(path.parent / ".lock", "a") as file:
        patience = time.monotonic() + (LET_FIRST_RANK_S if rank() else 0)
        while time.monotonic() < patience and not path.exists() and not _is_held(file):
            time.sleep(0.02)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def whole(path: Path, needed: str) -> Iterator[Path]:
    """A folder's name to write under, which becomes `path` when the block ends without an error. Hold the lock.

    `needed`: the room it may take, for the message where there is none.
    """
    staging = path.with_name(f".staging-{path.name}")
    shutil.rmtree(staging, ignore_errors=True)  # a killed process's; no other can be at work here now
    with explain_out_of_space(path, needed):
        try:
            yield staging
            rename(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _is_held(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False
