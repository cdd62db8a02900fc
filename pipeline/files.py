"""The one writer: outputs that appear whole or not at all, durable, readable by whom the umask says.

Takes the final name; gives a temporary one beside it to write into, and puts that in place when the caller's block ends
without an error. A process killed on the way leaves the final name as it was; what it left beside it is cleared by the
next one that writes to the same name.

For a folder `runs/merged` the names beside it are `runs/.merged.lock` (held while writing), `runs/.merged.partial-*`
(being written) and `runs/.merged.replaced-*` (what stood there before, while it is being replaced). For a file
`x/adapter.gguf` there is `x/.adapter.gguf.partial`: whoever holds its lock is writing, and what a killed process left in
it the next one overwrites.

`write_text` and `write_json` are for small files that one process writes. Being out of space on the way (the disk, a quota,
the largest size of a file) becomes one message with the bytes, and exit code 28.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.console import EXIT_DISK_FULL, UserError, gib, is_out_of_space, rank, space_message

ROOM_TO_BEGIN = 64 * 1024  # bytes: configuration, rendezvous and first lines of a run
SEEN_S = 75.0  # NFS remembers for up to a minute what was in a folder
LOOK_AGAIN_S = 0.05
# File systems of one machine. Any other may be on a server, and is taken for one.
OF_ONE_MACHINE = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})


@contextmanager
def atomic_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `output`; when the block ends, sync it to disk and give it the name `output`.

    With `replace`, what stands at `output` stays until the new folder is complete, and is deleted then. If the block
    raises, nothing but the temporary folder is touched, and that is removed.
    Raises UserError where `output` is a file or (without `replace`) a folder with something in it, where another
    process is writing to it, and, with exit code 28, where the disk fills up.
    """
    output = output.resolve()
    check_free(output, replace=replace)
    with explain_out_of_space(output), _lock(output):
        _clear_leftovers(output)
        check_free(output, replace=replace)  # again: a replacement that was killed half way may have been put back
        temporary = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _put_in_place(temporary, output)
        except BaseException as error:
            written = size_of(temporary)
            shutil.rmtree(temporary, ignore_errors=True)
            with explain_out_of_space(output, f"more than {gib(written)}"):
                raise error


@contextmanager
def atomic_file(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the temporary name, where an empty file is; when the block ends, sync it and give it the name `output`.

    With `replace`, what stands at `output` stays until then. If the block raises, only the temporary file is removed.
    Raises UserError where `output` is a folder or (without `replace`) exists, where another process is writing to it,
    and, with exit code 28, where the disk fills up.
    """
    output = output.resolve()
    check_file_free(output, replace=replace)
    temporary = output.parent / f".{output.name}.partial"
    with explain_out_of_space(output):
        descriptor = open_locked(temporary, output)
        try:
            os.truncate(descriptor, 0)
            check_file_free(output, replace=replace)  # again: another process may have ended in between
            yield temporary
            sync(temporary)
            rename(temporary, output)
        except BaseException as error:
            written = size_of(temporary)
            temporary.unlink(missing_ok=True)
            with explain_out_of_space(output, f"more than {gib(written)}"):
                raise error
        finally:
            os.close(descriptor)


def appears(path: Path, within_s: float = SEEN_S) -> bool:
    """Whether `path` is there, or comes within so many seconds: another node may have made it just now.

    Its folder is listed: over NFS that asks the server, where a name that was not there is remembered as such.
    """
    deadline = time.monotonic() + within_s
    while True:
        with suppress(FileNotFoundError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)


def is_on_own_disk(path: Path) -> bool:
    """Whether what is at `path`, which is there, is on a disk of this machine that no other mounts."""
    kinds = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}  # of one folder, the last
    above = (str(each) for each in (path.resolve(), *path.resolve().parents))
    return kinds.get(next((each for each in above if each in kinds), ""), "") in OF_ONE_MACHINE


def check_file_free(output: Path, *, replace: bool) -> None:
    """Raise UserError where a file cannot be written at `output`; with `replace`, an existing one is no obstacle."""
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of a file.")
    if output.exists() and not replace:
        raise UserError(f"{output} exists. Give another name, or --force to replace it.")


def check_free(output: Path, *, replace: bool) -> None:
    """Raise UserError where a folder cannot be written at `output`; with `replace`, an existing one is no obstacle."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give the name of a folder.")
    if output.is_dir() and any(output.iterdir()) and not replace:
        raise UserError(f"{output} exists and is not empty. Give another name, or --force to replace it.")


def check_writable(folder: Path, key: str) -> None:
    """Raise UserError where nothing can be written to `folder` (made if it is not there), the value of `key`; with exit code
    28 where there is no room to begin with. Of several processes one asks for the room, or they would count each other's.
    """
    room = ROOM_TO_BEGIN if rank() == 0 else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(room))
            sync_stream(file)
    except OSError as error:
        if is_out_of_space(error):
            why = space_message(error, folder, f"at least {gib(room)}")
            raise UserError(f"{key} = '{folder}': {why}", EXIT_DISK_FULL) from error
        raise UserError(f"{key} = '{folder}': cannot write there: {error.strerror}") from error


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError (exit code 28) where the disk that holds `folder` has less than `needed_bytes` free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"not enough disk space at {folder}: {gib(needed_bytes)} needed, {gib(free)} free. "
            "Nothing was written. Make room, or name an output on another disk.",
            exit_code=EXIT_DISK_FULL,
        )


