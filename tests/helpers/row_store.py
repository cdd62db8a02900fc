"""A second kind of rows beside book chunks: of unequal length, with targets in runs; held in memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.data.row_store import DocumentSpan, RowStore

Row = tuple[list[int], list[tuple[int, int]]]  # (ids, runs of targets)


@dataclass
class ListStore:
    """A `RowStore` of given rows, each one document."""

    rows: list[Row]
    name: str = "turns"
    bos: int | None = 1
    eos: int = 2
    content_hash: str = "0"
    groups: NDArray[np.int64] | None = None
    width: int | None = None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(ids) for ids, _ in self.rows], dtype=np.int64)

    @property
    def targets(self) -> NDArray[np.int64]:
        return np.array([sum(end - start for start, end in spans) for _, spans in self.rows], dtype=np.int64)

    @property
    def reaches(self) -> NDArray[np.int64]:
        return self.lengths

    @property
    def slots(self) -> tuple[RowStore, ...]:
        return (self,)

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, row: int) -> NDArray[np.int32]:
        return np.array(self.rows[row][0], dtype=np.int32)

    def spans(self, row: int) -> list[tuple[int, int]]:
        return self.rows[row][1]

    def restarts(self, row: int) -> list[int]:
        return [0]

    def documents(self, row: int) -> list[DocumentSpan]:
        return [DocumentSpan(f"{row}.txt", 0, len(self.rows[row][0]), False)]

    def facts(self) -> dict[str, Any]:
        return {"documents": len(self.rows)}


@st.composite
def rows(draw: st.DrawFn, longest: int = 150) -> Row:
    """A row of 2 to `longest` ids with no, one or several runs of targets."""
    length = draw(st.integers(2, longest))
    edges = sorted(draw(st.sets(st.integers(1, length), max_size=6)))
    runs = list(zip(edges[::2], edges[1::2], strict=False))
    return draw(st.lists(st.integers(3, 60), min_size=length, max_size=length)), runs


stores = st.lists(rows(), min_size=1, max_size=12).map(ListStore)
