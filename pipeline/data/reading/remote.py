"""Takes an address (s3://, gs://, hf://, https://, …), which may be a glob or a folder; gives local copies of its files.

fsspec knows how to list and fetch; a copy is taken again where its size or time there is still the same. What is at http:// and
https:// is one file, fetched with httpx, as fsspec would need a library more for it.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.console import UserError, is_out_of_space, log
from pipeline.files import atomic_file, machine_cache
from pipeline.foreign import printable
from pipeline.processes import one_at_a_time

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
CHUNK_BYTES = 2**20


def is_address(path: str) -> bool:
    """Whether a path is one of another machine's, or fsspec's."""
    return _ADDRESS.match(path) is not None


def files(address: str, reads: Callable[[Path], bool]) -> list[tuple[Path, str]]:
    """(copy on this machine, name from the first wildcard on) of each file that `reads` takes, sorted by address.

    UserError: nothing there, no such kind of address, not to be reached.
    """
    where = f"dataset_path = '{printable(address)}'"
    with explained(where), one_at_a_time(machine_cache() / "files.lock", lambda: False):  # the first fetches
        if urlsplit(address).scheme in ("http", "https"):
            return [_fetched_by_http(address)]
        found = _listed(address, reads, where)
        return [(_fetched(fs, path), name) for fs, path, name in found]


def addresses(address: str, reads: Callable[[Path], bool]) -> list[tuple[str, str]]:
    """(address, what tells its content from another's) of each file that `reads` takes, sorted; none is fetched.

    UserError: as for `files`.
    """
    where = f"dataset_path = '{printable(address)}'"
    with explained(where):
        if urlsplit(address).scheme in ("http", "https"):
            return [(address, "")]
        found = _listed(address, reads, where)
        return [(str(fs.unstrip_protocol(path)), str(fs.ukey(path))) for fs, path, _ in found]


def _listed(address: str, reads: Callable[[Path], bool], where: str) -> list[tuple[Any, str, str]]:
    from fsspec.core import url_to_fs

    fs, path = url_to_fs(address)
    root, names = path.rsplit("/", 1)[0], [path]
    if fs.isdir(path):
        root, names = path, fs.find(path)
    elif glob.has_magic(path):
        root, names = re.split(r"[^/]*[*?\[]", path, maxsplit=1)[0], fs.glob(path)
    there = sorted(name for name in names if fs.isfile(name))
    found = [name for name in there if reads(Path(name))]
    if not found:
        holds = (
            f"it has {len(there):,} files, '{printable(Path(there[0]).name)}' first" if there else "nothing is there"
        )
        raise UserError(f"{where}: names no file that this dataset_type reads; {holds}")
    return [(fs, name, name.removeprefix(root).lstrip("/")) for name in found]


def _fetched(fs: Any, path: str) -> Path:
    """The copy of a file, made now if there is none of this very file."""
    key = [fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0], path, fs.ukey(path)]

    def fetch(target: Path) -> None:
        fs.get_file(path, str(target))

    return _copy(key, path.rsplit("/", 1)[-1], path, fetch)


def _fetched_by_http(address: str) -> tuple[Path, str]:
    import httpx

    name = unquote(urlsplit(address).path.rsplit("/", 1)[-1])
    with httpx.Client(follow_redirects=True, timeout=60) as client:
        answer = client.head(address)
        answer.raise_for_status()
        marks = [answer.headers.get(mark) for mark in ("etag", "last-modified", "content-length")]

        def fetch(target: Path) -> None:
            with client.stream("GET", address) as stream, open(target, "wb") as file:
                stream.raise_for_status()
                for chunk in stream.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)

        return _copy(["http", address, *marks], name, address, fetch), name


def _copy(key: list[Any], name: str, path: str, fetch: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    target = machine_cache() / "files" / digest / name
    if not target.is_file():
        log(f"data:     fetching {printable(path)}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as temporary:
            fetch(temporary)
    return target


@contextmanager
def explained(where: str) -> Iterator[None]:
    """What libraries raise, as one UserError. A full disk is files.py's to say."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except ImportError as error:  # fsspec says what to install
        raise UserError(f"{where}: {printable(error)}") from None
    except Exception as error:
        if isinstance(error, OSError) and is_out_of_space(error):
            raise
        raise UserError(f"{where}: cannot be fetched: {printable(error)} ({type(error).__name__})") from error
