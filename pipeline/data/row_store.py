"""What a dataset is to everything that trains on it or measures with it: rows, each with its length and its targets.

Takes nothing; gives the protocol that a kind of dataset implements (book chunks: store.py; conversations and other rows:
rows/store.py), and what follows from it alone.
Whoever batches, weighs, shows or scores rows knows this protocol and no kind of dataset.

A *target* is a place of a row whose token is trained: predicted from the places before it. The first place of a row has
none before it and is never a target.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a place that is no target

RowId = tuple[int, int]  # (index of the store, row in it)


class DocumentSpan(NamedTuple):
    """Places `start` to `end` (exclusive) of a row are of document `name`; `continued`: it began before the row."""

    name: str
    start: int
    end: int
    continued: bool


class RowStore(Protocol):
    """N rows of token ids, numbered from 0. Lengths and targets of all rows are known without reading one."""

    @property
    def name(self) -> str:
        """The dataset's, for messages."""

    @property
    def bos(self) -> int | None:
        """The tokenizer's id, None if it has none."""

    @property
    def eos(self) -> int:
        """The tokenizer's id; padding holds it."""

    @property
    def content_hash(self) -> str:
        """Tells these rows from any others: where it differs, a position in the data means nothing."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [N]."""

    @property
    def width(self) -> int | None:
        """To how many tokens each row is padded; None where that is left to who batches it."""

    @property
    def reaches(self) -> NDArray[np.int64]:
        """Tokens of the longest part of each row in which positions run on, int64 [N]: what a rotary embedding that changes with
        length goes by."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Targets of each row, int64 [N]; 0 where nothing of a row is trained."""

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """int64 [N]: rows with one number, those of a conversation, are held out together; None where each is by itself."""

    @property
    def slots(self) -> "tuple[RowStore, ...]":
        """What a row is made of. A unit of preference data is several rows, which share a micro-batch: a store for the first of
        every unit, one for the second, …; a row by itself is made of itself, and this is the store alone."""

    def __len__(self) -> int: ...

    def ids(self, row: int) -> NDArray[np.int32]:
        """The row's tokens, int32 [length]."""

    def spans(self, row: int) -> list[tuple[int, int]]:
        """Where the row's targets are: runs (start, end), end exclusive, ascending, from place 1 on."""

    def restarts(self, row: int) -> list[int]:
        """Places, ascending from 0, at which positions begin again: what begins there does not see what is before it."""

    def documents(self, row: int) -> list[DocumentSpan]:
        """What the row is made of, in order; together they cover it, but for a BOS before the first."""

    def facts(self) -> dict[str, Any]:
        """What run.json says of the dataset's text."""


def labels(ids: NDArray[np.int32], spans: Iterable[tuple[int, int]]) -> NDArray[np.int32]:
    """A row's labels, int32 [length]: its own ids at its targets, −100 elsewhere. Objectives shift them."""
    labelled = np.full_like(ids, IGNORED)
    for start, end in spans:
        labelled[start:end] = ids[start:end]
    return labelled
