"""Takes the rows of one or several datasets; gives the rows of each epoch as (dataset, chunk) pairs, int64 [N, 2].

'concatenate' has every row once. 'interleave' draws datasets by weight and takes the drawn one's next row, as Hugging
Face's `interleave_datasets` does: 'first_exhausted' stops when one dataset has given all its rows, 'all_exhausted' when
every one has, those that ran out beginning again. Within a dataset rows come in an order shuffled by run and epoch, so
rows that one epoch leaves out come in another. Every draw is a function of (seed, epoch): nothing is carried along.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.split import Rows

MODES = ("concatenate", "interleave")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")

EpochRows = Callable[[int], NDArray[np.int64]]


def mix(
    sets: Sequence[Rows],
    *,
    seed: int,
    mode: str = "concatenate",
    weights: Sequence[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    weigh_tokens: bool = False,
) -> EpochRows:
    """A function from the epoch (from 0) to its rows, int64 [N, 2] of (index into `sets`, chunk), not yet shuffled.

    `weights`, one for each set (all 1 if None), are in proportion to the chances of drawing a row of it; with
    `weigh_tokens` (for micro-batches of so many tokens, not rows) of drawing a token. UserError for an unknown mode or
    strategy, or a weight that is not positive.
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
        everything = np.concatenate([_pairs(index, rows.chunks) for index, rows in enumerate(sets)])
        return lambda epoch: everything

    sizes = np.array([len(rows) for rows in sets])
    share = np.array(weights if weights else [1.0] * len(sets), dtype=np.float64)
    if weigh_tokens:
        share = share / np.array([rows.store.sequence_len for rows in sets])

    def interleaved(epoch: int) -> NDArray[np.int64]:
        draws = interleave(sizes, share / share.sum(), stopping_strategy, [seed, epoch])
        pairs = np.empty((len(draws), 2), dtype=np.int64)
        for index, rows in enumerate(sets):
            drawn = np.flatnonzero(draws == index)
            order = shuffled(len(rows), seed, epoch, index)
            pairs[drawn] = _pairs(index, rows.chunks[order[np.arange(len(drawn)) % len(rows)]])
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


def _pairs(index: int, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.stack([np.full(len(chunks), index, dtype=np.int64), chunks], axis=1)
