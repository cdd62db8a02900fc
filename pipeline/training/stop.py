"""Stop signals: to the launcher, to one process or to all, end in one saved state and no orphan.

Takes a way to save the last completed step; a thread of every process waits for signals (`sigwait` runs at once, where
a Python signal handler would wait for the collective the main thread hangs in) and watches the launcher. Whoever
learns of a stop writes `.stop` into the run's folder, where all see it: the `deepspeed` launcher signals its processes
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

from pipeline.console import EXIT_ABORTED, EXIT_STOPPED, UserError

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
STOP_FILE = ".stop"
# The launcher kills 30 s after its signal; writing a checkpoint needs some of that.
BOUNDARY_GRACE_S = 12.0
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
        self._launcher = _launcher_chain()
        self._thread = threading.Thread(target=self._watch, name="stop-watcher", daemon=True)
        self._thread.start()

    def attach(self, run_dir: Path, save: Callable[[], None]) -> None:
        """From here on a stop saves first. `save` writes the last completed step and may be called from this thread."""
        self._save = save
        self._run_dir = run_dir

    def request(self, code: int) -> None:
        """Ask all processes of the run to save and end with `code`, because this one cannot go on."""
        self._tell_the_others(str(code))

    def detach(self) -> None:
        """The run is over: a late signal has nothing to do."""
        self._save = None

    def hand_over(self) -> None:
        """Call from the main thread when the run is over and there is more to do: from here on a stop ends that with
        SystemExit(75), on the way of any error, so that unfinished outputs are removed. At once if one was asked for.
        """
        for number in self._held:
            signal.signal(number, _leave)
        self._handed_over = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._held)
        if self.requested():
            _leave()

    def requested(self) -> bool:
        """Whether any process of the run has been told to stop."""
        return self._told or (self._run_dir is not None and (self._run_dir / STOP_FILE).exists())

    def _watch(self) -> None:
        while True:
            caught = signal.sigtimedwait(self._held, POLL_S)
            told = caught is not None or _launcher_chain(self._launcher) != self._launcher
            if self._handed_over:
                if told or self.requested():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
                    return
                continue
            if caught is not None and caught.si_signo == signal.SIGINT:
                self._interrupts += 1
                if self._interrupts > 1:
                    os._exit(EXIT_ABORTED)
            if told and self._run_dir is None:
                os._exit(EXIT_ABORTED)
            if told and not self.requested():
                self._tell_the_others()
            if self.requested():
                self._since = self._since or time.monotonic()
                if time.monotonic() - self._since > BOUNDARY_GRACE_S:
                    self._save_and_end()

    def _tell_the_others(self, code: str = "") -> None:
        self._told = True
        if self._run_dir is None:  # the others look nowhere yet, and have nothing to save: the launcher ends them
            return
        with contextlib.suppress(OSError):  # a full disk: then this process alone knows, and the step boundary tells
            (self._run_dir / STOP_FILE).write_text(code)

    def _code(self) -> int:
        """What the process that asked for the stop said to end with."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._run_dir / STOP_FILE).read_text())  # type: ignore[operator]
        return EXIT_STOPPED

    def _save_and_end(self) -> None:
        """Whatever happens while saving, the process ends: nobody is left to send it another signal."""
        if (save := self._save) is None:
            return
        code = self._code()
        try:
            save()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)


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
