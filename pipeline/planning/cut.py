"""The cut of a model into stages whose slowest is fastest, where stages share host memory.

Takes, for each stage and range of layers, the choices it has there (a value to keep small, for so much host memory); gives
the cut and each stage's choice. Exact: for a limit that no stage may exceed, dynamic programming over (stage, first layer)
finds the least host memory; a binary search over all values that occur finds the smallest limit that the memory allows.
"""

import bisect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pipeline.model.memory.levels import Level

Ranges = list[tuple[int, int]]


class Choice(NamedTuple):
    """What a stage can do: its seconds per micro-batch, or the bytes by which it does not fit, for so much host memory."""

    value: float
    host_bytes: float
    n_host: int
    host_level: Level
    chosen: Any


def undominated(choices: Iterable[Choice]) -> list[Choice]:
    """By host memory, each choice that is better than all with less: values fall along the list."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.host_bytes, c.value, c.n_host)):
        if not kept or choice.value < kept[-1].value:
            kept.append(choice)
    return kept


def best_split(
    choices: Callable[[int, int, int], list[Choice]],
    n_layers: int,
    n_stages: int,
    host_bytes: float,
    ranges: Ranges | None,
) -> list[tuple[int, int, Choice]] | None:
    """The cut, and a choice for each stage, with the smallest largest value whose host memory is there; None if none is.

    Among cuts with that value, the one with the least host memory, then the smallest spread of values.
    """
    cuts = (
        [[r] for r in ranges]
        if ranges
        else [
            [
                (a, b)
                for a in ([0] if s == 0 else range(s, n_layers))
                for b in range(a + 1, n_layers - (n_stages - s - 1) + 1)
                if s < n_stages - 1 or b == n_layers
            ]
            for s in range(n_stages)
        ]
    )
    of = [[(a, b, choices(s, a, b)) for a, b in each] for s, each in enumerate(cuts)]
    values = sorted({c.value for each in of for _, _, found in each for c in found})

    def within(limit: float) -> tuple[float, float, Any] | None:
        """Least (host memory, sum of squares, linked cuts) of whole splits in which no value is above `limit`."""
        best: dict[int, tuple[float, float, Any]] = {0: (0.0, 0.0, None)}
        for each in of:
            after: dict[int, tuple[float, float, Any]] = {}
            for a, b, found in each:
                # Values fall along the list: the first within the limit has the least host memory.
                at = bisect.bisect_left(found, -limit, key=lambda c: -c.value)
                if a not in best or at == len(found):
                    continue
                host, squares, before = best[a]
                host, squares = host + found[at].host_bytes, squares + found[at].value ** 2
                if b not in after or (host, squares) < after[b][:2]:
                    after[b] = (host, squares, (a, b, found[at], before))
            best = after
        split = best.get(n_layers)
        return split if split is not None and split[0] <= host_bytes else None

    at = bisect.bisect_left(values, True, key=lambda limit: within(limit) is not None)
    if at == len(values):
        return None
    split = within(values[at])
    assert split is not None
    linked, cut = split[2], []
    while linked is not None:
        *one, linked = linked
        cut.append(tuple(one))
    return cut[::-1]  # type: ignore[return-value]
