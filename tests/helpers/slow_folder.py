"""One folder on two nodes, each of which sees late what the other does there, as over NFS: made of two folders and a thread.

The thread looks what has been made, changed or removed in either (a rename is both), and does the same in the other when
`delay_s` seconds have passed. Files appear whole, in the order in which they were last written.
"""

import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

POLL_S = 0.1
COPIED = ".being-copied"
State = tuple[bool, int, int]  # whether it is a folder; its bytes and time, 0 of a folder


class Change(NamedTuple):
    """`name` in the folder number `side` is to go into the other, or out of it."""

    due: float
    side: int
    name: str
    removed: bool


class SlowFolder:
    """Between `one` and `other`, but for what is below a folder called as one of `apart`, as long as the block lasts."""

    def __init__(self, one: Path, other: Path, delay_s: float, apart: tuple[str, ...]) -> None:
        self._sides, self._delay_s, self._apart = (one, other), delay_s, apart
        self._known: tuple[dict[str, State], dict[str, State]] = ({}, {})
        self._waiting: list[Change] = []
        self.late = 0  # changes that were shown
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "SlowFolder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            for side in (0, 1):
                self._look(side)
            now = time.monotonic()
            due, self._waiting = [c for c in self._waiting if c.due <= now], [c for c in self._waiting if c.due > now]
            for change in due:
                with suppress(FileNotFoundError):  # it has gone meanwhile, which will be seen
                    self._show(change)

    def _look(self, side: int) -> None:
        found, known = dict(self._states(side)), self._known[side]
        due = time.monotonic() + self._delay_s
        new = sorted((n for n in found if known.get(n) != found[n]), key=lambda n: (not found[n][0], found[n][2], n))
        gone = sorted((n for n in known if n not in found), reverse=True)  # what is in a folder before it
        self._waiting += [Change(due, side, name, False) for name in new] + [Change(due, side, n, True) for n in gone]
        known.clear()
        known.update(found)

    def _states(self, side: int) -> list[tuple[str, State]]:
        states = []
        for parent, folders, files in os.walk(self._sides[side]):
            folders[:] = [name for name in folders if name not in self._apart]
            for name in (*folders, *(file for file in files if not file.endswith(COPIED))):
                path = Path(parent, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    state = (True, 0, 0) if path.is_dir() else (False, status.st_size, status.st_mtime_ns)
                    states.append((str(path.relative_to(self._sides[side])), state))
        return states

    def _show(self, change: Change) -> None:
        source, target = (self._sides[side] / change.name for side in (change.side, 1 - change.side))
        known = self._known[1 - change.side]
        self.late += 1
        if change.removed:
            if not source.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
                for name in [n for n in known if n == change.name or n.startswith(f"{change.name}/")]:
                    del known[name]
        elif source.is_dir():
            target.mkdir(exist_ok=True)
            known[change.name] = (True, 0, 0)
        else:
            copied = target.with_name(f".{target.name}{COPIED}")
            shutil.copy2(source, copied)
            status = copied.stat()
            known[change.name] = (False, status.st_size, status.st_mtime_ns)
            copied.rename(target)
