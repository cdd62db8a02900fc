"""Where each process of a run is and when it last got on, for all to read: who hangs, who waits for whom, who has died.

Takes records that all processes read (nodes/records.py); each writes its own. The main thread says what it is about to
do. A second thread (stop.py's) says that the process is alive, counts the time without progress, and reads the others'
records: a collective that waits for ever does not say for whom. What one learns of a stop, or of a death on its host, all
read there too.
"""

import contextlib
import math
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.console import duration
from pipeline.training.nodes.records import Records

# Times the timeout for what the run has not done before, where nobody knows how long it takes; no less than two minutes.
FIRST_TIME, FIRST_TIMEOUT_S = 6.0, 20.0
SLOWEST = 3.0  # times the longest so far
UNHEARD_S = 2.5  # without a record of another host, where a connection was lost
SILENT_S = 5.0  # without a sign of life from a process's second thread
UNHURRIED = "reading weights"  # takes as long as the disk takes
WORDS = 64
MAIN = struct.Struct(f"<q?{WORDS}s")  # step, whether it waits for others, what it does in words
SIGN = struct.Struct("<qd?")  # process id (0: not here yet), its last sign of life, whether it is overdue
LEARNT = struct.Struct(
    "<qq256s"
)  # code that a stop asked for is to end with, and a rank that died, each plus one; its end
RECORD = MAIN.size + SIGN.size + LEARNT.size


class Peer(NamedTuple):
    """What one process says of itself. `silent_s`: seconds since its last sign of life; `waits`: for another process."""

    rank: int
    pid: int
    silent_s: float
    overdue: bool
    step: int
    waits: bool
    doing: str
    host: str = ""

    @property
    def silent(self) -> bool:
        """Whether it is stopped, dead, or has Python's lock held: its second thread does not run."""
        return self.silent_s > SILENT_S

    def __str__(self) -> str:
        where = f"step {self.step}, {self.doing}" if self.step and self.doing != "step" else self.doing
        on = f" on {self.host}" if self.host else ""
        return f"rank {self.rank}{on} (process {self.pid}): {where}"


class Hang(NamedTuple):
    """A run that does not get on. `silent`: ranks that cannot even save."""

    text: str
    speaker: int
    silent: list[int]


