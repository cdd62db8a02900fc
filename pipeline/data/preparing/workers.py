"""Takes a function and what it is to be called with; gives the results in order, made by several processes where asked to.

The processes are forked, so that they have the tokenizer and the template without loading them; they end with the one that
began them, however it ends.
"""

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.console import EXIT_OUT_OF_MEMORY, UserError

WORTH_IT_BYTES = 2**24  # of text: below that processes take longer to begin than they save
AHEAD = 2  # calls for each process that are under way or wait
_PR_SET_PDEATHSIG = 1

Item = TypeVar("Item")
Result = TypeVar("Result")

_work: Callable[[Any], Any] | None = None  # of a process that works for another


def processes_for(text_bytes: int, asked: int | None) -> int:
    """How many processes prepare so much text: as many as are `asked` for, else one for each core where it is worth it."""
    if asked is not None:
        return asked
    return len(os.sched_getaffinity(0)) if text_bytes >= WORTH_IT_BYTES else 1


def in_order(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`work` of each item, in the order of the items, of which a few for each process are read ahead.

    An error of `work` is raised in its turn. UserError where a process was killed.
    """
    if processes == 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (work, os.getpid()))
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of the {processes} processes that prepare the data was killed, most likely for want of memory: set "
            "dataset_processes lower; what is prepared so far is kept",
            EXIT_OUT_OF_MEMORY,
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """In a new process: what it works with. It ends when its parent does, and leaves Ctrl-C to it."""
    global _work
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not there after a fork
    _work = work


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)
