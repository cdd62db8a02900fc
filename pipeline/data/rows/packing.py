"""Takes chosen rows of unequal length; gives rows of one length, each holding several of them that do not see each other.

Best fit, the longest first, over all rows: each goes where it leaves the least room. Positions begin again at every
document's beginning, by which transformers keeps the documents apart (model/packing_check.py makes sure of it); what is left
of a row is padding, one more document. A document's first token is no target, as nothing before it predicts it.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

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


class PackedRows:
    """The rows of a `Selection`, packed, as a store (row_store.py) of rows of `sequence_len` tokens."""

    def __init__(self, chosen: Selection, sequence_len: int) -> None:
        self._store: RowStore = chosen.store
        lengths = self._store.lengths[chosen.rows]
        self._members = [chosen.rows[places] for places in best_fit(lengths.tolist(), sequence_len)]
        self.sequence_len, self.name = sequence_len, self._store.name
        self.bos, self.eos, self.groups = self._store.bos, self._store.eos, None
        self.tokens = int(lengths.sum())
        self.lengths: NDArray[np.int64] = np.broadcast_to(np.int64(sequence_len), (len(self),))
        self.targets: NDArray[np.int64] = np.array(
            [self._store.targets[rows].sum() for rows in self._members], np.int64
        )
        order = np.concatenate([[sequence_len], *(np.append(rows, -1) for rows in self._members)])
        content = self._store.content_hash.encode() + order.astype("<i8").tobytes()
        self.content_hash = hashlib.sha256(content).hexdigest()

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """Each row is by itself."""
        return (self,)

    def __len__(self) -> int:
        return len(self._members)

    def __str__(self) -> str:
        count, full = sum(map(len, self._members)), self.tokens / (len(self) * self.sequence_len)
        return f"{self.name}: {count:,} rows packed into {len(self):,} of {self.sequence_len:,} tokens, {full:.1%} full"

    def ids(self, row: int) -> NDArray[np.int32]:
        """The rows' tokens one after the other, and EOS as padding: int32 [sequence_len]."""
        ids = np.full(self.sequence_len, self.eos, dtype=np.int32)
        for start, member in self._placed(row):
            tokens = self._store.ids(member)
            ids[start : start + len(tokens)] = tokens
        return ids

    def spans(self, row: int) -> list[tuple[int, int]]:
        """The runs of targets of all rows in it."""
        return [(start + a, start + b) for start, member in self._placed(row) for a, b in self._store.spans(member)]

    def restarts(self, row: int) -> list[int]:
        """Where a row, or the padding, begins."""
        starts = [start for start, _ in self._placed(row)]
        end = starts[-1] + int(self._store.lengths[self._members[row][-1]])
        return starts + ([end] if end < self.sequence_len else [])

    def documents(self, row: int) -> list[DocumentSpan]:
        """What the rows in it come from; padding is none's."""
        return [
            DocumentSpan(name, start + first, start + end, continued)
            for start, member in self._placed(row)
            for name, first, end, continued in self._store.documents(member)
        ]

    def facts(self) -> dict[str, Any]:
        """For run.json: those of the rows, and how they were packed."""
        return self._store.facts() | {"packed": {"rows": len(self), "sequence_len": self.sequence_len}}

    def _placed(self, row: int) -> list[tuple[int, int]]:
        """(place of its first token, row of the store) of each row in it."""
        members = self._members[row]
        starts = np.cumsum(np.append(0, self._store.lengths[members[:-1]]))
        return list(zip(starts.tolist(), members.tolist(), strict=True))
