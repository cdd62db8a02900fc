"""Takes the stores of datasets; gives the rows that an epoch trains on and those that are held out for evaluation.

First each dataset alone (`split`). By row (`eval_split = 'chunk'`) these are the rows that qlora-pipe would take through
Hugging Face's `train_test_split(shuffle=True, seed=42)` and `shuffle(seed=42)`; rows of one conversation stay together. By
document the two are separate streams already (`chunks.build`), since neighbouring chunks of one book are no test of each
other. A row without targets is in neither: nothing could be learnt or measured on it.

Then all of them together (`mix`). 'concatenate' has every row once. 'interleave' draws datasets by weight and takes the
drawn one's next row, as Hugging Face's `interleave_datasets` does: 'first_exhausted' stops when one dataset has given all
its rows, 'all_exhausted' when every one has, those that ran out beginning again. Within a dataset rows come in an order
shuffled by run and epoch, so rows that one epoch leaves out come in another. Every draw is a function of (seed, epoch):
nothing is carried along.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.row_store import RowStore

SEED = 42  # qlora-pipe's, whatever the run's own seed, so that runs on the same data are compared on the same rows
MODES = ("concatenate", "interleave")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")

Store = TypeVar("Store", bound=RowStore)
EpochRows = Callable[[int], NDArray[np.int64]]  # the epoch, from 0 → its rows, int64 [N, 2] of RowIds


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
    """Chosen rows (int64 [N], repeats allowed) of a store."""

    store: RowStore
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


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
    streams: Streams[Any], eval_size: float | int = 0, subsample: float | None = None, num_repeats: int = 1
) -> Split:
    """Choose the rows of a dataset.

    `eval_size`: the part (0 < eval_size < 1, rounded up) or the number (int ≥ 1) of rows (conversations) held out; of no effect
    where documents were held out. `subsample`: the part of both that is kept after a shuffle, rounded down.
    `num_repeats`: how often each training row comes in an epoch. UserError if no row is left on either side,
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
    if num_repeats < 1:
        raise UserError(f"dataset '{name}': num_repeats = {num_repeats} must be 1 or more")
    train = np.tile(_subsampled(train, subsample, f"dataset '{name}'"), num_repeats)
    held_out_store = streams.train if streams.eval is None else streams.eval
    return Split(
        Selection(streams.train, train),
        None if evaluation is None else Selection(held_out_store, evaluation),
        untrained,
    )


def whole(streams: Streams[Any], subsample: float | None = None) -> Selection:
    """All rows of a dataset that is for evaluation alone, or the part `subsample` of them."""
    return split(streams, subsample=subsample).train


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


def mix(
    sets: Sequence[Selection],
    *,
    seed: int,
    mode: str = "concatenate",
    weights: Sequence[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    weigh_tokens: bool = False,
) -> EpochRows:
    """A function from the epoch (from 0) to its rows, int64 [N, 2] of (index into `sets`, row), not yet shuffled.

    `weights`, one for each set (all 1 if None), are in proportion to the chances of drawing a row of it; with
    `weigh_tokens` (for micro-batches of so many tokens, not rows) of drawing a token: a set's weight is divided by the
    mean length of its rows. UserError for an unknown mode or strategy, or a weight that is not positive.
    """
    if not sets or not all(len(rows) for rows in sets):
        raise UserError("there are no rows to train on")
    for what, value, known in (
        ("dataset_combination_mode", mode, MODES),
        ("dataset_interleave_stopping_strategy", stopping_strategy, STOPPING_STRATEGIES),
    ):
        if value not in known:
            raise UserError(f"{what} = '{value}' is not known; use one of: {', '.join(known)}")
    for rows, weight in zip(sets, weights or (), strict=bool(weights)):
        if not 0 < weight < float("inf"):
            raise UserError(f"dataset '{rows.store.name}': sample_weight = {weight} must be a positive number")
    if mode == "concatenate":
        everything = np.concatenate([_pairs(index, rows.rows) for index, rows in enumerate(sets)])
        return lambda epoch: everything

    sizes = np.array([len(rows) for rows in sets])
    share = np.array(weights if weights else [1.0] * len(sets), dtype=np.float64)
    if weigh_tokens:
        share = share / np.array([rows.store.lengths[rows.rows].mean() for rows in sets])

    def interleaved(epoch: int) -> NDArray[np.int64]:
        draws = interleave(sizes, share / share.sum(), stopping_strategy, [seed, epoch])
        pairs = np.empty((len(draws), 2), dtype=np.int64)
        for index, rows in enumerate(sets):
            drawn = np.flatnonzero(draws == index)
            order = shuffled(len(rows), seed, epoch, index)
            pairs[drawn] = _pairs(index, rows.rows[order[np.arange(len(drawn)) % len(rows)]])
        return pairs

    return interleaved


def interleave(
    sizes: NDArray[np.int64], probabilities: NDArray[np.float64], stopping_strategy: str, seed: Sequence[int]
) -> NDArray[np.int64]:
    """The dataset drawn at each step, int64 [N], until one ('first_exhausted') or all have been drawn `sizes` times.

    The same draws as `datasets.interleave_datasets(..., probabilities, seed, stopping_strategy)` (datasets 5.2).
    """
    edges = probabilities.cumsum()
    edges /= edges[-1]
    bits = np.random.PCG64(seed)
    stop = np.any if stopping_strategy == "first_exhausted" else np.all
    blocks: list[NDArray[np.int64]] = []
    counts = np.zeros(len(sizes), dtype=np.int64)
    while not stop(counts >= sizes):
        # Uniform doubles of 53 bits from the raw stream: what Generator.choice draws, but promised to stay as it is.
        uniform = (bits.random_raw(1000) >> np.uint64(11)) * 2.0**-53
        blocks.append(edges.searchsorted(uniform, side="right"))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    draws = np.concatenate(blocks)
    last_row = [np.flatnonzero(draws == index)[size - 1 : size] for index, size in enumerate(sizes)]
    ends = [int(place[0]) for place in last_row if len(place)]
    return draws[: (min(ends) if stopping_strategy == "first_exhausted" else max(ends)) + 1]


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of 0 … count − 1 decided by `key`, the same with every version of NumPy.

    Sorts by PCG64's raw output for the key, which NumPy promises to keep; `Generator.permutation` may change.
    """
    return np.argsort(np.random.PCG64(list(key)).random_raw(count), kind="stable")


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


def _pairs(index: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([np.full(len(rows), index, dtype=np.int64), rows], axis=1)
