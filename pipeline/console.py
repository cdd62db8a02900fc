"""What the user sees: lines from the first rank only, errors they can mend, progress, human units.

Takes plain text and numbers; gives lines on the terminal, and records of Python's `logging` for whatever listens besides
(`log_file.LogFile`). Nothing here knows about training.
"""

import errno
import logging
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_CHECKPOINT = 3
EXIT_NON_FINITE = 4
EXIT_OUT_OF_MEMORY = 5
EXIT_PEER_LOST = 6
EXIT_DISK_FULL = 28
EXIT_STOPPED = 75
EXIT_ABORTED = 130

LEVELS = ("debug", "info", "warning", "error")

GONE = (errno.EPIPE, errno.EIO)  # of a pipe that nobody reads, and of a terminal that was closed
OTHER_RANKS_WAIT_S = 5.0
SLOW_S = 2.0

# What a terminal obeys rather than shows (C0 and C1 but for the newline and the tab), what breaks or turns a line (Unicode's
# separators and bidirectional controls, which can make a name read as another), and halves of surrogate pairs, which no
# encoding writes.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake or a state of affairs the user can mend: what, where, how. Ends the program without a traceback."""

    def __init__(self, message: str, exit_code: int = EXIT_CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CollectedErrors:
    """Mistakes that have nothing to do with each other, reported at once: each block runs `with errors.collect():`."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """A block whose UserError waits for `raise_all`."""
        try:
            yield
        except UserError as error:
            self.errors.append(error)

    def raise_all(self) -> None:
        """Raise what was collected: one UserError as it is, several as one with a line for each."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = "\n".join(f"  {error}" for error in self.errors)
            raise UserError(f"{len(self.errors)} problems:\n{lines}", self.errors[0].exit_code)


class RankError(UserError):
    """Found by one process only (out of memory, a lost peer): that process says it, with its rank."""


def is_out_of_space(error: BaseException | None) -> bool:
    """Whether `error`, or one it was raised from, says that there is no room to write (a UserError: by exit code 28)."""
    return _space_errno(error) is not None or getattr(error, "exit_code", None) == EXIT_DISK_FULL


def _space_errno(error: BaseException | None) -> int | None:
    """ENOSPC, EDQUOT or EFBIG. Rust libraries and Arrow say the number in words, C++ (gloo, torch) the system's sentence."""
    while error is not None:
        own = getattr(error, "errno", None)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            words = rf"(?i:os error|errno) {number}\b|\b{os.strerror(number)}\b"
            if own == number or (own is None and not isinstance(error, UserError) and re.search(words, str(error))):
                return number
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def space_message(error: BaseException, where: Path, needed: str = "") -> str:
    """Why nothing more can be written at `where`, and the bytes: what was `needed` ('3 GiB', '' if not known), what is free."""
    if isinstance(error, UserError):  # it has said so already
        return str(error)
    number = _space_errno(error)
    while not where.exists() and where != where.parent:
        where = where.parent
    if number == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = f"{gib(limit)} (ulimit -f)" if limit != resource.RLIM_INFINITY else "the file system takes"
        return f"a file may not be larger than {allowed}" + (f", {needed} needed" if needed else "")
    why = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}.get(number or 0, str(error))
    figures = [f"{needed} needed"] if needed else []
    with suppress(OSError):
        figures.append(f"{gib(shutil.disk_usage(where).free)} free at {where}")
    return f"{why}: {', '.join(figures)}" if figures else why


