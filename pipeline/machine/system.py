"""The machine without its GPUs: versions against those that were tested, memory, limits, disks.

Takes the folder that runs will be written to; gives findings. Needs no torch.
"""

import importlib.metadata
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.console import gib
from pipeline.files import sync_stream
from pipeline.machine.findings import Finding

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
DISK_BYTES = 2**28
SLOW_DISK_BYTES_PER_S = 100e6  # a checkpoint of a large adapter's states is then a minute
LITTLE_ROOM_BYTES = 20 * GIB
SHARED_MEMORY_BYTES = GIB  # NCCL's and the data's buffers; containers have 64 MiB unless told otherwise
FILES = 4096  # shards, logs, sockets of all processes
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def look(folder: Path, n_bytes: int = DISK_BYTES) -> Iterator[Finding]:
    """All of it. `folder`: where runs are to be written; `n_bytes`: written there to measure the disk, and removed."""
    yield python()
    yield from packages(tested_versions(), required())
    yield memory()
    yield shared_memory(Path("/dev/shm"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0])
    yield from disk(folder, n_bytes)


def python() -> Finding:
    """The interpreter."""
    return Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))


def tested_versions() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    rows = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {name.lower(): version.split(";")[0].strip() for name, version in rows}


def required() -> list[str]:
    """The packages of requirements.txt."""
    found = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if name := NAME.match(line):
            found.append(name[0].lower())
    return found


def packages(tested: dict[str, str], names: list[str]) -> Iterator[Finding]:
    """Those that are missing, or of another version than was tested; one line for all others."""
    same = []
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "broken", "is not installed", "pip install -c constraints.txt -r requirements.txt")
            continue
        wanted = tested.get(name)
        if wanted is None or version.split("+")[0] == wanted:
            same.append(name)
        else:
            yield Finding(
                name,
                "ok",
                f"{version}; tested was {wanted}",
                "should anything look strange: pip install -c constraints.txt -r requirements.txt",
            )
    yield Finding("packages", "ok", f"{len(same)} of {len(names)} in the versions that were tested")


def memory() -> Finding:
    """Main memory: what is free, which pinned activations and the fold take from."""
    found = psutil.virtual_memory()
    return Finding("main memory", "ok", f"{gib(found.available)} free of {gib(found.total)}")


def shared_memory(folder: Path) -> Finding:
    """What processes share with each other."""
    if not folder.is_dir():
        return Finding("/dev/shm", "none", "is not there")
    free = shutil.disk_usage(folder).free
    if free >= SHARED_MEMORY_BYTES:
        return Finding("/dev/shm", "ok", f"{gib(free)} free")
    return Finding("/dev/shm", "slow", f"{gib(free)} free", "start the container with --shm-size 8g, or --ipc host")


def open_files(limit: int) -> Finding:
    """Files that a process may have open."""
    if limit == resource.RLIM_INFINITY or limit >= FILES:
        return Finding("open files", "ok", "no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}")
    return Finding("open files", "slow", f"at most {limit}", f"ulimit -n {FILES}")


def file_size(limit: int) -> Finding:
    """How large a file may be."""
    if limit == resource.RLIM_INFINITY:
        return Finding("file size", "ok", "no limit")
    return Finding("file size", "slow", f"at most {gib(limit)}", "ulimit -f unlimited")


def disk(folder: Path, n_bytes: int) -> Iterator[Finding]:
    """Room where runs are written, and how fast it is written and read."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    room = f"{gib(free)} free at {there.resolve()}"
    if free < max(LITTLE_ROOM_BYTES, 2 * n_bytes):
        yield Finding(
            "room on disk", "slow", room, "a merged model takes as much as its base; choose another output_dir"
        )
    else:
        yield Finding("room on disk", "ok", room)
    if free < 2 * n_bytes:
        return
    try:
        written, read = _speeds(there, n_bytes)
    except OSError as error:
        yield Finding(
            "disk", "broken", f"{there.resolve()}: {error.strerror}", "choose an output_dir that can be written to"
        )
        return
    told = f"{written / 1e6:,.0f} MB/s written (on the disk), {read / 1e6:,.0f} MB/s read"
    if written < SLOW_DISK_BYTES_PER_S:
        yield Finding("disk", "slow", told, "checkpoints wait for it: put output_dir on a faster disk")
    else:
        yield Finding("disk", "ok", told)


def _speeds(folder: Path, n_bytes: int) -> tuple[float, float]:
    """Bytes a second, written until they are on the disk, and read with the cache told to forget them."""
    block = os.urandom(2**22)
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(n_bytes // len(block)):
            file.write(block)
        sync_stream(file)
        written = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(block)):
            pass
        return n_bytes / written, n_bytes / (time.perf_counter() - began)
