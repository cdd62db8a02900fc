"""Takes units as they come; gives them back as a memory-mapped store whose rows are units.

On disk it is a store of rows (rows/store.py), those of a unit after each other, and `units.arrow`: of each unit whether its
answer is desirable, and of each of its rows whether it was cut.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow_files import ArrowFile, opened
from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.data.rows.store import Report, RowWriter, Runs, UnequalRows
from pipeline.data.units.encode import Rows

SLOTS = {"preference": ("chosen", "rejected"), "unpaired": ("answer", "mismatched")}
_UNITS = pa.schema([("desirable", pa.bool_()), ("cut", pa.list_(pa.bool_()))])


def slot_names(kind: str, slots: int) -> tuple[str, ...]:
    """What the rows of a unit are called, in their order."""
    return SLOTS.get(kind) or tuple(f"rank {number}" for number in range(1, slots + 1))


class UnitWriter:
    """Writes units into `folder`: `add` in order, then `close` with what is known only at the end."""

    def __init__(self, folder: Path, stop_ids: frozenset[int]) -> None:
        self.rows = RowWriter(folder, stop_ids)
        self.units = 0
        self._groups: dict[str, int] = {}
        self._desirable: list[bool] = []
        self._cut: list[list[bool]] = []
        self._folder = folder

    def add(self, unit: Rows, place: str) -> None:
        """A unit at `place` of the files. Units of one prompt have one group."""
        group = self._groups.setdefault(unit.prompt, len(self._groups))
        for ids in unit.ids:
            self.rows.add(ids, [(unit.start, len(ids))], group, place)
        self._desirable.append(unit.desirable)
        self._cut.append(unit.cut)
        self.units += 1

    @property
    def prompts(self) -> int:
        """Prompts of the units so far."""
        return len(self._groups)

    def close(self, **facts: Any) -> Report:
        """Write what is left, make the files durable. `facts`: the rest of the report."""
        file = ArrowFile(self._folder / "units.arrow", _UNITS)
        file.write([pa.array(self._desirable, pa.bool_()), pa.array(self._cut, pa.list_(pa.bool_()))])
        file.close()
        return self.rows.close(**facts)

    def let_go(self) -> None:
        """Close the files as they are: the store is given up."""
        self.rows.let_go()


@dataclass(frozen=True)
class SlotRows:
    """One row of every unit, as a store (row_store.py): row u is slot `slot` of unit u."""

    rows: UnequalRows
    slot: int
    of: int
    kind: str

    @property
    def name(self) -> str:
        """The dataset's, and what this row of a unit is."""
        return f"{self.rows.name}, {slot_names(self.kind, self.of)[self.slot]}"

    @property
    def bos(self) -> int | None:
        """The dataset's."""
        return self.rows.bos

    @property
    def eos(self) -> int:
        """The dataset's."""
        return self.rows.eos

    @property
    def content_hash(self) -> str:
        """The dataset's."""
        return self.rows.content_hash

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens, int64 [U]."""
        return self.rows.lengths[self.slot :: self.of]

    @property
    def width(self) -> None:
        """Padded to no fixed number of tokens."""

    @property
    def reaches(self) -> NDArray[np.int64]:
        """Positions run through a row, int64 [U]."""
        return self.lengths

    @property
    def targets(self) -> NDArray[np.int64]:
        """Targets, int64 [U]."""
        return self.rows.targets[self.slot :: self.of]

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 [U]: units of one prompt have one number."""
        return self.rows.groups[self.slot :: self.of]

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """This one alone."""
        return (self,)

    def __len__(self) -> int:
        return len(self.rows) // self.of

    def ids(self, row: int) -> NDArray[np.int32]:
        """The row's tokens."""
        return self.rows.ids(row * self.of + self.slot)

    def spans(self, row: int) -> Runs:
        """The answer."""
        return self.rows.spans(row * self.of + self.slot)

    def restarts(self, row: int) -> list[int]:
        """Positions run through a row."""
        return [0]

    def documents(self, row: int) -> list[DocumentSpan]:
        """The one row of a file that it comes from."""
        return self.rows.documents(row * self.of + self.slot)

    def facts(self) -> dict[str, Any]:
        """The dataset's."""
        return self.rows.facts()


class UnitRows:
    """A written store of U units of S rows each, as rows (row_store.py): a row is a unit, and `slots` has its own rows.

    `desirable` bool [U], of unpaired answers; `cut` bool [U, S]: rows without their end. `reference` fp32 [U, S]: each row's sum
    of log-probabilities under the reference, None where none was computed.
    """

    def __init__(self, folder: Path) -> None:
        """UserError if a file is missing or has not the size it was written with."""
        self.folder = folder
        self.reference: NDArray[np.float32] | None = None
        rows = UnequalRows(folder)
        units = opened(folder / "units.arrow").read_all()
        self.report, self.kind = rows.report, rows.report.kind
        self.desirable: NDArray[np.bool_] = np.array(units["desirable"].to_pylist(), dtype=bool)
        self.cut: NDArray[np.bool_] = np.array(units["cut"].to_pylist(), dtype=bool)
        of = len(rows) // max(1, len(self.desirable))
        self.members: tuple[RowStore, ...] = tuple(SlotRows(rows, slot, of, self.kind) for slot in range(of))
        self.name, self.bos, self.eos, self.content_hash = rows.name, rows.bos, rows.eos, rows.content_hash
        self.lengths: NDArray[np.int64] = np.max([slot.lengths for slot in self.members], axis=0, initial=0)
        self.reaches, self.width = self.lengths, None
        self.targets: NDArray[np.int64] = np.sum([slot.targets for slot in self.members], axis=0)
        self.groups: NDArray[np.int64] = rows.groups[::of] if of else rows.groups

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """The rows of units by their place in them: chosen, rejected; answers by rank; an answer and a mismatched one."""
        return self.members

    def with_reference(self, reference: NDArray[np.float32]) -> Self:
        """The same units with what the reference says of them, fp32 [U, S]."""
        if reference.shape != (len(self), len(self.members)):
            raise ValueError(f"{reference.shape} numbers for {len(self)} units of {len(self.members)} rows")
        known = copy.copy(self)
        known.reference = reference
        return known

    def __len__(self) -> int:
        return len(self.desirable)

    def ids(self, row: int) -> NDArray[np.int32]:
        """The first row of the unit."""
        return self.members[0].ids(row)

    def spans(self, row: int) -> Runs:
        """The first row's answer."""
        return self.members[0].spans(row)

    def restarts(self, row: int) -> list[int]:
        """Positions run through a row."""
        return [0]

    def documents(self, row: int) -> list[DocumentSpan]:
        """The one row of a file that the unit comes from."""
        return self.members[0].documents(row)

    def facts(self) -> dict[str, Any]:
        """For run.json: what a store of rows says, and the number of units."""
        return {**self.members[0].facts(), "units": len(self), "rows_of_a_unit": len(self.members)}
