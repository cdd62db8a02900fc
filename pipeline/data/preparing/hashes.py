"""The SHA-256 of files, computed once a machine: remembered by path, size and times of the last changes.

What is remembered lies in the user's cache folder ($XDG_CACHE_HOME, ~/.cache). Where that cannot be used the hashes are
computed each time. A file changed within the last seconds is not remembered, as a second change might leave its times equal.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from pipeline.console import UserError
from pipeline.files import machine_cache
from pipeline.foreign import printable
from pipeline.processes import one_at_a_time

SETTLED_S = 2.0  # the coarsest clock of a file system in use
MOST = 2_000_000  # files that are remembered
_TABLE = "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, sha256 TEXT)"
_FIND = "SELECT sha256 FROM files WHERE path = ? AND size = ? AND mtime = ? AND ctime = ?"
_KEEP = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)"
_FORGET = "DELETE FROM files WHERE rowid <= (SELECT max(rowid) FROM files) - ?"


def memory() -> Path:
    """Where hashes are remembered."""
    return machine_cache() / "file_hashes.sqlite"


def sha256_of(
    paths: Sequence[Path], statuses: Sequence[os.stat_result], advance: Callable[[int], None] = lambda n: None
) -> list[str]:
    """Hex digests of files with their `os.stat`. Processes that ask at once wait for the first. UserError: cannot be read.

    `advance`: called with the bytes of each file.
    """
    keys = [_key(path, status) for path, status in zip(paths, statuses, strict=True)]
    with _remembered() as database:
        found = _found(database, keys)
        if database is None or all(found):
            return _completed(paths, keys, found, advance)
        with one_at_a_time(memory().with_suffix(".lock"), lambda: False):
            found = _found(database, keys)
            return _completed(paths, keys, found, advance, database)


_Key = tuple[str, int, int, int]


def _key(path: Path, status: os.stat_result) -> _Key:
    name = os.fsencode(os.path.abspath(path)).decode("utf-8", "backslashreplace")
    return name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _completed(
    paths: Sequence[Path],
    keys: list[_Key],
    found: list[str | None],
    advance: Callable[[int], None],
    database: sqlite3.Connection | None = None,
) -> list[str]:
    """All digests, those not `found` computed and, with a database, remembered."""
    new, digests = [], list[str]()
    settled = time.time_ns() - int(SETTLED_S * 1e9)
    for path, key, known in zip(paths, keys, found, strict=True):
        digest = known or _computed(path)
        digests.append(digest)
        advance(key[1])
        if known is None and max(key[2:]) < settled:
            new.append((*key, digest))
    if database is not None and new:
        with suppress(sqlite3.Error), database:
            database.executemany(_KEEP, new)
            database.execute(_FORGET, (MOST,))
    return digests


def _computed(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read: {error.strerror}") from error


def _found(database: sqlite3.Connection | None, keys: list[_Key]) -> list[str | None]:
    found: list[str | None] = [None] * len(keys)
    if database is not None:
        with suppress(sqlite3.Error):
            for place, key in enumerate(keys):
                row = database.execute(_FIND, key).fetchone()
                found[place] = row[0] if row else None
    return found


@contextmanager
def _remembered() -> Iterator[sqlite3.Connection | None]:
    """The database, or None where there can be none."""
    database = None
    with suppress(OSError, RuntimeError, sqlite3.Error):
        database = sqlite3.connect(memory(), timeout=5)
        database.execute(_TABLE)
    if database is None:
        yield None
        return
    with closing(database):
        yield database
