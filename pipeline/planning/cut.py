"""The partitioner: the cut of a model into stages whose slowest is as fast as it can be.

`balanced` takes what each layer costs and gives one contiguous range of layers per stage. `best_split`, which it is made
of, takes for each stage and range of layers what the stage could do there (`Choice`: a value to keep small, for so much of
the host memory that the stages share) and gives the cut with each stage's choice. `explicit` is the user's own cut,
checked.

Exact: for a limit that no stage's value may exceed, dynamic programming over (stage, end of its layers) finds the least
host memory; a binary search over the values that occur finds the smallest limit for which the memory is enough. More layers
never make a stage's value smaller, so a limit leaves a stage only so many places to begin and to end, which binary searches
find: ranges of layers are looked at in numbers that grow as the layers, not as their square.
"""

import bisect
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Generic, NamedTuple, TypeVar

from pipeline.console import UserError

Ranges = list[tuple[int, int]]  # of layers, [first, end), one for each stage
MOST = sys.float_info.max
HALVINGS = 5

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

    @property
    def largest(self) -> float:
        return max(choice.value for choice in self.choices)


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
    may_fall_at: int = 0,
) -> list[tuple[int, int, Choice[How]]] | None:
    """(first, end, choice) of each stage, with the smallest largest value for which `host_bytes` are enough; None if none is.

    choices: of a stage for its layers [first, end), `undominated`. A range is to be no better, for any host memory, than the
    ranges within it, except that one which begins before layer `may_fall_at` may be better than one which begins there or
    behind. ranges: the cut, where only the choices are open.
    Among splits with that value, the one with the least host memory, then the smallest sum of squares (the smallest spread
    where the sum is given), then the earliest ends.
    """
    search = _Search(choices, n_layers, n_stages, host_bytes, may_fall_at)
    split = search.of_ranges(ranges) if ranges else search.of_all()
    return None if split is None else list(zip((0, *split.ends[:-1]), split.ends, split.choices, strict=True))


