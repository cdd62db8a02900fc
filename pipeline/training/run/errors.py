"""What goes wrong on one process while the others run: said there, with the exit code for it.

Takes the block in which the run happens; turns out of memory, out of space and lost peers into a `RankError`. Out of
memory has left the last completed step whole, so all processes are asked to save it first.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.console import (
    EXIT_DISK_FULL,
    EXIT_OUT_OF_MEMORY,
    EXIT_PEER_LOST,
    RankError,
    UserError,
    complain,
    is_out_of_space,
    rank,
    space_message,
)
from pipeline.model.unsupported import is_out_of_memory
from pipeline.training.engine.engine import is_failed_collective
from pipeline.training.run.stop import Watcher


@contextlib.contextmanager
def explained(watcher: Watcher, save: Callable[[], None]) -> Iterator[None]:
    """`save` writes the last completed step, if there is one, together with the other processes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_space(error):  # some libraries say that with a RuntimeError
            raise
        if is_failed_collective(error):
            lost = watcher.lost() or f"lost the other processes: {str(error).splitlines()[0]}"
            raise RankError(lost, EXIT_PEER_LOST) from error
        if not is_out_of_memory(error):
            raise
        complain(f"rank {rank()} is out of memory; saving the last completed step")
        watcher.request(EXIT_OUT_OF_MEMORY)
        save()
        raise RankError(
            f"out of memory: {(str(error) or 'the machine could not allocate more').splitlines()[0]}\n"
            "Try activation_checkpointing = 'auto', a shorter sequence_len, or more stages.",
            EXIT_OUT_OF_MEMORY,
        ) from error


@contextlib.contextmanager
def out_of_space_explained(folder: Path) -> Iterator[None]:
    """Turn out of space, wherever and however a library says it, into a RankError with the bytes free at `folder`."""
    try:
        yield
    except UserError:  # what all processes know, or is said already
        raise
    except Exception as error:
        if not is_out_of_space(error):
            raise
        raise RankError(f"{space_message(error, folder)} ({str(error).splitlines()[0]})", EXIT_DISK_FULL) from error
