"""Two streams of rows by which a run goes at once: those that are to be broken, and those that are to be left as they are.

Takes the rows chosen of datasets with `stream = 'breaker'` and of those with `stream = 'retain'`; gives units of one row of each,
as a store (row_store.py). The streams are independent: each is shuffled by itself, the shorter one begins again, and what a
unit's rows say has nothing to do with each other. Losses are sums over rows, so nothing depends on which meet.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.data.selection import Selection, shuffled

STREAMS = ("breaker", "retain")
SEED = 42  # that of a dataset's split, whatever the run's own


class StreamRows:
    """One stream's row of every unit: row u of the store is (index of the store, row in it) `rows[u]`, int64 [U, 2]."""

    def __init__(self, stream: str, stores: Sequence[RowStore], rows: NDArray[np.int64]) -> None:
        self.stream, self._stores, self._rows = stream, list(stores), rows
        first = self._stores[0]
        self.name = f"{', '.join(store.name for store in self._stores)}, {stream}"
        self.bos, self.eos, self.width, self.groups = first.bos, first.eos, None, None
        self.lengths, self.reaches, self.targets = (
            self._gathered(of) for of in (lambda s: s.lengths, lambda s: s.reaches, lambda s: s.targets)
        )
        content = [rows.tobytes(), *(store.content_hash.encode() for store in self._stores)]
        self.content_hash = hashlib.sha256(b"".join(content)).hexdigest()

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """This one alone."""
        return (self,)

    def __len__(self) -> int:
        return len(self._rows)

    def ids(self, row: int) -> NDArray[np.int32]:
        """The row's tokens."""
        store, own = self._of(row)
        return store.ids(own)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Its targets."""
        store, own = self._of(row)
        return store.spans(own)

    def restarts(self, row: int) -> list[int]:
        """Where positions begin again in it."""
        store, own = self._of(row)
        return store.restarts(own)

    def documents(self, row: int) -> list[DocumentSpan]:
        """What it is made of."""
        store, own = self._of(row)
        return store.documents(own)

    def facts(self) -> dict[str, Any]:
        """Of all its datasets together, for run.json."""
        own = [store.facts() for store in self._stores]
        return {
            **{key: sum(one[key] for one in own) for key in ("documents", "tokens")},
            "made": sum(len(store) for store in self._stores),
            "targets": sum(int(store.targets.sum()) for store in self._stores),
            "longest": max(int(store.lengths.max()) for store in self._stores),
        }

    def _of(self, row: int) -> tuple[RowStore, int]:
        index, own = self._rows[row].tolist()
        return self._stores[index], own

    def _gathered(self, of: Callable[[RowStore], NDArray[np.int64]]) -> NDArray[np.int64]:
        found = np.empty(len(self._rows), np.int64)
        for index, store in enumerate(self._stores):
            mine = self._rows[:, 0] == index
            found[mine] = of(store)[self._rows[mine, 1]]
        return found


class Pairs:
    """Units of a row to break and a row to retain, as rows (row_store.py): a row is a unit, and `slots` has its own rows."""

    def __init__(self, members: tuple[StreamRows, ...]) -> None:
        self.members = members
        self.name = "streams"
        self.bos, self.eos, self.width, self.groups = members[0].bos, members[0].eos, None, None
        self.lengths: NDArray[np.int64] = np.max([member.lengths for member in members], axis=0)
        self.reaches: NDArray[np.int64] = np.max([member.reaches for member in members], axis=0)
        self.targets: NDArray[np.int64] = np.sum([member.targets for member in members], axis=0)
        self.content_hash = hashlib.sha256("".join(m.content_hash for m in members).encode()).hexdigest()

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """The row to break and the row to retain of every unit."""
        return self.members

    def __len__(self) -> int:
        return len(self.members[0])

    def ids(self, row: int) -> NDArray[np.int32]:
        """The first row of the unit."""
        return self.members[0].ids(row)

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The first row's targets."""
        return self.members[0].spans(row)

    def restarts(self, row: int) -> list[int]:
        """The first row's."""
        return self.members[0].restarts(row)

    def documents(self, row: int) -> list[DocumentSpan]:
        """Of both rows."""
        return list(itertools.chain.from_iterable(member.documents(row) for member in self.members))

    def facts(self) -> dict[str, Any]:
        """Of both streams together, and the number of units."""
        one, other = (member.facts() for member in self.members)
        added = {key: one[key] + other[key] for key in one if key != "longest"}
        return {**added, "longest": max(one["longest"], other["longest"]), "units": len(self), "rows_of_a_unit": 2}


def paired(chosen: dict[str, list[Selection]]) -> Selection:
    """All units of the chosen rows by stream. An epoch goes through the longer stream once.

    UserError where a stream has none.
    """
    if missing := [stream for stream in STREAMS if not chosen.get(stream)]:
        raise UserError(
            f"datasets.stream: there is no row of stream = '{missing[0]}'; circuit breakers train on both streams, and hold "
            "rows out of both or of neither (eval_size)"
        )
    found, longest = {}, 0
    for number, stream in enumerate(STREAMS):
        parts = [
            np.stack([np.full(len(one.rows), index), one.rows], axis=1) for index, one in enumerate(chosen[stream])
        ]
        rows = np.concatenate(parts)
        found[stream] = rows[shuffled(len(rows), SEED, number)]
        longest = max(longest, len(rows))
    members = tuple(
        StreamRows(stream, [one.store for one in chosen[stream]], rows[np.arange(longest) % len(rows)])
        for stream, rows in found.items()
    )
    return Selection(Pairs(members), np.arange(longest))
