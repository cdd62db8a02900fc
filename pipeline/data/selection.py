"""Takes the store of a dataset; gives the rows that are trained on and those that are held out for evaluation.

By row (`eval_split = 'chunk'`) these are the rows that qlora-pipe would take through
Hugging Face's `train_test_split(shuffle=True, seed=42)` and `shuffle(seed=42)`; rows of one conversation stay together. By
document the two are separate streams already (`chunks.build`), since neighbouring chunks of one book are no test of each
other. A row without targets is in neither: nothing could be learnt or measured on it.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.row_store import RowStore

SEED = 42  # qlora-pipe's, whatever the run's own seed, so that runs on the same data are compared on the same rows

Store = TypeVar("Store", bound=RowStore)


@dataclass(frozen=True)
class Streams(Generic[Store]):
    """The stores of a dataset: one for all or, split by document, one to train and one to test on."""

    train: Store
    eval: Store | None = None

    @property
    def stores(self) -> list[Store]:
        """One or both."""
        return [self.train] if self.eval is None else [self.train, self.eval]


@dataclass(frozen=True)
class Selection:
    """Chosen rows (int64 [N]) of a store, which an epoch goes through `repeats` times; len is of an epoch's rows."""

    store: RowStore
    rows: NDArray[np.int64]
    repeats: float = 1.0

    def __len__(self) -> int:
        return int(self.repeats) * len(self.rows) + self._part()

    def of_epoch(self, epoch: int, *key: int) -> NDArray[np.int64]:
        """An epoch's rows, int64 [len]: each as often as `repeats` is whole, and then a part of them.

        The parts go through all rows, in an order decided by `key`, before one comes again: 0.5 has every row in two epochs.
        """
        whole = np.tile(self.rows, int(self.repeats))
        if not (part := self._part()):
            return whole
        places = epoch * part + np.arange(part)
        passes = [
            shuffled(len(self.rows), *key, number)[places[places // len(self.rows) == number] % len(self.rows)]
            for number in np.unique(places // len(self.rows)).tolist()
        ]
        return np.concatenate([whole, self.rows[np.concatenate(passes)]])

    def _part(self) -> int:
        return round(self.repeats % 1 * len(self.rows))


@dataclass(frozen=True)
class Split:
    """A dataset's rows for training, and its rows for evaluation if there are any; `untrained` rows are in neither."""

    train: Selection
    eval: Selection | None
    untrained: int = 0

    def __str__(self) -> str:
        evaluation = f", {len(self.eval):,} to evaluate on" if self.eval else ""
        without = f"; {self.untrained:,} without a token to train are left out" if self.untrained else ""
        return f"{self.train.store.name}: {len(self.train):,} rows to train on{evaluation}{without}"


def split(
    streams: Streams[Any],
    eval_size: float | int = 0,
    subsample: float | None = None,
    num_repeats: float = 1,
    max_tokens: int | None = None,
) -> Split:
    """Choose the rows of a dataset.

    `eval_size`: the part (0 < eval_size < 1, rounded up) or the number (int ≥ 1) of rows (conversations) held out; of no effect
    where documents were held out. `subsample`: the part of both that is kept after a shuffle, rounded down.
    `max_tokens`: of the training rows only so many are taken, after a shuffle, as have this many tokens at most.
    `num_repeats`: how often an epoch goes through the training rows. UserError if no row is left on either side,
    or a store has no row with a target.
    """
    name = streams.train.name
    train, held_out = _with_targets(streams.train), np.empty(0, np.int64)
    untrained = len(streams.train) - len(train)
    if streams.eval is not None:
        held_out = _with_targets(streams.eval)
        untrained += len(streams.eval) - len(held_out)
    elif eval_size:
        groups = streams.train.groups
        units, what = (train, "chunks") if groups is None else (np.unique(groups[train]), "conversations")
        count = held_out_count(eval_size, len(units), f"dataset '{name}'", what)
        # The same draw as datasets.Dataset.train_test_split (datasets 5.2, arrow_dataset.py).
        order = units[np.random.default_rng(SEED).permutation(len(units))]
        if groups is None:
            train, held_out = order[count:], order[:count]
        else:
            drawn = np.isin(groups[train], order[:count])
            train, held_out = train[~drawn], train[drawn]
    evaluation = _subsampled(held_out, subsample, f"dataset '{name}', evaluation") if len(held_out) else None
    train = _within(max_tokens, streams.train, _subsampled(train, subsample, f"dataset '{name}'"))
    held_out_store = streams.train if streams.eval is None else streams.eval
    return Split(
        repeated(Selection(streams.train, train), num_repeats),
        None if evaluation is None else Selection(held_out_store, evaluation),
        untrained,
    )


def whole(streams: Streams[Any], subsample: float | None = None) -> Selection:
    """All rows of a dataset that is for evaluation alone, or the part `subsample` of them."""
    return split(streams, subsample=subsample).train


def repeated(chosen: Selection, num_repeats: float) -> Selection:
    """The same rows, `num_repeats` times an epoch. UserError if an epoch would have none of them."""
    if not 0 < num_repeats < math.inf or not len(many := replace(chosen, repeats=float(num_repeats))):
        raise UserError(
            f"dataset '{chosen.store.name}': num_repeats = {num_repeats:g} of {len(chosen.rows):,} rows leaves none for an "
            "epoch; give a larger number"
        )
    return many


def held_out_count(eval_size: float | int, total: int, what: str, unit: str) -> int:
    """How many of `total` units `eval_size` holds out: a part is rounded up. UserError if none or all would be."""
    if isinstance(eval_size, float) and not 0 < eval_size < 1:
        raise UserError(f"{what}: eval_size = {eval_size} must be 0, a part below 1, or a whole number of {unit}")
    count = math.ceil(eval_size * total) if isinstance(eval_size, float) else eval_size
    if not 0 < count < total:
        raise UserError(
            f"{what}: eval_size = {eval_size} would hold out {count:,} of {total:,} {unit} and leave "
            f"{max(total - count, 0):,} to train on; both must be 1 or more"
        )
    return count


def _with_targets(store: RowStore) -> NDArray[np.int64]:
    """The store's rows on which something is trained, int64, ascending. UserError if there are none."""
    rows = np.flatnonzero(store.targets)
    if not len(rows):
        raise UserError(f"dataset '{store.name}': none of its {len(store):,} rows has a token to train on")
    return rows


def _subsampled(rows: NDArray[np.int64], part: float | None, what: str) -> NDArray[np.int64]:
    """The first `part` of `rows` after a seeded shuffle, in ascending order; all of them for None."""
    if part is not None:
        if not 0 < part <= 1:
            raise UserError(f"{what}: subsample = {part} must be greater than 0 and at most 1")
        count = int(len(rows) * part)
        if not count:
            raise UserError(f"{what}: subsample = {part} of {len(rows):,} rows leaves none")
        rows = rows[np.random.default_rng(SEED).permutation(len(rows))[:count]]
    return np.sort(rows)


def _within(max_tokens: int | None, store: RowStore, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of `rows`, after a seeded shuffle, the first with at most so many tokens together, ascending; all for None."""
    if max_tokens is None:
        return rows
    order = rows[np.random.default_rng(SEED).permutation(len(rows))]
    count = int(np.searchsorted(np.cumsum(store.lengths[order]), max_tokens, side="right"))
    if not count:
        raise UserError(
            f"dataset '{store.name}': max_tokens = {max_tokens:,} is less than its first row has, "
            f"{int(store.lengths[order[0]]):,} tokens"
        )
    return np.sort(order[:count])


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 … count − 1 decided by `key`, the same with every version of NumPy.

    Sorts by PCG64's raw output for the key, which NumPy promises to keep; `Generator.permutation` may change.
    """
    return np.argsort(np.random.PCG64(list(key)).random_raw(count), kind="stable")
