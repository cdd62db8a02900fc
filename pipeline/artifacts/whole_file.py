"""An output file that appears whole or not at all.

Takes the final name; gives a temporary name beside it to write to, and puts that in place when the caller's block ends
without an error. For an output `x/adapter.gguf` that is `x/.adapter.gguf.partial`: whoever holds its lock is writing,
and what a killed process left in it the next one overwrites.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.artifacts.whole_folder import disk_full_as_user_error
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
        descriptor = _open_locked(temporary, output)
        try:
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


def _open_locked(temporary: Path, output: Path) -> int:
    """A descriptor of the temporary file that holds its lock: the system releases it however the process ends."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot write to {output.parent}: {error.strerror}. Give another name.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who renamed the file between our open and our lock has finished: the lock is that of his output.
        if not temporary.exists() or temporary.stat().st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing to {output}. Wait for it, or give another name.") from None
    os.truncate(descriptor, 0)
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
