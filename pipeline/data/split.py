"""Takes the stores of a dataset; gives the rows that train and those that are held out for evaluation.

By chunk (`eval_split = 'chunk'`) the rows are those that qlora-pipe would take through Hugging Face's
`train_test_split(shuffle=True, seed=42)` and `shuffle(seed=42)`. By document the two are separate streams already
(`chunks.build`), since neighbouring chunks of one book are no test of each other.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.store import ChunkStore, Report

SEED = 42  # qlora-pipe's, whatever the run's own seed, so that runs on the same data are compared on the same rows


@dataclass(frozen=True)
class Streams:
    """The stores of a dataset, cached at `path`: one for all or, split by document, one to train and one to test on."""

    path: Path
    train: ChunkStore
    eval: ChunkStore | None = None

    @property
    def reports(self) -> list[Report]:
        """What became of the text, for each stream."""
        return [store.report for store in (self.train, self.eval) if store is not None]


@dataclass(frozen=True)
class Rows:
    """Chosen chunks (int64 [N], repeats allowed) of a store."""

    store: ChunkStore
    chunks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chunks)


@dataclass(frozen=True)
class Split:
    """A dataset's rows for training, and its rows for evaluation if there are any."""

    train: Rows
    eval: Rows | None

    def __str__(self) -> str:
        evaluation = f", {len(self.eval):,} to evaluate on" if self.eval else ""
        return f"{self.train.store.name}: {len(self.train):,} chunks to train on{evaluation}"


def split(streams: Streams, eval_size: float | int = 0, subsample: float | None = None, num_repeats: int = 1) -> Split:
    """Choose the rows of a dataset.

    `eval_size`: the part (0 < eval_size < 1, rounded up) or the number (int ≥ 1) of chunks held out; of no effect
    where documents were held out. `subsample`: the part of both that is kept after a shuffle, rounded down.
    `num_repeats`: how often each training row comes in an epoch. UserError if no row is left on either side.
    """
    name = streams.train.name
    if streams.eval is not None:
        train, held_out = np.arange(len(streams.train)), np.arange(len(streams.eval))
    elif eval_size:
        count = held_out_count(eval_size, len(streams.train), f"dataset '{name}'", "chunks")
        # The same draw as datasets.Dataset.train_test_split (datasets 5.2, arrow_dataset.py).
        order = np.random.default_rng(SEED).permutation(len(streams.train))
        train, held_out = order[count:], order[:count]
    else:
        train, held_out = np.arange(len(streams.train)), np.empty(0, np.int64)
    evaluation = _subsampled(held_out, subsample, f"dataset '{name}', evaluation") if len(held_out) else None
    if num_repeats < 1:
        raise UserError(f"dataset '{name}': num_repeats = {num_repeats} must be 1 or more")
    train = np.tile(_subsampled(train, subsample, f"dataset '{name}'"), num_repeats)
    held_out_store = streams.train if streams.eval is None else streams.eval
    return Split(Rows(streams.train, train), None if evaluation is None else Rows(held_out_store, evaluation))


def whole(streams: Streams, subsample: float | None = None) -> Rows:
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


def _subsampled(chunks: NDArray[np.int64], part: float | None, what: str) -> NDArray[np.int64]:
    """The first `part` of `chunks` after a seeded shuffle, in ascending order; all of them for None."""
    if part is not None:
        if not 0 < part <= 1:
            raise UserError(f"{what}: subsample = {part} must be greater than 0 and at most 1")
        count = int(len(chunks) * part)
        if not count:
            raise UserError(f"{what}: subsample = {part} of {len(chunks):,} chunks leaves none")
        chunks = chunks[np.random.default_rng(SEED).permutation(len(chunks))[:count]]
    return np.sort(chunks)
