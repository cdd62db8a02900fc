"""An output file that appears whole or not at all.

Takes the final name; gives a temporary name beside it to write to, and puts that in place when the caller's block ends
without an error. For an output `x/adapter.gguf` that is `x/.adapter.gguf.partial`: whoever holds its lock is writing,
and what a killed process left in it the next one overwrites.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifacts.whole_folder import disk_full_as_user_error, open_locked
from pipeline.console import UserError


@contextmanager
def whole_file(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the temporary name, where an empty file is; when the block ends, sync it and give it the name `output`.

    With `replace`, what stands at `output` stays until then. If the block raises, only the temporary file is removed.
    Raises UserError where `output` is a folder or (without `replace`) exists, where another process is writing to it,
    and, with exit code 28, where the disk fills up.
    """
    output = output.resolve()
    check_file_free(output, replace=replace)
    temporary = output.parent / f".{output.name}.partial"
    with disk_full_as_user_error(output):
        descriptor = open_locked(temporary, output)
        try:
            os.truncate(descriptor, 0)
            check_file_free(output, replace=replace)  # again: another process may have ended in between
            yield temporary
            _sync(temporary)
            os.rename(temporary, output)
            _sync(output.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def check_file_free(output: Path, *, replace: bool) -> None:
    """Raise UserError where a file cannot be written at `output`; with `replace`, an existing one is no obstacle."""
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of a file.")
    if output.exists() and not replace:
        raise UserError(f"{output} exists. Give another name, or --force to replace it.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
