"""Takes a file that may be packed (.gz, .zst); gives the bytes that it holds, and the ending that says what they are."""

import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.console import UserError, is_out_of_space
from pipeline.foreign import printable

PACKED = {".gz": "gzip", ".zst": "zstd"}
TYPICAL_RATIO = 4  # bytes of text to one of a packed file


def ending(path: Path) -> str:
    """The ending in small letters, without that of the packing: '.jsonl' for a.JSONL.zst."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in PACKED


def text_bytes(files: Iterable[tuple[Path, str]]) -> int:
    """Bytes that these files (path, name) hold, about, once they are unpacked."""
    return sum(path.stat().st_size * (TYPICAL_RATIO if is_packed(path) else 1) for path, _ in files)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """What the file holds, from its beginning. UserError if it cannot be opened, read or unpacked."""
    try:
        with open(path, "rb") as file:
            if not is_packed(path):
                yield file
                return
            import pyarrow as pa

            # Arrow's streams know both packings, files of several members too, and say when one is cut off.
            stream: Any = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), PACKED[path.suffix.lower()])
            yield io.BufferedReader(stream, 2**20)
    except OSError as error:
        if is_out_of_space(error):  # of whoever writes what is read here
            raise
        what = error.strerror or f"{'it is damaged or cut off' if is_packed(path) else 'error'}: {printable(error)}"
        raise UserError(f"{printable(path)}: cannot be read: {what}") from error


@contextmanager
def seekable(path: Path) -> Iterator[Any]:
    """The same for readers that jump (Parquet, Arrow): a packed file is unpacked into one that has no name and is gone after."""
    if not is_packed(path):
        yield path
        return
    with tempfile.TemporaryFile() as whole:
        with opened(path) as file:
            shutil.copyfileobj(file, whole, 2**20)
        whole.seek(0)
        yield whole