class Peers:
    """This process's record and the others'. `timeout_s`: 0 never calls anything a hang."""

    def __init__(self, records: Records, rank: int, world: int, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._records, self._memory, self._met = records, records.memory, False
        self._running_s = 0.0
        self._kind, self._step = "starting", 0
        self._longest: dict[str, float] = {}
        self._places = 0  # so often has the main thread said where it is
        self._seen, self._stalled_s = 0, 0.0
        self._dead: dict[int, str] = {}
        self._processes: dict[int, psutil.Process] = {}
        self.doing("starting")
        self.sign(0.0)

    @contextlib.contextmanager
    def phase(self, kind: str, step: int) -> Iterator[None]:
        """The main thread is in it; how long it takes is what the next of this kind is expected to take."""
        outer, began = (self._kind, self._step), self._running_s
        self._kind, self._step = kind, step
        self.doing(kind)
        yield
        self._longest[kind] = max(self._longest.get(kind, 0.0), self._running_s - began)
        self._kind, self._step = outer
        self.doing(self._kind)

    def doing(self, what: str, waits: bool = False) -> None:
        """The main thread is about to do this. `waits`: for another process."""
        MAIN.pack_into(self._memory, self.rank * RECORD, self._step, waits, what.encode()[:WORDS])
        self._places += 1

    def sign(self, passed_s: float) -> None:
        """The second thread, `passed_s` seconds of running after its last sign (those in which all was paused do not count)."""
        self._running_s += passed_s
        self._stalled_s = self._stalled_s + passed_s if self._seen == self._places else 0.0
        self._seen = self._places
        overdue = self._stalled_s > self.patience_s()
        SIGN.pack_into(self._memory, self.rank * RECORD + MAIN.size, os.getpid(), time.monotonic(), overdue)
        if not self._met and self.rank == 0 and all(peer.pid for peer in self.all()):
            self._records.met()
            self._met = True

    def patience_s(self) -> float:
        """How long the main thread may be without progress in what it does now."""
        if not self.timeout_s or self._kind == UNHURRIED:
            return math.inf
        if self._kind not in self._longest:
            return FIRST_TIME * max(self.timeout_s, FIRST_TIMEOUT_S)
        return max(self.timeout_s, SLOWEST * self._longest[self._kind])

    def all(self) -> list[Peer]:
        """What every process says, by rank."""
        now, found, hosts = time.monotonic(), [], self._records.hosts
        for rank in range(self.world):
            step, waits, words = MAIN.unpack_from(self._memory, rank * RECORD)
            pid, seen, overdue = SIGN.unpack_from(self._memory, rank * RECORD + MAIN.size)
            doing = words.rstrip(b"\0").decode(errors="ignore")
            silent_s = now - self._records.seen(rank, seen) if pid else 0.0
            found.append(Peer(rank, pid, silent_s, overdue, step, waits, doing, hosts[rank] if hosts else ""))
        return found

    def hang(self) -> Hang | None:
        """What to say if nobody gets on: this process is overdue, and every other one is, or gives no sign of life."""
        everyone = self.all()
        if not everyone[self.rank].overdue or not all(p.overdue or p.silent for p in everyone):
            return None
        silent = [p for p in everyone if p.silent]
        guilty = silent or [p for p in everyone if not p.waits] or everyone
        lines = [f"no progress for {duration(self._stalled_s)}. {_verb(guilty)}:"]
        lines += [f"  {peer}{_how(peer, self._is_here(peer))}" for peer in guilty]
        others = [p for p in everyone if p not in guilty]
        lines += ["the others wait:", *(f"  {peer}" for peer in others)] if others else []
        speaker = next(p.rank for p in everyone if not p.silent)
        return Hang("\n".join(lines), speaker, [p.rank for p in silent])

    def dead(self) -> list[str]:
        """What became of every other process that has ended, as far as its system still knows, or another process has said.
        Those that only lost others come last."""
        for peer in self.all():
            if peer.rank != self.rank and peer.pid and peer.rank not in self._dead and (how := self._end_of(peer)):
                self._dead[peer.rank] = f"{peer}: {how}"
                self._learn(lost=(peer.rank, self._dead[peer.rank]))
        for rank in range(self.world):
            _, lost, words = self._learnt_by(rank)
            if lost and lost - 1 != self.rank:
                self._dead.setdefault(lost - 1, words.rstrip(b"\0").decode(errors="ignore"))
        return sorted(self._dead.values(), key=lambda text: "exit code 6" in text)

    @property
    def over_hosts(self) -> bool:
        """Whether there are processes whose end this host does not see."""
        return len(set(self._records.hosts)) > 1

    def unheard(self) -> list[str]:
        """Processes on other hosts of which nothing has come for a while: they or their host have died, or the network."""
        return [
            f"{peer}: no sign of life for {duration(peer.silent_s)}" for peer in self.all() if self._is_unheard(peer)
        ]

    def tell_stop(self, code: int) -> None:
        """All processes of the run are to save, and end with `code`."""
        self._learn(stop=code)

    def told_stop(self) -> int | None:
        """The code that some process said to stop with, if one did."""
        return next((code - 1 for rank in range(self.world) if (code := self._learnt_by(rank)[0])), None)

    def close(self) -> None:
        """The run is over."""
        self._records.close()

    def _is_unheard(self, peer: Peer) -> bool:
        return not self._is_here(peer) and peer.silent_s > UNHEARD_S

    def _is_here(self, peer: Peer) -> bool:
        """Whether its process id is one of this host's."""
        return not peer.host or peer.host == self._records.hosts[self.rank]

    def _learnt_by(self, rank: int) -> tuple[int, int, bytes]:
        return LEARNT.unpack_from(self._memory, rank * RECORD + MAIN.size + SIGN.size)

    def _learn(self, stop: int | None = None, lost: tuple[int, str] | None = None) -> None:
        """Say it in this process's record: of the stops the first, of the dead the last."""
        code, dead, words = self._learnt_by(self.rank)
        if stop is not None:
            code = code or stop + 1
        if lost is not None:
            dead, words = lost[0] + 1, lost[1].encode()[:256]
        LEARNT.pack_into(self._memory, self.rank * RECORD + MAIN.size + SIGN.size, code, dead, words)

    def _end_of(self, peer: Peer) -> str | None:
        if not self._is_here(peer):
            return None
        try:
            if peer.rank not in self._processes:
                self._processes[peer.rank] = psutil.Process(peer.pid)
            process = self._processes[peer.rank]
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return None
            return exit_of(peer.pid)
        except psutil.Error:
            return "it is gone"


def stands_at() -> str:
    """Where this process's main thread is in Python: file, line and function, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)[-3:] if frame else []
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(stack))


def exit_of(pid: int) -> str:
    """How a process ended that nobody has waited for yet (Linux keeps it in /proc, as `wait` gives it)."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[49])
    except (OSError, ValueError, IndexError):
        return "it is gone"
    if number := status & 0x7F:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        often = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
        return f"killed by {name}{often}"
    return f"ended with exit code {status >> 8}" if status else "it has ended"


def _verb(guilty: list[Peer]) -> str:
    names = " and ".join(f"rank {peer.rank}" for peer in guilty)
    return f"{names} {'hangs' if len(guilty) == 1 else 'hang'}"


def _how(peer: Peer, here: bool) -> str:
    if not peer.silent:
        return ""
    with contextlib.suppress(psutil.Error):
        if here and psutil.Process(peer.pid).status() == psutil.STATUS_STOPPED:
            return f"; stopped by a signal {duration(peer.silent_s)} ago"
    return f"; no sign of life for {duration(peer.silent_s)}"
