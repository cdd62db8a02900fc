"""How several datasets become one epoch: shares, repeats, limits; and what a step of a long epoch costs."""

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import Config
from pipeline.console import UserError
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import in_turns, mix
from pipeline.data.selection import Selection, Streams, repeated, split
from tests.helpers.configs import small
from tests.helpers.row_store import ListStore, stores

FAST = settings(max_examples=60, deadline=None)
STRATEGIES = st.sampled_from(["first_exhausted", "all_exhausted"])


def rows_of(lengths: list[int], name: str = "turns") -> ListStore:
    return ListStore([([5] * length, [(1, length)]) for length in lengths], name)


# Shares


@settings(max_examples=100, deadline=None)
@given(
    amounts=st.lists(st.lists(st.sampled_from([1, 2, 3, 17, 400]), min_size=1, max_size=40), min_size=1, max_size=7),
    weights=st.lists(st.floats(1e-3, 10), min_size=7, max_size=7),
    strategy=STRATEGIES,
)
def test_each_share_is_within_one_row_after_any_number_of_rows(
    amounts: list[list[int]], weights: list[float], strategy: str
) -> None:
    share = np.array(weights[: len(amounts)]) / sum(weights[: len(amounts)])
    sets = [np.array(rows) for rows in amounts]
    if strategy == "all_exhausted":  # in as many draws as a test has time for
        share = np.maximum(share, 0.05) / np.maximum(share, 0.05).sum()
    draws = in_turns(sets, share, strategy)
    counts, given_by = [0] * len(sets), np.zeros(len(sets))
    largest = max(map(max, amounts))
    for drawn in draws.tolist():
        given_by[drawn] += sets[drawn][counts[drawn] % len(sets[drawn])]
        counts[drawn] += 1
        assert np.abs(given_by - share * given_by.sum()).max() <= largest * (1 + 1e-9)
    full = [count >= len(rows) for count, rows in zip(counts, amounts, strict=True)]
    assert any(full) if strategy == "first_exhausted" else all(full)
    assert counts[draws[-1]] == len(amounts[draws[-1]])  # ended by the draw that made it so


@settings(max_examples=12, deadline=None)
@given(
    given_stores=st.lists(stores, min_size=2, max_size=4),
    by=st.sampled_from(["tokens", "targets"]),
    strategy=STRATEGIES,
)
def test_an_epoch_by_turns_trains_in_its_order(given_stores: list[ListStore], by: str, strategy: str) -> None:
    sets = [Selection(store, np.flatnonzero(store.targets)) for store in given_stores if store.targets.any()]
    if not sets:
        return
    kept = [rows.store for rows in sets]
    mixture = mix(sets, seed=3, mode="interleave", stopping_strategy=strategy, by=by)
    batches, taken = MicroBatches(kept, mixture, seed=3, micro_batch_size=1), []
    assert mixture.in_order
    for epoch in (1, 2):  # the first epoch's first micro-batch is the largest
        position, expected = Position(epoch), [tuple(row) for row in mixture(epoch).tolist()]
        taken = []
        while position.epoch == epoch:
            info = batches.step(position)[1]
            taken += info.rows
            position = info.next_position
        assert taken == expected
        for index, rows in enumerate(sets):
            times = Counter(row for set_of, row in taken if set_of == index)
            assert set(times) <= set(rows.rows.tolist())
            assert strategy == "all_exhausted" or max(times.values(), default=0) <= 1


def test_targets_are_not_tokens() -> None:
    """One set's rows are trained in a tenth of their tokens: by targets it is drawn ten times as often as the other."""
    few, all_of = ListStore([([5] * 21, [(19, 21)])] * 200, "few"), rows_of([21] * 200, "all")
    sets = [Selection(store, np.arange(200)) for store in (few, all_of)]
    drawn = {
        by: np.bincount(mix(sets, seed=0, mode="interleave", by=by)(0)[:, 0]) for by in ("rows", "tokens", "targets")
    }
    assert abs(int(drawn["tokens"][0]) - int(drawn["tokens"][1])) <= 1
    assert abs(int(drawn["targets"][0]) - 10 * int(drawn["targets"][1])) <= 10


def test_weights_by_turns_are_shares_of_tokens() -> None:
    sets = [Selection(rows_of([length] * 400), np.arange(400)) for length in (10, 37)]
    rows = mix(sets, seed=0, mode="interleave", by="tokens", weights=[3, 1])(0)
    tokens = np.bincount(rows[:, 0], weights=np.array([10, 37])[rows[:, 0]])
    assert abs(tokens[0] - 0.75 * tokens.sum()) <= 37


# Repeats and limits