def rank() -> int:
    """This process's global rank as the launcher set it (srun alone: its task); 0 when there is no launcher."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def debug(text: str) -> None:
    """Of the first rank, for the log file; on the terminal with `--log_level debug` only."""
    if rank() == 0:
        LOGGER.debug(plain(text), extra={"shown": True})


def log(text: str = "") -> None:
    """Print `text` on the first rank only."""
    if rank() == 0:
        LOGGER.info(plain(text), extra={"shown": True})


def warn(text: str) -> None:
    """Print a warning on the first rank only; a log file has those of all ranks."""
    LOGGER.warning(plain(text), extra={"shown": rank() == 0})


def complain(text: str, *, shown: bool = True) -> None:
    """Print an error on this rank, whichever it is; without `shown` it is for the log file only."""
    LOGGER.error(plain(text), extra={"shown": shown})


def plain(text: str) -> str:
    """`text` with its control characters as escapes: names and texts of others cannot steer the terminal through ours.

    Newlines stay, as messages have several lines; where a name of others must not begin one, `foreign.printable` it.
    """
    return CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


class Terminal(logging.Handler):
    """Shows records on standard output and, from warnings on, on standard error, where they are found at that moment."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Without the handler's lock: who waits for a terminal must not keep the watching thread from ending the process."""
        if record.levelno >= self.level and getattr(record, "shown", True):
            prefix = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            try:
                print(prefix + record.getMessage(), file=stream, flush=True)
            except OSError as error:
                if error.errno in GONE:
                    _let_go(stream)
                elif record.levelno < logging.ERROR:  # a file on the full disk: of an error the exit code still says it
                    raise
        return True

    def show_from(self, level: str) -> None:
        """Show records of `level`, one of LEVELS, and above."""
        self.setLevel(level.upper())


def _let_go(stream: TextIO) -> None:
    """Show nothing more on it: its terminal has gone, or the launcher's end of it (a stop through ssh), and a run is to save."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


LOGGER = logging.getLogger("mulora_pipe")
LOGGER.setLevel(logging.DEBUG)
LOGGER.propagate = False  # libraries give the root logger handlers of their own
TERMINAL = Terminal(logging.INFO)
LOGGER.addHandler(TERMINAL)


@contextmanager
def log_if_slow(what: str) -> Iterator[None]:
    """Say `what` is being done as soon as it has taken two seconds. Also a decorator. Not around a progress bar."""
    timer = threading.Timer(SLOW_S, log, [f"{what} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with elapsed and remaining time; yields `advance(n)`. Silent on other ranks.

    On a terminal it is drawn in place; in a log it leaves one line when it ends, so logs stay readable.
    """
    from rich.console import Console  # rich takes longer to import than all else here
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=rank() != 0 or TERMINAL.level > logging.INFO,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.update(task, advance=n)
    debug(f"{description.strip()}: {duration(time.monotonic() - began)}")


def gib(n_bytes: float) -> str:
    """Bytes as GiB, MiB or KiB with three digits: `1.25 GiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}" if n_bytes < 1000 * size else f"{n_bytes / size:.0f} {unit}"
    return f"{n_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as `4 d 03 h`, `2 h 05 min`, `3 min 20 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {s:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def leave_on_sigterm() -> None:
    """SIGTERM then leaves through the same door as an error, so that an unfinished output is removed."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(EXIT_ABORTED))


def run_command(main: Callable[[], int]) -> None:
    """Run a command's `main` and exit with its code; a `UserError` becomes one message and its own exit code.

    Every rank raises the same UserError; the first one says it, and the first of each other node, which may have one of its
    own. The others leave it time to: the launcher ends all processes as soon as one has failed. A RankError is said where it
    is raised, and ends the process at once: other threads and libraries may be waiting for peers. Only who has lost the
    others leaves them time too: the launcher ends with the code it sees first, and theirs says why.
    """
    try:
        code = main()
    except RankError as error:
        complain(f"rank {rank()}: {error}")
        if error.exit_code == EXIT_PEER_LOST:
            time.sleep(OTHER_RANKS_WAIT_S)
        os._exit(error.exit_code)
    except UserError as error:
        complain(str(error), shown=rank() == 0 or os.environ.get("LOCAL_RANK") == "0")
        if rank() != 0:
            time.sleep(OTHER_RANKS_WAIT_S)
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_ABORTED
    except Exception as error:
        if not is_out_of_space(error):
            complain("".join(traceback.format_exception(error)), shown=False)  # Python prints it
            raise
        _end_out_of_space(error)
    sys.exit(code)


def _end_out_of_space(error: Exception) -> NoReturn:
    """Say it and end, on whatever process. At once: at an ordinary end Python would fail again to empty its buffers."""
    named = getattr(error, "filename", None)
    where = Path(named) if isinstance(named, str) else Path.cwd()
    of_rank = f"rank {rank()}: " if "RANK" in os.environ else ""
    complain(f"{of_rank}{space_message(error, where)} ({error})")
    os._exit(EXIT_DISK_FULL)
