"""The partitioner: the cut of a model into stages whose slowest is as fast as it can be.

`balanced` takes what each layer costs and gives one contiguous range of layers per stage. `best_split`, which it is made
of, takes for each stage and range of layers what the stage could do there (`Choice`: a value to keep small, for so much of
the host memory that the stages share) and gives the cut with each stage's choice. `explicit` is the user's own cut,
checked.

Exact: for a limit that no stage's value may exceed, dynamic programming over (stage, end of its layers) finds the least
host memory; a binary search over all values that occur finds the smallest limit for which the memory is enough.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from pipeline.console import UserError

Ranges = list[tuple[int, int]]  # of layers, [first, end), one for each stage

How = TypeVar("How")


class Choice(NamedTuple, Generic[How]):
    """What a stage could do with its layers: `value` is to be small, `host_bytes` are taken of the shared host memory, and
    `how` is the caller's own record of what the choice stands for."""

    value: float
    host_bytes: float
    how: How


class _Split(NamedTuple, Generic[How]):
    """The stages so far, by the order of preference: host memory, sum of squared values, where each stage ends."""

    host_bytes: float
    squares: float
    ends: tuple[int, ...]
    choices: tuple[Choice[How], ...]


def undominated(choices: Iterable[Choice[How]]) -> list[Choice[How]]:
    """By host memory, each choice that is better than all with less: values fall along the list. Of equals the first."""
    kept: list[Choice[How]] = []
    for choice in sorted(choices, key=lambda c: (c.host_bytes, c.value)):
        if not kept or choice.value < kept[-1].value:
            kept.append(choice)
    return kept


def best_split(
    choices: Callable[[int, int, int], list[Choice[How]]],
    n_layers: int,
    n_stages: int,
    host_bytes: float,
    ranges: Ranges | None,
) -> list[tuple[int, int, Choice[How]]] | None:
    """(first, end, choice) of each stage, with the smallest largest value for which `host_bytes` are enough; None if none is.

    choices: of a stage for its layers [first, end), `undominated`. ranges: the cut, where only the choices are open.
    Among splits with that value, the one with the least host memory, then the smallest sum of squares (the smallest spread
    where the sum is given), then the earliest ends.
    """
    cuts = [[one] for one in ranges] if ranges else _every_cut(n_layers, n_stages)
    open_to: list[dict[int, list[tuple[int, list[Choice[How]]]]]] = []  # of each stage, by the beginning of its layers
    for stage, of_stage in enumerate(cuts):
        open_to.append({})
        for first, end in of_stage:
            if of_cut := choices(stage, first, end):
                open_to[-1].setdefault(first, []).append((end, of_cut))
    values = sorted(
        {
            c.value
            for of_stage in open_to
            for from_first in of_stage.values()
            for _, of_cut in from_first
            for c in of_cut
        }
    )

    def within(limit: float) -> _Split[How] | None:
        """The best of the splits in which no value is above `limit`; None if none is possible with the host memory."""
        best: dict[int, _Split[How]] = {0: _Split(0.0, 0.0, (), ())}  # by the end of the stages so far
        for of_stage in open_to:
            longer: dict[int, _Split[How]] = {}
            for first, before in best.items():
                for end, of_cut in of_stage.get(first, ()):
                    if of_cut[-1].value > limit:
                        continue
                    # Values fall along the list: the first within the limit has the least host memory.
                    choice = of_cut[bisect.bisect_left(of_cut, -limit, key=lambda c: -c.value)]
                    host, squares = before.host_bytes + choice.host_bytes, before.squares + choice.value**2
                    other = longer.get(end)
                    if other is None or (host, squares, before.ends) < (
                        other.host_bytes,
                        other.squares,
                        other.ends[:-1],
                    ):
                        longer[end] = _Split(host, squares, (*before.ends, end), (*before.choices, choice))
            best = longer
        whole = best.get(n_layers)
        return whole if whole is not None and whole.host_bytes <= host_bytes else None

    at = bisect.bisect_left(values, True, key=lambda limit: within(limit) is not None)
    if at == len(values):
        return None
    split = within(values[at])
    assert split is not None
    return list(zip((0, *split.ends[:-1]), split.ends, split.choices, strict=True))


def _every_cut(n_layers: int, n_stages: int) -> list[Ranges]:
    """For each stage, the ranges that leave at least one layer to every other stage."""
    return [
        [
            (a, b)
            for a in ([0] if stage == 0 else range(stage, n_layers))
            for b in range(a + 1, n_layers - (n_stages - stage - 1) + 1)
            if stage < n_stages - 1 or b == n_layers
        ]
        for stage in range(n_stages)
    ]


def balanced(layers: Sequence[float], head: float, n_stages: int) -> Ranges:
    """The cut whose slowest stage costs least, of those the one with the smallest spread.

    layers, head: the cost of each, in any one unit; the head is on the last stage. Raises UserError with fewer layers than
    stages.
    """
    check_possible(None, n_stages, len(layers))
    so_far = [0.0, *itertools.accumulate(layers)]

    def cost(stage: int, first: int, end: int) -> list[Choice[None]]:
        return [Choice(so_far[end] - so_far[first] + (head if end == len(layers) else 0.0), 0.0, None)]

    split = best_split(cost, len(layers), n_stages, math.inf, None)
    assert split is not None
    return [(first, end) for first, end, _ in split]


def explicit(layers_per_stage: list[int], n_layers: int) -> Ranges:
    """The user's own cut as ranges; UserError if it does not add up."""
    check_possible(layers_per_stage, len(layers_per_stage), n_layers)
    return list(itertools.pairwise((0, *itertools.accumulate(layers_per_stage))))


def check_possible(layers_per_stage: list[int] | None, n_stages: int, n_layers: int) -> None:
    """UserError where the model has fewer layers than stages, or another number than `layers_per_stage` adds up to."""
    if n_stages > n_layers:
        raise UserError(
            f"pipeline_stages = {n_stages}: the model has only {n_layers} decoder layers, and each stage needs one"
        )
    if layers_per_stage and sum(layers_per_stage) != n_layers:
        raise UserError(
            f"layers_per_stage = {layers_per_stage} adds up to {sum(layers_per_stage)} layers, but the model has {n_layers}"
        )
