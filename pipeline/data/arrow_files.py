"""Arrow files of the cache: written batch by batch and made durable, read by mapping them into memory."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.files import sync_stream


class ArrowFile:
    """An Arrow file being written; `close` makes it durable."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._schema = schema
        self._writer = pa.ipc.new_file(self._file, schema)

    def write(self, columns: list[Any]) -> None:
        """The next record batch: a pyarrow array a column."""
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """Write the footer and wait until all of it is on the disk."""
        self._writer.close()
        sync_stream(self._file)
        self._file.close()

    def let_go(self) -> None:
        """Close it as it is."""
        with suppress(OSError):  # what is still in the buffer may not fit
            self._file.close()


def numbers(values: Any) -> NDArray[Any]:
    """The numbers of an array, or of a table's column, none of them null; of an array it is the memory itself, read-only.

    Arrow's own `to_numpy` imports pandas, half a second of a start.
    """
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    found: NDArray[Any] = np.from_dlpack(whole)
    return found


def opened(path: Path) -> Any:
    """A reader of record batches, whose memory is the file's."""
    return pa.ipc.open_file(pa.memory_map(str(path)))
