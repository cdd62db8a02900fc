"""The cache of prepared data: a folder a dataset, keyed by all that decides its rows, built by one process.

Takes a dataset's files and whatever else decides its rows (format, tokenizer, settings); gives a path that appears when the
rows are whole, or not at all. The other processes wait for the one that builds.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.console import UserError, progress
from pipeline.data.preparing.hashes import sha256_of
from pipeline.data.reading.sources import Source
from pipeline.files import explain_out_of_space, rename
from pipeline.foreign import printable
from pipeline.processes import one_at_a_time


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
    return keyed(cache_dir, name, [name, files, content])


def keyed(cache_dir: Path, name: str, content: list[Any]) -> Path:
    """A folder of the cache for what is made of dataset `name`, told from others by `content` (JSON)."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    return cache_dir / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)[:64] or 'dataset'}-{digest}"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of the cache that `path` is in; where `path` has to be built, the first rank goes first."""
    with explain_out_of_space(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with explain_out_of_space(path), one_at_a_time(path.parent / ".lock", path.exists):
        os.listdir(path.parent)  # over NFS, what another node has built meanwhile is seen by this
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