@FAST
@given(count=st.integers(1, 30), repeats=st.floats(0.02, 4), epochs=st.integers(1, 12))
def test_a_part_of_a_pass_goes_on_in_the_next_epoch(count: int, repeats: float, epochs: int) -> None:
    chosen = Selection(rows_of([3] * count), np.arange(count) * 2, repeats)
    if not len(chosen):
        return
    each = [chosen.of_epoch(epoch, 1, 2) for epoch in range(epochs)]
    assert {len(rows) for rows in each} == {len(chosen)}
    assert abs(len(chosen) - repeats * count) <= 0.5
    times = Counter(np.concatenate(each).tolist())
    assert set(times) <= set(chosen.rows.tolist())
    assert max(times.values()) - min([times[row] for row in chosen.rows.tolist()]) <= 1


def test_half_a_pass_twice_is_the_whole(tmp_path: Path) -> None:
    store = rows_of([3] * 10)
    for sets in ([Selection(store, np.arange(10), 0.5)], [Selection(store, np.arange(10), 2.5)]):
        both = [mix(sets, seed=4)(epoch)[:, 1].tolist() for epoch in (0, 1, 0)]
        assert both[0] == both[2] != both[1]
        assert Counter(both[0] + both[1]) == dict.fromkeys(range(10), int(2 * sets[0].repeats))
        batches = MicroBatches([store], mix(sets, seed=4), seed=4)
        assert batches.steps_to_come(Position(), 2) == int(20 * sets[0].repeats)


def test_no_more_tokens_than_asked_for() -> None:
    lengths = [3, 9, 4, 8, 5, 7, 6, 2, 10, 11]
    store = rows_of(lengths)
    found = split(Streams(store), eval_size=2, max_tokens=30)
    taken = store.lengths[found.train.rows]
    assert 30 - 11 < taken.sum() <= 30
    assert found.eval is not None
    assert not set(found.train.rows) & set(found.eval.rows)
    assert len(split(Streams(store), max_tokens=65).train) == 10
    twice = split(Streams(store), max_tokens=30, num_repeats=2).train
    assert len(twice) == 2 * len(twice.rows)
    with pytest.raises(UserError, match="'turns': max_tokens = 1 is less than its first row has"):
        split(Streams(store), max_tokens=1)
    with pytest.raises(UserError, match=r"'turns': num_repeats = 0\.01 of 10 rows leaves none"):
        repeated(Selection(store, np.arange(10)), 0.01)


def test_what_mix_by_goes_with() -> None:
    for changes, message in (
        ({"mix_by": "tokens"}, "mix_by: only applies when dataset_combination_mode is 'interleave'"),
        (
            {"mix_by": "targets", "dataset_combination_mode": "interleave", "group_by_length": True},
            "mix_by: 'targets' has an order of its own, which group_by_length = true would undo",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Config(**small(**changes))
    with pytest.raises(UserError, match="mix_by = 'words' is not known; use one of: rows, tokens, targets"):
        mix([Selection(rows_of([3]), np.arange(1))], seed=0, by="words")


# Cost


class Counted(np.ndarray[Any, Any]):
    """An array that counts how many of its elements are asked for."""

    asked = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        Counted.asked += np.size(found)
        return found


class CountedStore(ListStore):
    """Rows whose lengths and targets are counted as they are looked up."""

    lengths = targets = None  # type: ignore[assignment]

    def __init__(self, lengths: list[int]) -> None:
        super().__init__([([5] * length, [(1, length)]) for length in lengths])
        self.lengths = np.array(lengths).view(Counted)
        self.targets = (np.array(lengths) - 1).view(Counted)


@pytest.mark.parametrize("lengths", [[4], [4, 6, 9]], ids=["one_length", "unequal"])
def test_an_epoch_touches_each_row_a_few_times(lengths: list[int]) -> None:
    """Whatever the epoch's length a step looks at its own rows; it allocates nothing of the epoch's size."""

    def cost(count: int) -> tuple[float, int]:
        store = CountedStore((lengths * count)[:count])
        batches = MicroBatches(
            [store], mix([Selection(store, np.arange(count))], seed=0), seed=0, gradient_accumulation_steps=4
        )
        position, peak = batches.step(Position())[1].next_position, 0
        Counted.asked = 0
        while not position.epoch:
            tracemalloc.start()
            position = batches.step(position)[1].next_position
            peak = max(peak, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert batches.steps_to_come(position, 1) >= 0
        return Counted.asked / count, peak

    (per_row, peak), (more_per_row, larger_peak) = cost(200), cost(2000)
    assert more_per_row <= per_row * 1.1 <= 6
    assert larger_peak < peak + 2000  # bytes: nothing with an entry a row
