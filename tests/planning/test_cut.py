"""Which stage owns which layers: against all cuts there are."""

import itertools
from itertools import combinations, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.planning import cut
from pipeline.planning.cut import Choice, Ranges, best_split, undominated


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


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 12), st.data())
def test_split_is_the_best_of_all_cuts_and_choices(n: int, p: int, host_bytes: int, data: st.DataObject) -> None:
    """Smallest largest value; of those the least host memory; of those the smallest sum of squares."""
    some = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=3)
    table = {
        (s, a, b): undominated(Choice(value, host, None) for value, host in data.draw(some))
        for s in range(p)
        for a in range(n)
        for b in range(a + 1, n + 1)
    }
    every = [
        (max(c.value for c in one), sum(c.host_bytes for c in one), sum(c.value**2 for c in one))
        for inner in itertools.combinations(range(1, n), p - 1)
        for one in itertools.product(*(table[s, *cut] for s, cut in enumerate(itertools.pairwise((0, *inner, n)))))
        if sum(c.host_bytes for c in one) <= host_bytes
    ]
    found = best_split(lambda s, a, b: table[s, a, b], n, p, host_bytes, None)
    assert (found is None) == (not every)
    if found is not None:
        chosen = [choice for *_, choice in found]
        key = max(c.value for c in chosen), sum(c.host_bytes for c in chosen), sum(c.value**2 for c in chosen)
        assert key == min(every)
