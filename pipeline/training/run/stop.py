"""Stop signals, processes that hang and processes that die: each ends in one saved state, if it can be, and no orphan.

Takes a way to save the last completed step; a thread of every process looks for signals (a Python signal handler would
wait for the collective the main thread hangs in) and watches the launcher and the other processes. Whoever learns of a
stop writes `.stop` into the run's folder, where all see it: the `deepspeed` launcher signals its processes
one after another, and dies itself without telling them.

The main thread ends at the step boundary. If that takes too long (the launcher kills after 30 s), the thread saves the
last completed step and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.console import EXIT_ABORTED, EXIT_PEER_LOST, EXIT_STOPPED, OTHER_RANKS_WAIT_S, UserError, complain
from pipeline.training.nodes.records import Records
from pipeline.training.run.peers import Hang, Peers, stands_at

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
STOP_FILE = ".stop"
# The launcher kills 30 s after its signal; writing a checkpoint needs some of that.
BOUNDARY_GRACE_S = 12.0
# Of a run that hangs: what hangs may be the disk.
SAVE_LIMIT_S = 600.0
# A process whose peer has died learns that from its collective (gloo), or never (NCCL). Longer than one that reports an
# error waits for the others.
LOST_GRACE_S = OTHER_RANKS_WAIT_S + 2.0
LOOK_S = 2.0  # the system may need a moment to say that a process has died
LOOK_FAR_S = 4.0  # and so many more pass until nothing has come of another host for long enough
POLL_S = 0.25


def hold_signals() -> set[signal.Signals]:
    """Block the stop signals in this thread and all it starts, before libraries start threads; returns those held.

    A signal that is ignored (nohup) stays ignored.
    """
    held = {s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    return held


class Watcher:
    """The waiting thread. Before `attach` a stop ends the process at once: there is nothing to save yet."""

    def __init__(self, held: set[signal.Signals]) -> None:
        self._held = held
        self._run_dir: Path | None = None
        self._save: Callable[[], None] | None = None
        self._interrupts = 0
        self._told = False
        self._since: float | None = None
        self._handed_over = False
        self._over = False
        self._resume_line = self._kept_on = ""
        self._peers: Peers | None = None
        self._lost_since: float | None = None
        self._launcher = _launcher_chain()
        self._thread = threading.Thread(target=self._watch, name="stop-watcher", daemon=True)
        self._thread.start()

    def meet(self, records: Records, rank: int, world: int, timeout_minutes: float) -> None:
        """From here on all processes see where each of them is. `timeout_minutes` without progress are a hang; 0: never."""
        self._peers = Peers(records, rank, world, timeout_minutes * 60)

    def phase(self, kind: str, step: int = 0) -> contextlib.AbstractContextManager[None]:
        """What the main thread does inside; `step` is the one that is under way, 0 for none."""
        return self._peers.phase(kind, step) if self._peers else contextlib.nullcontext()

    def doing(self, what: str, waits: bool = False) -> None:
        """What the main thread is about to do in its phase. `waits`: for another process."""
        if self._peers:
            self._peers.doing(what, waits)

    def attach(self, run_dir: Path, save: Callable[[], None], resume_line: str = "", kept_on: str = "") -> None:
        """From here on a stop saves first. `save` writes the last completed step and may be called from this thread.

        `kept_on`: the host on whose disk the checkpoints are, if not on this one's.
        """
        self._kept_on = kept_on
        self._save = save
        self._run_dir = run_dir
        self._resume_line = resume_line
        self._over = False

    def request(self, code: int) -> None:
        """Ask all processes of the run to save and end with `code`, because this one cannot go on."""
        self._tell_the_others(str(code))

    def detach(self) -> None:
        """The run is over: a late signal has nothing to do, and the others may leave."""
        self._save = None
        self._over = True

    def part(self) -> None:
        """Nothing more is said to the others, nor read of them: they leave."""
        if self._peers is not None:
            self._peers.close()

    def lost(self) -> str:
        """Which processes have died, and how, with what there is to resume from; empty if none has."""
        began = time.monotonic()
        while self._peers is not None:
            passed_s = time.monotonic() - began
            if dead := self._peers.dead() or (self._peers.unheard() if passed_s > LOOK_S else []):
                return f"lost {'; '.join(dead)}\n{self._kept()}"
            if passed_s > LOOK_S + (LOOK_FAR_S if self._peers.over_hosts else 0):
                break
            time.sleep(POLL_S / 5)
        return ""

    def hand_over(self) -> None:
        """Call from the main thread when the run is over and there is more to do: after this, a stop raises
        SystemExit(75) in the main thread, like any other error, so that unfinished outputs are removed. At once if one was
        asked for.
        """
        for number in self._held:
            signal.signal(number, _leave)
        self._handed_over = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._held)
        if self.requested():
            _leave()

    def requested(self) -> bool:
        """Whether any process of the run has been told to stop."""
        if self._told or self._run_dir is None:
            return self._told
        return (self._run_dir / STOP_FILE).exists() or (self._peers is not None and self._peers.told_stop() is not None)

    def _watch(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(POLL_S)
            # Time in which the whole run was stopped (Ctrl-Z, a paused container) is nobody's.
            passed, before = min(time.monotonic() - before, 4 * POLL_S), time.monotonic()
            caught = self._taken()
            told = bool(caught) or _launcher_chain(self._launcher) != self._launcher
            if self._handed_over:
                if told or self.requested():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                    return
                continue
            if signal.SIGINT in caught:
                self._interrupts += 1
                if self._interrupts > 1:
                    os._exit(EXIT_ABORTED)
            if told and self._run_dir is None:
                os._exit(EXIT_ABORTED)
            if told and not self.requested():
                self._tell_the_others()
            if self._peers is not None and not self._over:
                self._look_after_peers(self._peers, passed)
            if self.requested():
                self._since = self._since or time.monotonic()
                if time.monotonic() - self._since > BOUNDARY_GRACE_S:
                    self._save_and_end()

    def _taken(self) -> set[signal.Signals]:
        """The held signals that have come, taken. `sigtimedwait` alone would return an uninitialised siginfo, not None, when
        SIGSTOP and SIGCONT fall into its wait (CPython 3.6 to 3.13): it takes here what is known to be pending."""
        pending = signal.sigpending() & self._held
        for number in pending:
            signal.sigtimedwait({number}, 0)
        return pending

    def _look_after_peers(self, peers: Peers, passed_s: float) -> None:
        """End the process if the run hangs, or if another process has died and the main thread does not learn of it."""
        peers.sign(passed_s)
        if (hang := peers.hang()) is not None:
            self._end_hanging(hang, peers.rank)
        if not peers.dead():
            return
        self._lost_since = self._lost_since or time.monotonic()
        if time.monotonic() - self._lost_since > LOST_GRACE_S:
            complain(f"rank {peers.rank}: {self.lost()}")
            os._exit(EXIT_PEER_LOST)

    def _end_hanging(self, hang: Hang, rank: int) -> None:
        """Say who hangs, save if all can, and end with 6."""
        self._tell_the_others(str(EXIT_PEER_LOST))
        speaks = rank == hang.speaker
        if speaks:
            complain(hang.text)
        complain(f"rank {rank} stands at {stands_at()}")
        if self._save is not None and not hang.silent:
            threading.Timer(SAVE_LIMIT_S, os._exit, (EXIT_PEER_LOST,)).start()
            self._save_and_end(EXIT_PEER_LOST)
        if speaks:
            why = f"rank {hang.silent[0]}'s part of the last step cannot be saved; " if hang.silent else ""
            complain(why + self._kept())
        else:
            time.sleep(OTHER_RANKS_WAIT_S)  # the launcher ends all as soon as one has
        os._exit(EXIT_PEER_LOST)

    def _kept(self) -> str:
        """What there is to resume from."""
        if self._kept_on:
            return f"the checkpoints are on {self._kept_on}; if there is one, resume with\n  {self._resume_line}"
        steps = (
            [p.name.removeprefix("global_step") for p in self._run_dir.glob("global_step*")] if self._run_dir else []
        )
        if newest := max((int(step) for step in steps if step.isdigit()), default=0):
            return f"the newest checkpoint is that of step {newest}; resume with\n  {self._resume_line}"
        return "no checkpoint had been written yet"

    def _tell_the_others(self, code: str = "") -> None:
        self._told = True
        if self._run_dir is None:  # the others look nowhere yet, and have nothing to save: the launcher ends them
            return
        if self._peers is not None:  # another node may see the file late, or not at all
            self._peers.tell_stop(int(code or EXIT_STOPPED))
        with contextlib.suppress(OSError):  # a full disk: then this process alone knows, and the step boundary tells
            (self._run_dir / STOP_FILE).write_text(code)

    def _code(self) -> int:
        """What the process that asked for the stop said to end with."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._run_dir / STOP_FILE).read_text())  # type: ignore[operator]
        told = self._peers.told_stop() if self._peers is not None else None
        return EXIT_STOPPED if told is None else told

    def _save_and_end(self, code: int | None = None) -> None:
        """Save and end: with `code`; or without one with that of the stop or of an error. Whatever happens while saving,
        the process ends: nobody is left to send it another signal."""
        if (save := self._save) is None:
            return
        ends_with = self._code()
        try:
            save()
        except UserError as error:
            complain(str(error))
            ends_with = error.exit_code
        except BaseException:
            complain(traceback.format_exc())
            ends_with = 1
        os._exit(ends_with if code is None else code)


def _leave(*_: object) -> None:
    """Leave the main thread once; what comes later must not disturb the clearing up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(EXIT_STOPPED)


def _launcher_chain(known: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Process ids of the launcher above us: DeepSpeed's launch.py and the `deepspeed` command, or torchrun.

    Empty without a launcher, so that closing the shell one started from does not stop a run. With `known`, only those
    are looked at again: the ones still in place.
    """
    parent = os.getppid()
    if known is not None:
        if not known or parent != known[0]:
            return ()
        return known if len(known) == 1 or _parent_of(parent) == known[1] else known[:1]
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ()
    grandparent = _parent_of(parent)
    is_runner = (
        grandparent is not None
        and "deepspeed" in " ".join(_command(grandparent))
        and "launch" in " ".join(_command(parent))
    )
    return (parent, grandparent) if is_runner and grandparent is not None else (parent,)


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []
