"""Takes the rows chosen of several datasets; gives the rows of each epoch.

'concatenate' has every row of every dataset. 'interleave' draws datasets by weight and takes the drawn one's next row:
'first_exhausted' stops when one dataset has given all its rows, 'all_exhausted' when every one has, those that ran out
beginning again. Rows are weighed by chance, as Hugging Face's `interleave_datasets` does, tokens and targets by turns
(`in_turns`). Within a dataset rows come in an order shuffled by run and epoch, so rows that one epoch leaves out come in another.
Every draw is a function of (seed, epoch): nothing is carried along.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.selection import Selection, shuffled

MODES = ("concatenate", "interleave")
STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")
WEIGHED = ("rows", "tokens", "targets")


@dataclass(frozen=True)
class Mixture:
    """Called with the epoch (from 0), its rows, int64 [N, 2] of (index of the dataset, row).

    `in_order`: they come in the order of training; otherwise they are to be shuffled.
    """

    rows: Callable[[int], NDArray[np.int64]]
    in_order: bool = False

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        return self.rows(epoch)


def mix(
    sets: Sequence[Selection],
    *,
    seed: int,
    mode: str = "concatenate",
    weights: Sequence[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    by: str = "rows",
    weigh_tokens: bool = False,
) -> Mixture:
    """The epochs of `sets` together.

    `weights`, one for each set (all 1 if None), are what `by` says. 'rows': in proportion to the chances of drawing a row of
    it; with `weigh_tokens` (for micro-batches of so many tokens, not rows) of drawing a token, a set's weight being divided
    by the mean length of its rows. 'tokens' and 'targets': its share of these, kept to within one row all through an epoch.
    UserError for an unknown mode, strategy or `by`, or a weight that is not positive.
    """
    if not sets or not all(len(rows) for rows in sets):
        raise UserError("there are no rows to train on")
    for what, value, known in (
        ("dataset_combination_mode", mode, MODES),
        ("dataset_interleave_stopping_strategy", stopping_strategy, STOPPING_STRATEGIES),
        ("mix_by", by, WEIGHED),
    ):
        if value not in known:
            raise UserError(f"{what} = '{value}' is not known; use one of: {', '.join(known)}")
    for rows, weight in zip(sets, weights or (), strict=bool(weights)):
        if not 0 < weight < float("inf"):
            raise UserError(f"dataset '{rows.store.name}': sample_weight = {weight} must be a positive number")
    share = np.array(weights if weights else [1.0] * len(sets), dtype=np.float64)
    if mode == "concatenate":
        return _concatenated(sets, seed)
    if by == "rows":
        if weigh_tokens:
            share = share / np.array([rows.store.lengths[rows.rows].mean() for rows in sets])
        return _by_chance(sets, share / share.sum(), stopping_strategy, seed)
    return _by_turns(sets, share / share.sum(), stopping_strategy, seed, by)


def _concatenated(sets: Sequence[Selection], seed: int) -> Mixture:
    def everything(epoch: int) -> NDArray[np.int64]:
        return np.concatenate([pairs(index, _of_epoch(rows, epoch, seed, index)) for index, rows in enumerate(sets)])

    if all(rows.repeats % 1 == 0 for rows in sets):  # the same in every epoch
        always = everything(0)
        return Mixture(lambda epoch: always)
    return Mixture(everything)


def _by_chance(sets: Sequence[Selection], share: NDArray[np.float64], stopping_strategy: str, seed: int) -> Mixture:
    def interleaved(epoch: int) -> NDArray[np.int64]:
        in_turn = _in_turn(sets, epoch, seed)
        draws = interleave(np.array([len(rows) for rows in in_turn]), share, stopping_strategy, [seed, epoch])
        return _drawn(draws, in_turn)

    return Mixture(interleaved)


def _by_turns(
    sets: Sequence[Selection], share: NDArray[np.float64], stopping_strategy: str, seed: int, by: str
) -> Mixture:
    def interleaved(epoch: int) -> NDArray[np.int64]:
        in_turn = _in_turn(sets, epoch, seed)
        counts = [rows.store.lengths if by == "tokens" else rows.store.targets for rows in sets]
        amounts = [count[rows] for count, rows in zip(counts, in_turn, strict=True)]
        return _drawn(in_turns(amounts, share, stopping_strategy), in_turn)

    return Mixture(interleaved, in_order=True)


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


def in_turns(
    amounts: Sequence[NDArray[np.int64]], share: NDArray[np.float64], stopping_strategy: str
) -> NDArray[np.int64]:
    """The dataset drawn at each step, int64 [N], so that after any number of steps each has its share of what was drawn.

    `amounts`: of each dataset what its rows count, in their order; all above 0. `share` sums to 1. Of the datasets that are
    not ahead of their share that one is drawn whose next row is due first. This is worst-case fair weighted fair queueing
    (Bennett and Zhang, INFOCOM 1996, theorem 1), by which no share is ever off by more than the largest row; the largest
    deficit alone is, with three datasets and more.
    """
    weights = share.tolist()
    following = [cycle(rows.tolist()) for rows in amounts]
    given = [0] * len(weights)
    starts = [0.0] * len(weights)  # of its next row, in what all have given by then
    coming = [next(rows) for rows in following]
    ends = [amount / weight for amount, weight in zip(coming, weights, strict=True)]
    left = [len(rows) for rows in amounts]
    total, draws, unfinished = 0, list[int](), len(weights)
    everyone = range(len(weights))
    while True:
        drawn = -1
        for index in everyone:
            if starts[index] <= total and (drawn < 0 or ends[index] < ends[drawn]):
                drawn = index
        if drawn < 0:  # by rounding only: someone always is behind
            drawn = min(everyone, key=starts.__getitem__)
        draws.append(drawn)
        total += coming[drawn]
        given[drawn] += coming[drawn]
        coming[drawn] = next(following[drawn])
        starts[drawn] = given[drawn] / weights[drawn]
        ends[drawn] = (given[drawn] + coming[drawn]) / weights[drawn]
        left[drawn] -= 1
        unfinished -= left[drawn] == 0
        if left[drawn] == 0 and (stopping_strategy == "first_exhausted" or not unfinished):
            return np.array(draws, dtype=np.int64)


def _of_epoch(rows: Selection, epoch: int, seed: int, index: int) -> NDArray[np.int64]:
    return rows.of_epoch(epoch, seed, index, 2)


def _in_turn(sets: Sequence[Selection], epoch: int, seed: int) -> list[NDArray[np.int64]]:
    """Each dataset's rows in the order in which they are drawn."""
    of_sets = [_of_epoch(rows, epoch, seed, index) for index, rows in enumerate(sets)]
    return [rows[shuffled(len(rows), seed, epoch, index)] for index, rows in enumerate(of_sets)]


def _drawn(draws: NDArray[np.int64], in_turn: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The rows, int64 [N, 2], when at each step the drawn dataset gives its next one."""
    taken = np.empty((len(draws), 2), dtype=np.int64)
    for index, rows in enumerate(in_turn):
        drawn = np.flatnonzero(draws == index)
        taken[drawn] = pairs(index, rows[np.arange(len(drawn)) % len(rows)])
    return taken


def pairs(index: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [N, 2]: `rows` [N] of the dataset number `index`."""
    return np.stack([np.full(len(rows), index, dtype=np.int64), rows], axis=1)
