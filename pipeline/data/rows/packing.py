"""Takes chosen rows of unequal length; gives rows of one length, each holding several of them.

'best_fit', the longest first, over all rows: each goes where it leaves the least room, and none is cut. 'stream': one after the
other, cut where a row of the given length is full; what a cut leaves for the next row begins there without what was before it.

Where rows are kept apart, positions begin again at every one's beginning, by which transformers lets none see another
(model/trial/packing_check.py makes sure of it); what is left of a row is padding, one more document. A row's first token is no
target, as nothing before it predicts it; nor is that of what a cut leaves.

Where a model's rotary embedding is another for what is longer than `switch` tokens, best fit puts longer rows beside longer
ones only.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.data.selection import Selection


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens: for each the places in `lengths` that it holds. All must be 1 to `room`."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]  # free tokens → rows that have so many
    there = 0  # bit n: some row has n free tokens
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        fitting = there >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = by_room[free].pop()
            if not by_room[free]:
                there ^= 1 << free
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(place)
        if left := free - length:
            by_room[left].append(row)
            there |= 1 << left
    return rows


def stream(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Pieces of what is `lengths` long, one after the other and cut every `room` tokens: int64 [P, 3] of (place in `lengths`,
    first token of it, end). Each row but the last is full."""
    ends = np.cumsum(lengths)
    edges = np.union1d(np.append(0, ends), np.arange(0, ends[-1], room))
    places = np.searchsorted(ends, edges[:-1], side="right")
    begun = ends[places] - lengths[places]
    return np.stack([places, edges[:-1] - begun, edges[1:] - begun], axis=1)


class PackedRows:
    """The rows of a `Selection`, packed, as a store (row_store.py) of rows of `sequence_len` tokens. `apart`: they do not see
    each other."""

    def __init__(
        self,
        chosen: Selection,
        sequence_len: int,
        packing: Literal["best_fit", "stream"] = "best_fit",
        apart: bool = True,
        switch: int | None = None,
    ) -> None:
        self._store: RowStore = chosen.store
        self._apart = apart
        lengths = self._store.lengths[chosen.rows]
        if packing == "best_fit":
            rows = []
            for alike in (lengths <= switch, lengths > switch) if switch and apart else (lengths > 0,):
                there = np.flatnonzero(alike)
                rows += [there[row] for row in best_fit(lengths[there].tolist(), sequence_len)]
            places = np.concatenate(rows)
            pieces = np.stack([places, np.zeros_like(places), lengths[places]], axis=1)
            self._first = np.cumsum([0, *map(len, rows)])
        else:
            pieces = stream(lengths, sequence_len)
            begun = np.cumsum(np.append(0, pieces[:, 2] - pieces[:, 1]))
            self._first = np.append(np.flatnonzero(begun[:-1] % sequence_len == 0), len(pieces))
        whole = pieces[:, 2] - pieces[:, 1] == lengths[pieces[:, 0]]
        self.cut = len(np.unique(pieces[~whole, 0]))
        self._pieces = np.column_stack(
            [chosen.rows[pieces[:, 0]], pieces[:, 1:]]
        )  # (row of the store, begin, end) of each
        self.count = len(chosen.rows)
        self.sequence_len, self.name = sequence_len, self._store.name
        self.bos, self.eos, self.groups = self._store.bos, self._store.eos, None
        self.tokens = int(lengths.sum())
        sizes = pieces[:, 2] - pieces[:, 1]
        self.width = sequence_len
        self.lengths: NDArray[np.int64] = np.add.reduceat(sizes, self._first[:-1])
        self.reaches: NDArray[np.int64] = np.maximum.reduceat(sizes, self._first[:-1]) if apart else self.lengths
        targets = self._store.targets[self._pieces[:, 0]]
        for number in np.flatnonzero(~whole).tolist():
            targets[number] = sum(b - a for a, b in self._spans(number))
        self.targets: NDArray[np.int64] = np.add.reduceat(targets, self._first[:-1])
        order = np.concatenate([[sequence_len, apart], self._first, self._pieces.reshape(-1)])
        content = self._store.content_hash.encode() + order.astype("<i8").tobytes()
        self.content_hash = hashlib.sha256(content).hexdigest()

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """Each row is by itself."""
        return (self,)

    def __len__(self) -> int:
        return len(self._first) - 1

    def __str__(self) -> str:
        full = self.tokens / (len(self) * self.sequence_len)
        line = f"{self.name}: {self.count:,} rows packed into {len(self):,} of {self.sequence_len:,} tokens, {full:.1%} full"
        cut = f"; {self.cut:,} of them are cut" if self.cut else ""
        return line + cut + ("" if self._apart else "; those in one row see each other")

    def ids(self, row: int) -> NDArray[np.int32]:
        """The rows' tokens one after the other, int32 [length]."""
        pieces = self._pieces[self._first[row] : self._first[row + 1]].tolist()
        return np.concatenate([self._store.ids(member)[begin:end] for member, begin, end in pieces])

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The runs of targets of all rows in it."""
        return [(start + a, start + b) for start, number in self._placed(row) for a, b in self._spans(number)]

    def restarts(self, row: int) -> list[int]:
        """Where a row, or the padding, begins; where they are not kept apart, positions run through."""
        if not self._apart:
            return [0]
        starts, end = [start for start, _ in self._placed(row)], int(self.lengths[row])
        return starts + ([end] if end < self.sequence_len else [])

    def documents(self, row: int) -> list[DocumentSpan]:
        """What the rows in it come from; padding is none's."""
        found = []
        for start, number in self._placed(row):
            member, begin, end = self._pieces[number].tolist()
            for name, first, last, continued in self._store.documents(member):
                first_there, last_there = max(first, begin), min(last, end)
                if first_there < last_there:
                    span = start + first_there - begin, start + last_there - begin
                    found.append(DocumentSpan(name, *span, continued or first < begin))
        return found

    def facts(self) -> dict[str, Any]:
        """For run.json: those of the rows, and how they were packed."""
        return self._store.facts() | {"packed": {"rows": len(self), "sequence_len": self.sequence_len, "cut": self.cut}}

    def _spans(self, number: int) -> list[tuple[int, int]]:
        """The runs of targets of a piece, counted from its beginning; its first token is none."""
        member, begin, end = self._pieces[number].tolist()
        runs = [(max(a, begin + 1) - begin, min(b, end) - begin) for a, b in self._store.spans(member)]
        return [(a, b) for a, b in runs if a < b]

    def _placed(self, row: int) -> list[tuple[int, int]]:
        """(place of its first token, number) of each piece in it."""
        numbers = range(int(self._first[row]), int(self._first[row + 1]))
        sizes = self._pieces[numbers.start : numbers.stop, 2] - self._pieces[numbers.start : numbers.stop, 1]
        starts = np.cumsum(np.append(0, sizes[:-1])).tolist()
        return list(zip(starts, numbers, strict=True))
