"""A record of every process of a run, which all of them read: in a file that all map, or in copies over the launcher's store.

Takes the size of a record; gives memory with one after the other by rank, of which a process writes its own. On one node
it is one memory. Over several, a thread of each process puts its record into the store and takes the others' out of it,
every EXCHANGE_S; it has a connection of its own, and whoever reads the copies never waits for the network.
"""

import mmap
import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from pipeline import processes

EXCHANGE_S = 0.5


class Records(Protocol):
    """`memory` has the records; of `hosts` there is one for each rank, none where all are on this one."""

    memory: Any
    hosts: list[str]

    def seen(self, rank: int, written: float) -> float:
        """When, by this machine's monotonic clock, the record was written that says `written`."""

    def met(self) -> None:
        """All processes are here."""

    def close(self) -> None:
        """The run is over."""


class Mapped:
    """Of one node. The file has no name any more as soon as all have met. OSError if it cannot be mapped."""

    def __init__(self, file: Path, size: int, world: int) -> None:
        self.hosts: list[str] = []
        self._file = file
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.posix_fallocate(descriptor, 0, size * world)  # a hole written to on a full disk would be SIGBUS
            self.memory: Any = mmap.mmap(descriptor, size * world)
        finally:
            os.close(descriptor)

    def seen(self, rank: int, written: float) -> float:
        """As written: one clock."""
        return written

    def met(self) -> None:
        """Nothing is left behind, however the run ends."""
        self._file.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing to do."""


class Exchanged:
    """Over several nodes. Every process makes one at the same time; `store` is torch.distributed's, a connection of its own.

    The clocks of two machines have nothing to do with each other, so a record counts as written when it arrives changed.
    Once the store is lost, with its node, nothing arrives any more.
    """

    def __init__(self, store: Any, size: int, rank: int, world: int) -> None:
        self._store, self._size, self._rank = store, size, rank
        self._store.set(f"host/{rank}", processes.host())
        self.hosts: list[str] = [self._store.get(f"host/{each}").decode() for each in range(world)]
        self.memory: Any = bytearray(size * world)
        self._arrived = [time.monotonic()] * world
        self._over = threading.Event()
        self._exchange(first=True)
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def seen(self, rank: int, written: float) -> float:
        """Of another process, when it arrived."""
        return written if rank == self._rank else self._arrived[rank]

    def met(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Exchange no more: the store may go."""
        self._over.set()
        self._thread.join(4 * EXCHANGE_S)

    def _run(self) -> None:
        while not self._over.wait(EXCHANGE_S):
            try:
                self._exchange()
            except RuntimeError:  # torch's errors of a store that is gone
                return

    def _exchange(self, first: bool = False) -> None:
        own = slice(self._rank * self._size, (self._rank + 1) * self._size)
        self._store.set(f"record/{self._rank}", bytes(self.memory[own]))
        keys = [f"record/{rank}" for rank in range(len(self.hosts))]
        if first:
            self._store.wait(keys, timedelta(minutes=5))
        for rank, record in enumerate(self._store.multi_get(keys)):
            there = slice(rank * self._size, (rank + 1) * self._size)
            if rank != self._rank and record != self.memory[there]:
                self.memory[there] = record
                self._arrived[rank] = time.monotonic()