@contextmanager
def explain_out_of_space(output: Path, needed: str = "") -> Iterator[None]:
    """Turn every way to be out of space while `output` is written into one UserError: why, the bytes, exit code 28.

    `needed`: the bytes it takes, if known, as people read them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_space(error):
            raise
        raise UserError(
            f"cannot write {output}: {space_message(error, output.parent, needed)}. "
            "What was written has been removed; make room and run again.",
            EXIT_DISK_FULL,
        ) from error


@contextmanager
def in_order(most: int = 4) -> Iterator[Callable[..., None]]:
    """Yield `do(call, *arguments)`: a thread makes the calls, one after the other, while the block goes on.

    `do` waits where `most` calls are outstanding, so that what they hold is bounded. The end of the block waits for all of
    them; an error of one is raised by a later `do` or by the end, and an error in the block drops those not begun.
    """
    waiting: deque[Future[Any]] = deque()

    def do(call: Callable[..., Any], *arguments: Any) -> None:
        if len(waiting) >= most:
            waiting.popleft().result()
        waiting.append(thread.submit(call, *arguments))

    with ThreadPoolExecutor(1) as thread:
        try:
            yield do
            for one in waiting:
                one.result()
        finally:
            thread.shutdown(cancel_futures=True)


def write_text(file: Path, text: str) -> None:
    """Write a small file whole: it has its old content or the new one, even if the machine goes down."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            sync_stream(stream)
        os.rename(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_json(file: Path, content: Any, indent: int = 2, *, allow_nan: bool = False) -> None:
    """Write `content` as JSON, whole as by `write_text`. Raises ValueError for what JSON lacks (NaN, infinity).

    `allow_nan`: write them as Python does, and transformers in a model's config (Mamba's time_step_limit has Infinity).
    """
    write_text(file, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=allow_nan) + "\n")


def open_locked(path: Path, output: Path) -> int:
    """A descriptor of `path`, beside `output`, that holds its lock: the system releases it however the process ends.

    Raises UserError where another process is writing to `output`, or nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if is_out_of_space(error):
            raise
        raise UserError(f"cannot write to {output.parent}: {error.strerror}. Give another name.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who removed or renamed the file between our open and our lock held it before us: this lock protects nothing.
        if not path.exists() or path.stat().st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing to {output}. Wait for it, or give another name.") from None
    return descriptor


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Hold the lock of `output`."""
    path = output.parent / f".{output.name}.lock"
    descriptor = open_locked(path, output)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _clear_leftovers(output: Path) -> None:
    """Remove what killed processes left beside `output`. The lock is held, so nobody else is using it."""
    for partial in _beside(output, "partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for replaced in _beside(output, "replaced"):
        if output.exists():  # the new folder is in place: only the deletion of the old one was cut short
            shutil.rmtree(replaced, ignore_errors=True)
        else:  # killed between the two renames: the old folder goes back
            os.rename(replaced, output)


def clear_leftovers_in(folder: Path) -> None:
    """Do for all outputs of `atomic_folder` in `folder` what the next one of that name would: clear, or put back."""
    beside = re.compile(r"\.(.+)\.(?:lock|(?:partial|replaced)-\w+)")
    for name in sorted({match[1] for path in folder.iterdir() if (match := beside.fullmatch(path.name))}):
        with suppress(UserError), _lock(folder / name):  # another process may be writing to it right now
            _clear_leftovers(folder / name)


def _beside(output: Path, role: str) -> list[Path]:
    prefix = f".{output.name}.{role}-"
    return sorted(path for path in output.parent.iterdir() if path.name.startswith(prefix) and path.is_dir())


def _put_in_place(temporary: Path, output: Path) -> None:
    replaced = None
    if output.exists() and any(output.iterdir()):
        replaced = output.parent / f".{output.name}.replaced-{secrets.token_hex(4)}"
        os.rename(output, replaced)
    rename(temporary, output)  # over an empty folder this is allowed, and atomic
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder; 0 if it is gone."""
    with suppress(OSError):
        return sum(p.lstat().st_size for p in (path.rglob("*") if path.is_dir() else [path]))
    return 0


def _sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and `folder` itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), "rb") as stream:
                os.fsync(stream.fileno())
        sync(Path(parent))


def machine_cache() -> Path:
    """The folder of what is kept for all runs of a user on this machine: $XDG_CACHE_HOME or ~/.cache; made if it is not there.

    OSError or RuntimeError where there can be none.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mulora-pipe"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync(path: Path) -> None:
    """fsync a file, or a folder's own entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_stream(stream: IO[Any]) -> None:
    """Put all that was written to an open file on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def rename(path: Path, target: Path) -> None:
    """Rename a file or a folder, on the disk too when this returns. A file that is at `target` is replaced."""
    os.rename(path, target)
    sync(target.parent)
