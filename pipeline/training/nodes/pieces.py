"""A file from one process to another, in pieces of PIECE bytes: neither holds more of it than one.

Takes a group of torch.distributed over the CPU (gloo); the receiver's file appears whole, and is on the disk then.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.files import rename, sync_stream

PIECE = 8 * 2**20


def send(file: Path, size: int, to: int, group: Any) -> None:
    """Send the `size` bytes of `file` to the rank `to`, which calls `receive` with the same size. What is missing of it, or
    cannot be read, goes as zeros, and is an OSError when all has gone: the other would wait for ever for the rest."""
    failed: OSError | None = None
    descriptor = -1
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        failed = error
    for length in _lengths(size):
        piece = bytearray(length)
        try:
            if failed is None and os.readv(descriptor, [piece]) != length:
                raise OSError(f"{file} has become shorter while it was read")
        except OSError as error:
            failed = error
        dist.send(torch.frombuffer(piece, dtype=torch.uint8), to, group=group)
    if descriptor >= 0:
        os.close(descriptor)
    if failed is not None:
        raise failed


def receive(file: Path, size: int, sender: int, group: Any) -> None:
    """Write what the rank `sender` sends as `file`, in a folder that is there. OSError, when all has come, where it cannot be
    written; nothing of it is left then."""
    temporary = file.with_name(f".{file.name}.received")
    failed: OSError | None = None
    stream = None
    try:
        stream = temporary.open("wb")
    except OSError as error:
        failed = error
    for length in _lengths(size):
        piece = bytearray(length)
        dist.recv(torch.frombuffer(piece, dtype=torch.uint8), sender, group=group)
        try:
            if stream is not None and failed is None:
                stream.write(piece)
        except OSError as error:
            failed = error
    try:
        if stream is not None:
            with stream:
                sync_stream(stream)
            if failed is None:
                rename(temporary, file)
    except OSError as error:
        failed = failed or error
    if failed is not None:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise failed


def _lengths(size: int) -> list[int]:
    return [min(PIECE, size - begin) for begin in range(0, size, PIECE)]
