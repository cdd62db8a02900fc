"""Takes rows of unequal length as they come; gives them back as a memory-mapped store, each with its runs of targets.

On disk a store is a folder: `rows.arrow` (ids int32 and runs int32, flat pairs of start and end, as lists), `index.arrow`
(length, targets, conversation, place in the files) and `report.json`. The rows stay on disk; of the index a run holds three
numbers a row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.arrow_files import ArrowFile, numbers, opened
from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.files import write_json

BATCH_ROWS = 512  # in one Arrow record batch
_MEND = "delete the folder to have it built again"
_ROWS = pa.schema([("input_ids", pa.list_(pa.int32())), ("runs", pa.list_(pa.int32()))])
_INDEX = pa.schema(
    [("length", pa.int32()), ("targets", pa.int32()), ("conversation", pa.int64()), ("place", pa.string())]
)

Runs = list[tuple[int, int]]


@dataclass(frozen=True)
class Report:
    """What became of a dataset's rows. `read` are rows of its files; `bad` are left out, by reason, the first places named.

    `notes`: what else was met, in words with its number, in the order of the report. `stops`: targets at which a server stops.
    `ends`: the id that ends trained turns, where the model does not stop at it yet. `specials`: ids of special tokens in
    the rows.
    """

    name: str
    kind: str
    bos: int | None
    eos: int
    read: int
    bad: int
    rows: int
    tokens: int
    targets: int
    stops: int
    longest: int
    largest_id: int
    duplicates: int
    sha256: str
    ends: int | None = None
    specials: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def bad_lines(self) -> list[str]:
        """Of the notes those on bad rows."""
        return [line for line in self.notes if line.startswith("bad")]

    def __str__(self) -> str:
        """What was read and what it is now, then a line for each thing that was met."""
        share = f"{self.targets / self.tokens:.1%}" if self.tokens else "none"
        line = (
            f"{self.name}: {self.read:,} {'conversations' if self.kind == 'chat' else 'rows'} read = {self.rows:,} rows of "
            f"{self.tokens:,} tokens, {self.targets:,} of them ({share}) targets, {self.stops:,} of these stops; "
            f"the longest has {self.longest:,} tokens"
        )
        return "\n          ".join([line, *self.notes])


class RowWriter:
    """Writes rows into `folder`: `add` in order, then `close` with what is known only at the end."""

    def __init__(self, folder: Path, stop_ids: frozenset[int]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.stop_ids = folder, sorted(stop_ids)
        self.rows = self.tokens = self.targets = self.stops = self.longest = self.largest_id = 0
        self._seen = np.zeros(0, np.bool_)  # which ids are in the rows
        self._content = hashlib.sha256()
        self._pending: list[tuple[NDArray[np.int32], Runs, int, str]] = []
        self._rows, self._index = ArrowFile(folder / "rows.arrow", _ROWS), ArrowFile(folder / "index.arrow", _INDEX)

    def add(self, ids: Sequence[int] | NDArray[np.int32], runs: Runs, conversation: int, place: str) -> None:
        """A row with targets in `runs` (start, end), of conversation number `conversation` at `place` of the files."""
        row = np.asarray(ids, dtype=np.int32)
        self._pending.append((row, runs, conversation, place))
        self._content.update(np.array([len(row), *(edge for run in runs for edge in run)], dtype="<i4").tobytes())
        self._content.update(row.astype("<i4").tobytes())
        self.rows, self.tokens = self.rows + 1, self.tokens + len(row)
        self.targets += sum(end - start for start, end in runs)
        # Few ids and short runs: a comparison for each is far quicker than np.isin.
        stops = (np.count_nonzero(row[start:end] == stop) for start, end in runs for stop in self.stop_ids)
        self.stops += int(sum(stops))
        self.longest, self.largest_id = max(self.longest, len(row)), max(self.largest_id, int(row.max()))
        if self.largest_id >= len(self._seen):
            self._seen = np.append(self._seen, np.zeros(self.largest_id + 1 - len(self._seen), np.bool_))
        self._seen[row] = True
        if len(self._pending) == BATCH_ROWS:
            self._write()

    def holds(self, id: int) -> bool:
        """Whether a row has this token."""
        return id < len(self._seen) and bool(self._seen[id])

    def close(self, **facts: Any) -> Report:
        """Write what is left, make the files durable. `facts`: the rest of the report."""
        self._write()
        self._rows.close()
        self._index.close()
        counted = ("rows", "tokens", "targets", "stops", "longest", "largest_id")
        report = Report(**{key: getattr(self, key) for key in counted}, sha256=self._content.hexdigest(), **facts)
        sizes = {file.name: file.stat().st_size for file in self.folder.glob("*.arrow")}
        write_json(self.folder / "report.json", {"report": asdict(report), "sizes": sizes}, indent=1)
        return report

    def let_go(self) -> None:
        """Close the files as they are: the store is given up."""
        for file in (self._rows, self._index):
            file.let_go()

    def _write(self) -> None:
        if not self._pending:
            return
        rows, runs, conversations, places = zip(*self._pending, strict=True)
        flat = [[edge for run in of_row for edge in run] for of_row in runs]
        targets = [sum(end - start for start, end in of_row) for of_row in runs]
        lists = pa.ListArray.from_arrays(
            np.cumsum([0, *map(len, rows)], dtype=np.int32), pa.array(np.concatenate(rows))
        )
        self._rows.write([lists, pa.array(flat, pa.list_(pa.int32()))])
        lengths = pa.array([len(row) for row in rows], pa.int32())
        index = [
            lengths,
            pa.array(targets, pa.int32()),
            pa.array(conversations, pa.int64()),
            pa.array(places, pa.string()),
        ]
        self._index.write(index)
        self._pending = []


class UnequalRows:
    """A written store, memory-mapped, as rows (row_store.py): int32 [length], read-only, each with its own runs of targets."""

    def __init__(self, folder: Path) -> None:
        """UserError if a file is missing or has not the size it was written with."""
        try:
            content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in content["sizes"]}
            self.report = Report(**content["report"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a whole store of rows ({error}); {_MEND}") from None
        if sizes != content["sizes"]:
            raise UserError(f"{folder}: files have not the size they were written with; {_MEND}")
        self.name, self.bos, self.eos = self.report.name, self.report.bos, self.report.eos
        self.content_hash = self.report.sha256
        index = opened(folder / "index.arrow").read_all()
        self.lengths: NDArray[np.int64] = numbers(index["length"]).astype(np.int64)
        self.reaches, self.width = self.lengths, None
        self.targets: NDArray[np.int64] = numbers(index["targets"]).astype(np.int64)
        self.groups: NDArray[np.int64] = numbers(index["conversation"])
        self._places = index["place"]
        self._rows = opened(folder / "rows.arrow")

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """Each row is by itself."""
        return (self,)

    def __len__(self) -> int:
        return self.report.rows

    def ids(self, row: int) -> NDArray[np.int32]:
        """The row's tokens, int32 [length]; IndexError if there is no such row."""
        ids: NDArray[np.int32] = numbers(self._item(0, row).values)
        return ids

    def spans(self, row: int) -> Runs:
        """The runs of the row's targets."""
        flat = self._item(1, row).values.to_pylist()
        return list(zip(flat[::2], flat[1::2], strict=True))

    def restarts(self, row: int) -> list[int]:
        """Positions run through a row."""
        return [0]

    def documents(self, row: int) -> list[DocumentSpan]:
        """The one row of a file that it comes from."""
        return [DocumentSpan(self._places[row].as_py(), 0, int(self.lengths[row]), False)]

    def facts(self) -> dict[str, Any]:
        """For run.json: rows read and made, their tokens and targets, the longest."""
        report = self.report
        return {
            "documents": report.read,
            "made": report.rows,
            "tokens": report.tokens,
            "targets": report.targets,
            "longest": report.longest,
        }

    def _item(self, column: int, row: int) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in '{self.name}'")
        batch, place = divmod(int(row), BATCH_ROWS)
        return self._rows.get_batch(batch).column(column)[place]