class _Search(Generic[How]):
    """Looks at few ranges of layers: a limit that no value may exceed leaves each stage few places to begin and end."""

    def __init__(
        self,
        choices: Callable[[int, int, int], list[Choice[How]]],
        n_layers: int,
        n_stages: int,
        host_bytes: float,
        may_fall_at: int,
    ) -> None:
        self._look: Callable[[int, int, int], list[Choice[How]]] = cache(choices)
        self._n, self._stages, self._host_bytes, self._fall = n_layers, n_stages, host_bytes, may_fall_at

    def of_ranges(self, ranges: Ranges) -> _Split[How] | None:
        """The best choices for a given cut; None where it does not go from the first layer to the last."""
        bounds = [0, *(end for _, end in ranges)]
        if ranges != [*itertools.pairwise(bounds)] or bounds[-1] != self._n:
            return None
        return self._least([(bound, bound) for bound in bounds], -math.inf, MOST)

    def of_all(self) -> _Split[How] | None:
        """The best of every cut.

        `_least_limit` is the answer's largest value where host memory is not scarce. Otherwise the limit is raised, in growing
        steps, until there is a split, and then halved back towards what was too little: the nearer it is to the answer, the
        fewer ranges are within it.
        """
        if (least := self._least_limit()) is None:
            return None
        limit, longest = least
        if (split := self._within(limit, self._windows(limit))) is not None:
            return split
        for step in (*((longest - limit) * 2.0 ** (-i / 2) for i in range(20, -1, -1)), MOST):
            if (split := self._within(least[0] + step, self._windows(least[0] + step))) is not None:
                break
            limit = max(limit, least[0] + step)
        if split is None:
            return None
        for _ in range(HALVINGS):
            middle = limit + (split.largest - limit) / 2
            nearer = self._within(middle, self._windows(middle))
            limit, split = (middle, split) if nearer is None else (limit, nearer)
        return self._least(self._windows(split.largest), limit, split.largest)

    def _least(self, windows: Ranges | None, above: float, largest: float) -> _Split[How] | None:
        """The best split whose largest value is within (above, largest]; the stages begin and end within `windows`."""
        values = {c.value for of_cut in self._open(windows, largest) for c in of_cut if above < c.value <= largest}
        ordered = sorted(values)
        at = bisect.bisect_left(ordered, True, key=lambda limit: self._within(limit, windows) is not None)
        return self._within(ordered[at], windows) if at < len(ordered) else None

    def _within(self, limit: float, windows: Ranges | None) -> _Split[How] | None:
        """The best of the splits in which no value is above `limit`; None if none is possible with the host memory."""
        if windows is None:
            return None
        best: dict[int, _Split[How]] = {0: _Split(0.0, 0.0, (), ())}  # by the end of the stages so far
        for stage in range(self._stages):
            longer: dict[int, _Split[How]] = {}
            for first, before in best.items():
                for end, of_cut in self._ends(stage, first, windows[stage + 1], limit):
                    # Values fall along the list: the first within the limit has the least host memory.
                    choice = of_cut[bisect.bisect_left(of_cut, -limit, key=lambda c: -c.value)]
                    host, squares = before.host_bytes + choice.host_bytes, before.squares + choice.value**2
                    if host > self._host_bytes:
                        break
                    other = longer.get(end)
                    if other is None or (host, squares, before.ends) < (
                        other.host_bytes,
                        other.squares,
                        other.ends[:-1],
                    ):
                        longer[end] = _Split(host, squares, (*before.ends, end), (*before.choices, choice))
            best = longer
        return best.get(self._n)

    def _ends(
        self, stage: int, first: int, window: tuple[int, int], limit: float
    ) -> Iterator[tuple[int, list[Choice[How]]]]:
        """Where the stage may end, within `window`, and its choices there."""
        for end in range(max(first + 1, window[0]), window[1] + 1):
            if not (of_cut := self._look(stage, first, end)) or of_cut[-1].value > limit:
                return
            yield end, of_cut

    def _open(self, windows: Ranges | None, limit: float) -> Iterator[list[Choice[How]]]:
        """The choices of every range within `windows` that has a value which is not above `limit`."""
        for stage, ((low, high), ends) in enumerate(itertools.pairwise(windows or ())):
            for first in range(low, high + 1):
                yield from (of_cut for _, of_cut in self._ends(stage, first, ends, limit))

    def _least_limit(self) -> tuple[float, float] | None:
        """The least limit with which the stages reach the last layer, each with all the host memory, and the largest value if
        each takes as many layers as it can; None where they do not reach it.

        The exact bisection of Pinar and Aykanat (2004, "Fast optimal load balancing algorithms for 1D partitioning"): between
        two values that occur there is nothing to try.
        """
        bounds, longest, _ = self._furthest(MOST)
        if bounds is None:
            return None
        low, high = self._furthest(-MOST)[2], longest
        while low < high:
            middle = low + (high - low) / 2
            if middle >= high:  # they are neighbours
                middle = low
            bounds, largest, beyond = self._furthest(middle)
            low, high = (low, largest) if bounds is not None else (beyond, high)
        return high, longest

    def _furthest(self, limit: float) -> tuple[list[int] | None, float, float]:
        """The furthest that the stages could end with no value above `limit`, 0 for the first's beginning; None where one cannot
        be. The largest value there, and the smallest that was too large: limits between them give the same."""
        bounds, largest, beyond = [0], -math.inf, math.inf
        for stage in range(self._stages):
            most = self._n - (self._stages - stage - 1)
            furthest = bounds[-1]  # where nothing may begin there, an earlier beginning may end there
            for first in {bounds[-1], max(stage, min(bounds[-1], self._fall - 1))}:
                ends = range(first + 1 if stage < self._stages - 1 else most, most + 1)
                n_open = bisect.bisect_right(ends, limit, key=partial(self._value, stage, first))
                if n_open:
                    furthest = max(furthest, ends[n_open - 1])
                    largest = max(largest, self._value(stage, first, ends[n_open - 1]))
                if n_open < len(ends):
                    beyond = min(beyond, self._value(stage, first, ends[n_open]))
            if furthest <= stage or (stage == self._stages - 1 and furthest < self._n):
                return None, largest, beyond
            bounds.append(furthest)
        return bounds, largest, beyond

    def _windows(self, limit: float) -> Ranges | None:
        """Where the first stage may begin and each stage may end, first and last place, with no value above `limit`: all
        splits are within, though not all that is within is one. None where there is none."""
        latest, _, _ = self._furthest(limit)
        if latest is None:
            return None
        earliest = [self._n]
        for stage in range(self._stages - 1, 0, -1):
            end = earliest[-1]
            if end > latest[stage + 1]:
                return None
            fall = min(max(self._fall, stage), end)
            before, behind = range(stage, fall), range(fall, end)
            firsts = before if before and self._is_open(stage, end, limit, before[-1]) else behind
            at = bisect.bisect_left(firsts, True, key=partial(self._is_open, stage, end, limit))
            earliest.append(firsts[at] if at < len(firsts) else end)
        return [(0, 0), *zip(earliest[::-1][: self._stages - 1], latest[1:-1], strict=True), (self._n, self._n)]

    def _is_open(self, stage: int, end: int, limit: float, first: int) -> bool:
        return self._value(stage, first, end) <= limit

    def _value(self, stage: int, first: int, end: int) -> float:
        """The least for these layers with all the host memory; infinite where nothing is possible."""
        of_cut = self._look(stage, first, end)
        return of_cut[-1].value if of_cut else math.inf


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
