"""`log.txt` in a run's folder: what the run said, line by line, with time, level and rank.

Takes the records of `console.LOGGER`, from `debug` on whatever the terminal shows; gives lines such as
`2026-11-28T20:15:10Z warning rank 1: …`: all of the first rank, warnings and errors of the others. What is said before
the run has a folder waits for it. Resuming appends. Another node than the first has a file of its own,
`log-node<N>.txt`. A file that cannot be written never ends a run.
"""

import logging
import os
import time
from collections import deque
from pathlib import Path

from pipeline.console import LOGGER, rank, warn
from pipeline.processes import node

FILE = "log.txt"
OF_NODE = "log-node{}.txt"  # appends from several machines to one file would overwrite each other
MOST_WAITING = 10_000  # records before there is a folder


class LogFile(logging.Handler):
    """Listens from its making on; `open` gives it the folder, in which all ranks of a node write to the same file."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._descriptor: int | None = None
        self._torn = False
        LOGGER.addHandler(self)

    def open(self, run_dir: Path) -> None:
        """Append to the file in `run_dir` from here on, first what was said before. Warns where that is impossible."""
        file = run_dir / (OF_NODE.format(node()) if node() else FILE)
        try:
            self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            self.close()
            warn(f"{file}: cannot write there: {error.strerror}; the run goes on without it")
            return
        while self._waiting:
            self._write(self._waiting.popleft())

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the handler's lock, as `console.Terminal`: one call of the system appends a record whole."""
        lines = in_lines(record)
        if self._descriptor is None:
            self._waiting.append(lines)
        else:
            self._write(lines)
        return True

    def close(self) -> None:
        """Listen no more."""
        LOGGER.removeHandler(self)
        self._waiting.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def _write(self, lines: bytes) -> None:
        """On a disk that is full, or gone, the record is lost. Half a line that was written is ended first."""
        whole = b"\n" * self._torn + lines
        try:
            written = os.write(self._descriptor, whole) if self._descriptor is not None else 0
        except OSError:
            return
        self._torn = written < len(whole)


def in_lines(record: logging.LogRecord) -> bytes:
    """A record as lines, each with the time in UTC, the level and the rank; nothing for an empty one."""
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
    head = f"{when} {record.levelname.lower()} rank {rank()}: "
    lines = record.getMessage().splitlines()
    return "".join(f"{head}{line}\n" for line in lines if line.strip()).encode()
