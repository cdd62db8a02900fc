"""Which stage owns which layers: against all cuts there are."""

import itertools
import math
from itertools import combinations, pairwise
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.planning import cut
from pipeline.planning.cut import Choice, Ranges, best_split, undominated
from tests.helpers.planning import split_by_every_range


def every_cut(n_layers: int, n_stages: int) -> list[Ranges]:
    return [[*pairwise((0, *inner, n_layers))] for inner in combinations(range(1, n_layers), n_stages - 1)]


def stage_costs(layers: list[int], head: int, ranges: Ranges) -> list[int]:
    return [sum(layers[a:b]) + (head if b == len(layers) else 0) for a, b in ranges]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 5))
@example([4, 3, 2, 5, 3, 0], 8, 4)  # the best beginning is not the beginning of the best split
@example([4, 12, 2, 4, 7], 4, 3)  # the smallest spread is not that of the fastest split
def test_split_is_the_best_of_all_cuts(layers: list[int], head: int, n_stages: int) -> None:
    if n_stages > len(layers):
        with pytest.raises(UserError, match=f"pipeline_stages = {n_stages}.*only {len(layers)} decoder layers"):
            cut.balanced(layers, head, n_stages)
        return
    ranges = cut.balanced(layers, head, n_stages)
    assert [layer for first, end in ranges for layer in range(first, end)] == list(range(len(layers)))
    assert all(first < end for first, end in ranges)
    assert len(ranges) == n_stages

    def key(ranges: Ranges) -> tuple[int, int]:
        each = stage_costs(layers, head, ranges)
        return max(each), sum(c * c for c in each)

    # The slowest stage as fast as can be; among such cuts, the smallest spread.
    assert key(ranges) == min(key(other) for other in every_cut(len(layers), n_stages))


def test_head_counts_as_work_of_the_last_stage() -> None:
    """40 layers of 1 and a head of 3: 21 and 19 + 3, rather than 20 and 20 + 3."""
    assert cut.balanced([1.0] * 40, 3.0, 2) == [(0, 21), (21, 40)]
    assert cut.balanced([1.0] * 40, 0.0, 2) == [(0, 20), (20, 40)]
    assert cut.balanced([1.0] * 4, 100.0, 2) == [(0, 3), (3, 4)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_explicit_split(layers_per_stage: list[int]) -> None:
    total = sum(layers_per_stage)
    ranges = cut.explicit(layers_per_stage, total)
    assert [end - first for first, end in ranges] == layers_per_stage
    assert [layer for first, end in ranges for layer in range(first, end)] == list(range(total))


@pytest.mark.parametrize("layers_per_stage", [[21, 20], [20, 19], [40, 1]])
def test_explicit_split_that_does_not_add_up(layers_per_stage: list[int]) -> None:
    with pytest.raises(UserError, match=rf"adds up to {sum(layers_per_stage)} layers, but the model has 40"):
        cut.explicit(layers_per_stage, 40)


Table = dict[tuple[int, int, int], list[Choice[None]]]


@st.composite
def tables(draw: st.DrawFn, most_layers: int, most_stages: int) -> tuple[Table, int, int, int]:
    """Choices of each stage and range of layers, none better than those of a range within it, unless it begins below the last
    number and the other there or behind; how many layers and stages."""
    n, p = draw(st.integers(2, most_layers)), draw(st.integers(1, most_stages))
    fall = draw(st.sampled_from([0, *range(n)]))
    some = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=3)
    table: Table = {}
    for s, length, a in itertools.product(range(p), range(1, n + 1), range(n)):
        if (b := a + length) > n:
            continue
        best = dict.fromkeys(range(5), math.inf)  # by host memory
        for value, host in draw(some):
            best.update({h: value for h in best if h >= host and value < best[h]})
        within = [(c, d) for c, d in ((a + 1, b), (a, b - 1)) if c < d and not (a < fall <= c)]
        for h, cut_ in itertools.product(best, within):
            best[h] = max(best[h], min((c.value for c in table[s, *cut_] if c.host_bytes <= h), default=math.inf))
        table[s, a, b] = undominated(Choice(value, h, None) for h, value in best.items() if value < math.inf)
    return table, n, p, fall


@given(tables(5, 3), st.integers(0, 12))
def test_split_is_the_best_of_all_cuts_and_choices(made: tuple[Table, int, int, int], host_bytes: int) -> None:
    """Smallest largest value; of those the least host memory; of those the smallest sum of squares."""
    table, n, p, fall = made
    every = [
        (max(c.value for c in one), sum(c.host_bytes for c in one), sum(c.value**2 for c in one))
        for inner in itertools.combinations(range(1, n), p - 1)
        for one in itertools.product(*(table[s, *cut] for s, cut in enumerate(itertools.pairwise((0, *inner, n)))))
        if sum(c.host_bytes for c in one) <= host_bytes
    ]
    found = best_split(lambda s, a, b: table[s, a, b], n, p, host_bytes, None, fall)
    assert (found is None) == (not every)
    if found is not None:
        chosen = [choice for *_, choice in found]
        key = max(c.value for c in chosen), sum(c.host_bytes for c in chosen), sum(c.value**2 for c in chosen)
        assert key == min(every)


@settings(deadline=None)
@given(tables(9, 5), st.integers(0, 20))
def test_split_is_that_of_a_look_at_every_range(made: tuple[Table, int, int, int], host_bytes: int) -> None:
    """Of equals the same, too: where stages end, and what each chooses."""
    table, n, p, fall = made
    of, given_ = (lambda s, a, b: table[s, a, b]), (n, p, host_bytes, None)
    assert best_split(of, *given_, fall) == split_by_every_range(of, *given_)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=40), st.floats(0, 1e10), st.integers(1, 16))
def test_a_cut_by_costs_is_that_of_a_look_at_every_range(layers: list[float], head: float, n_stages: int) -> None:
    found: list[Ranges] = []
    for search in (best_split, split_by_every_range):
        with mock.patch.object(cut, "best_split", search):
            if n_stages <= len(layers):
                found.append(cut.balanced(layers, head, n_stages))
    assert all(one == found[0] for one in found)
