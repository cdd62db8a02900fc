"""Micro-batches as properties: nothing lost, nothing twice, the same order however it is divided."""

import math
from collections import Counter
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.data.batches import EvaluationBatches, MicroBatches, Position, StepInfo
from pipeline.data.microbatch import MicroBatch, cut
from pipeline.data.mixing import mix
from pipeline.data.selection import Selection, shuffled
from pipeline.data.store import ChunkStore
from tests.helpers import data as helpers_data

FAST = settings(max_examples=60, deadline=None)
LENGTHS = (33, 64, 65, 130)  # one below, at and above a multiple of 64
Order = list[tuple[int, int]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[ChunkStore]:
    """Four stores of 24 chunks on disk."""
    folder = tmp_path_factory.mktemp("stores")
    return [helpers_data.store(folder / str(length), length, 24, f"set{length}") for length in LENGTHS]


@st.composite
def runs(draw: st.DrawFn, one_length: bool | None = None) -> tuple[list[int], list[int], dict[str, Any]]:
    """(which stores, how many rows of each, settings of MicroBatches): what a run may be made of."""
    several = draw(st.booleans()) if one_length is None else not one_length
    which = draw(st.permutations(range(4)))[: draw(st.integers(2, 4)) if several else 1]
    counts = draw(st.lists(st.integers(1, 24), min_size=len(which), max_size=len(which)))
    budget = draw(st.sampled_from([None, 192, 300, 640]))
    return (
        which,
        counts,
        {
            "micro_batch_size": draw(st.integers(1, 5)),
            "batch_size_tokens": budget,
            "group_by_length": draw(st.booleans()),
            "seed": draw(st.integers(0, 2**32)),
        },
    )


divisions = st.tuples(st.integers(1, 4), st.integers(1, 3))  # accumulation steps, ranks


def loaders(stores: list[ChunkStore], run: Any, gas: int, dp: int, **changes: Any) -> list[MicroBatches]:
    """The loader of each rank."""
    which, counts, options = run
    sets = [Selection(stores[index], np.arange(count)) for index, count in zip(which, counts, strict=True)]
    options = options | changes
    rows = mix(sets, seed=options["seed"])
    return [
        MicroBatches(
            [part.store for part in sets], rows, gradient_accumulation_steps=gas, dp_rank=rank, dp_world=dp, **options
        )
        for rank in range(dp)
    ]


def steps(ranks: list[MicroBatches], position: Position, epochs: int) -> list[tuple[list[list[MicroBatch]], StepInfo]]:
    """(micro-batches of each rank, facts) of every step from `position` to the end of epoch `epochs` − 1."""
    taken = []
    while position.epoch < epochs:
        both = [rank.step(position) for rank in ranks]
        assert len({info for _, info in both}) == 1
        assert both[0][1] == ranks[0].info(position)
        taken.append(([batches for batches, _ in both], both[0][1]))
        position = both[0][1].next_position
    return taken


def order(taken: list[tuple[list[list[MicroBatch]], StepInfo]]) -> Order:
    """The rows in the order of training: micro-batches go to the ranks in turn."""
    rows: Order = []
    for ranks, info in taken:
        of_step = [row for turn in zip(*ranks, strict=True) for batch in turn for row in batch.rows if row is not None]
        assert tuple(of_step) == info.rows
        rows += of_step
    return rows


def targets_of(batch: MicroBatch) -> int:
    """Labels that something predicts."""
    return int((batch.labels[:, 1:] != -100).sum())


# An epoch


@FAST
@given(run=runs(), division=divisions)
def test_every_row_is_seen_once_an_epoch_by_one_rank(stores: list[ChunkStore], run: Any, division: Any) -> None:
    _, counts, _ = run
    ranks = loaders(stores, run, *division)
    everything = {(index, chunk) for index, count in enumerate(counts) for chunk in range(count)}
    for epoch in (0, 1):
        taken = steps(ranks, Position(epoch), epoch + 1)
        assert len(taken) == ranks[0].steps_per_epoch(epoch) == ranks[-1].steps_left(Position(epoch))
        assert all(len(batches) == division[0] for step, _ in taken for batches in step)
        assert sorted(order(taken)) == sorted(everything)
        seen = [
            {row for step, _ in taken for batch in step[rank] for row in batch.rows if row}
            for rank in range(len(ranks))
        ]
        assert sum(map(len, seen)) == len(everything)
        assert set().union(*seen) == everything
        assert taken[-1][1].epochs_done == epoch + 1


@FAST
@given(run=runs(), division=divisions)
def test_the_loss_of_a_step_is_the_mean_over_its_target_tokens(
    stores: list[ChunkStore], run: Any, division: Any
) -> None:
    """Averaged over accumulation steps and ranks, as DeepSpeed does, a target token weighs 1 / targets of the step."""
    gas, dp = division
    for step, info in steps(loaders(stores, run, gas, dp), Position(), 1):
        targets = sum(targets_of(batch) for batches in step for batch in batches)
        assert targets == info.targets
        assert info.tokens == targets + len(info.rows)  # all but the first token of each row
        weight = sum(targets_of(batch) * batch.loss_scale for batches in step for batch in batches) / (gas * dp)
        assert math.isclose(weight, 1, rel_tol=1e-12)  # a sum of at most 12 products, each rounded twice (2⁻⁵³)


@FAST
@given(run=runs(), division=divisions)
def test_tensors_hold_the_rows_and_nothing_else(stores: list[ChunkStore], run: Any, division: Any) -> None:
    which, _, options = run
    ranks = loaders(stores, run, *division)
    shapes = set()
    for step, _ in steps(ranks, Position(), 2):
        for batch in (batch for batches in step for batch in batches):
            ids, labels, positions = batch.input_ids, batch.labels, batch.position_ids
            assert {tensor.dtype for tensor in (ids, labels, positions)} == {torch.int64}
            assert ids.shape == labels.shape == positions.shape
            assert ids.shape[0] == len(batch.rows)
            shapes.add(tuple(ids.shape))
            assert (positions == torch.arange(ids.shape[1])).all()
            for row, row_ids, row_labels in zip(batch.rows, ids, labels, strict=True):
                length = 0 if row is None else stores[which[row[0]]].sequence_len
                if row is not None:
                    content = stores[which[row[0]]].ids(row[1]).tolist()
                    assert row_ids[:length].tolist() == content
                    assert row_labels[:length].tolist() == [-100, *content[1:]]
                assert (row_labels[length:] == -100).all()
                assert (row_ids[length:] == helpers_data.MARKS.eos).all()
            real = [row for row in batch.rows if row]
            assert (batch.loss_scale > 0) == bool(real)
            longest = max((stores[which[row[0]]].sequence_len for row in real), default=1)
            if len(which) == 1:
                assert ids.shape[1] == stores[which[0]].sequence_len
            else:
                assert ids.shape[1] == math.ceil(longest / 64) * 64
                assert len(real) == len(batch.rows) or not real
            if options["batch_size_tokens"]:
                assert ids.numel() <= options["batch_size_tokens"]
            elif real:
                assert len(real) <= options["micro_batch_size"]
    assert (ranks[0].fixed_shape is not None) == (len(which) == 1)
    assert len(which) > 1 or shapes == {ranks[0].fixed_shape}


@FAST
@given(st.lists(st.sampled_from([64, 128, 192]), min_size=1), st.integers(192, 700))
def test_micro_batches_are_as_large_as_the_budget_allows(widths: list[int], budget: int) -> None:
    starts = cut(np.array(widths), 1, budget).tolist()
    assert starts[0] == 0
    assert starts[-1] == len(widths)
    for begin, end in pairwise(starts):
        assert 0 < (end - begin) * max(widths[begin:end]) <= budget
        if end < len(widths):
            assert (end + 1 - begin) * max(widths[begin : end + 1]) > budget


def test_a_row_that_exceeds_the_budget_is_refused(stores: list[ChunkStore]) -> None:
    sets = [Selection(store, np.arange(2)) for store in stores]
    everything = mix(sets, seed=0)
    with pytest.raises(
        UserError, match=r"191 does not hold the longest row of dataset 'set130', which has 130 tokens \(192 padded"
    ):
        MicroBatches(stores, everything, seed=0, batch_size_tokens=191)
    MicroBatches(stores, everything, seed=0, batch_size_tokens=192)
    alone = mix(sets[3:], seed=0)
    with pytest.raises(
        UserError, match=r"129 does not hold the longest row of dataset 'set130', which has 130 tokens: raise"
    ):
        MicroBatches(stores[3:], alone, seed=0, batch_size_tokens=129)
    assert MicroBatches(stores[3:], alone, seed=0, batch_size_tokens=130).fixed_shape == (1, 130)


# The order


@FAST
@given(run=runs(), before=divisions, after=divisions, where=st.integers(0, 10**6))
def test_a_resumed_run_goes_on_exactly_whatever_it_is_divided_into(
    stores: list[ChunkStore], run: Any, before: Any, after: Any, where: int
) -> None:
    first = steps(loaders(stores, run, *before), Position(), 3)
    stop = where % len(first)
    position = Position(**asdict(first[stop][1].next_position))  # as a checkpoint stores it
    if position.epoch == 3:
        return
    rest = order(steps(loaders(stores, run, *after), position, 3))
    assert order(first[: stop + 1]) + rest == order(first)
    again = steps(loaders(stores, run, *before), position, 3)
    for (step, _), (expected, _) in zip(again, first[stop + 1 :], strict=True):
        for batch, other in zip(chain(*step), chain(*expected), strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
            assert torch.equal(batch.labels, other.labels)
            assert (batch.loss_scale, batch.rows) == (other.loss_scale, other.rows)


@FAST
@given(run=runs(one_length=True), size=st.integers(1, 5), division=divisions, where=st.integers(0, 10**6))
def test_with_one_row_length_the_size_of_micro_batches_may_change_too(
    stores: list[ChunkStore], run: Any, size: int, division: Any, where: int
) -> None:
    first = steps(loaders(stores, run, *division), Position(), 2)
    position = first[where % len(first)][1].next_position
    changed = loaders(stores, run, *division, micro_batch_size=size, batch_size_tokens=None, group_by_length=False)
    assert order(first[: where % len(first) + 1]) + order(steps(changed, position, 2)) == order(first)
    assert changed[0].order_hash(1) == loaders(stores, run, 1, 1)[0].order_hash(1)


def test_each_epoch_and_each_seed_has_its_own_order(stores: list[ChunkStore]) -> None:
    def orders(seed: int) -> list[tuple[Order, str]]:
        loader = loaders(stores, ([0], [24], {"seed": seed}), 1, 1)[0]
        return [(order(steps([loader], Position(e), e + 1)), loader.order_hash(e)) for e in (0, 1, 0)]

    first, second = orders(1), orders(2)
    assert first[0] == first[2]
    assert len({hash for _, hash in first + second}) == 4
    assert len({tuple(rows) for rows, _ in first + second}) == 4
    assert first[0][0] != sorted(first[0][0])


def test_the_order_of_a_seed_stays_as_it_is() -> None:
    """Pinned: another order would send every run that resumes from an older checkpoint through other data."""
    assert shuffled(12, 0, 0).tolist() == [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]
    assert sorted(shuffled(1000, 5, 6).tolist()) == list(range(1000))


@FAST
@given(run=runs(one_length=False), seed=st.integers(0, 99))
def test_rows_are_grouped_by_length_and_the_largest_comes_first(stores: list[ChunkStore], run: Any, seed: int) -> None:
    which, _, _ = run
    loader = loaders(stores, run, 1, 1, group_by_length=True, seed=seed)[0]
    for epoch in (0, 1):
        batches = [step[0][0] for step, _ in steps([loader], Position(epoch), epoch + 1)]
        lengths = [[stores[which[row[0]]].sequence_len for row in batch.rows if row] for batch in batches]
        ascending = sorted(lengths, key=lambda part: (min(part), max(part)))
        assert [n for part in ascending for n in part] == sorted(n for part in lengths for n in part)
        sizes = [batch.input_ids.numel() for batch in batches]
        assert epoch or sizes[0] == max(sizes)


def test_micro_batches_of_like_length_are_not_seen_in_the_order_of_length(stores: list[ChunkStore]) -> None:
    loader = loaders(stores, ([0, 3], [24, 24], {"group_by_length": True, "seed": 0, "micro_batch_size": 2}), 1, 1)[0]
    widths = [step[0][0].input_ids.shape[1] for step, _ in steps([loader], Position(1), 2)]
    assert Counter(widths) == {64: 12, 192: 12}
    assert widths not in (sorted(widths), sorted(widths)[::-1])


def test_a_position_that_means_nothing_here_is_refused(stores: list[ChunkStore]) -> None:
    loader = loaders(stores, ([0, 3], [5, 5], {"seed": 0, "micro_batch_size": 2}), 1, 1)[0]
    with pytest.raises(UserError, match=r"row 10 of epoch 1, is beyond the epoch's 10 rows"):
        loader.step(Position(1, 10))
    with pytest.raises(UserError, match=r"row 3 of epoch 0, is inside a micro-batch.*set these as they were"):
        loader.step(Position(0, 3))
    hashes = {
        loaders(stores, ([0, 3], counts, {"seed": 0, "micro_batch_size": size}), 1, 1)[0].order_hash(0)
        for counts, size in (([5, 5], 2), ([5, 5], 3), ([5, 6], 2))
    }
    assert len(hashes) == 3


def test_other_text_of_the_same_length_has_another_hash(stores: list[ChunkStore], tmp_path: Path) -> None:
    other = helpers_data.store(tmp_path / "other", 33, 24, "set33", document_len=36)
    both = [
        MicroBatches([s], mix([Selection(s, np.arange(24))], seed=0), seed=0).order_hash(0) for s in (stores[0], other)
    ]
    renamed = helpers_data.store(tmp_path / "renamed", 33, 24, "another name")
    assert both[0] != both[1]
    assert both[0] == MicroBatches([renamed], mix([Selection(renamed, np.arange(24))], seed=0), seed=0).order_hash(0)


def test_rows_are_traced_to_their_documents(stores: list[ChunkStore]) -> None:
    loader = loaders(stores, ([0], [24], {"seed": 0}), 2, 1)[0]
    # 32 ids a chunk, 38 a document: chunk 1 (ids 32–63) ends 0.txt and begins 1.txt; chunk 2 (64–95) 1.txt and 2.txt.
    assert loader.documents([(0, 1), None, (0, 2)]) == ["set33: 0.txt", "set33: 1.txt", "set33: 2.txt"]


def test_repeated_rows_come_as_often_as_they_are_repeated(stores: list[ChunkStore]) -> None:
    rows = mix([Selection(stores[0], np.tile(np.arange(5), 3))], seed=0)
    loader = MicroBatches(stores[:1], rows, seed=0, micro_batch_size=2)
    assert Counter(order(steps([loader], Position(), 1))) == {(0, chunk): 3 for chunk in range(5)}


# Evaluation


@FAST
@given(
    chunks=st.lists(st.integers(0, 23), min_size=1, max_size=30),
    size=st.integers(1, 6),
    budget=st.sampled_from([None, 65, 200, 390]),
    dp_world=st.integers(1, 5),
)
def test_every_evaluation_row_is_scored_once_whatever_the_ranks(
    stores: list[ChunkStore], chunks: list[int], size: int, budget: int | None, dp_world: int
) -> None:
    rows = Selection(stores[2], np.array(chunks))
    ranks = [
        EvaluationBatches(rows, micro_batch_size=size, batch_size_tokens=budget, dp_rank=rank, dp_world=dp_world)
        for rank in range(dp_world)
    ]
    batches = [list(rank) for rank in ranks]
    assert {len(part) for part in batches} == {len(ranks[0])}  # the same number of micro-batches on all ranks
    everything = [batch for part in batches for batch in part]
    assert {tuple(batch.input_ids.shape) for batch in everything} == {ranks[0].fixed_shape}
    assert ranks[0].fixed_shape == ((budget // 65) if budget else size, 65)
    real = [(row, ids) for batch in everything for row, ids in zip(batch.rows, batch.input_ids, strict=True) if row]
    assert Counter(row for row, _ in real) == Counter((0, chunk) for chunk in chunks)
    assert all(ids.tolist() == stores[2].ids(row[1]).tolist() for row, ids in real)
    assert sum(map(targets_of, everything)) == ranks[0].targets == len(chunks) * 64
    assert {batch.loss_scale for batch in everything} == {1.0}


def test_an_evaluation_row_that_exceeds_the_budget_is_refused(stores: list[ChunkStore]) -> None:
    with pytest.raises(UserError, match="batch_size_tokens = 64 does not hold the longest row of dataset 'set65'"):
        EvaluationBatches(Selection(stores[2], np.arange(3)), batch_size_tokens=64)


def test_no_epoch_is_drawn_beyond_what_the_run_takes(stores: list[ChunkStore], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = MicroBatches([stores[0]], mix([Selection(stores[0], np.arange(24))], seed=0), seed=0)
    each, drawn = batches.steps_per_epoch(0), list[int]()
    left = batches.steps_left
    monkeypatch.setattr(batches, "steps_left", lambda position: drawn.append(position.epoch) or left(position))
    assert batches.steps_to_come(Position(), 100_000, at_most=each + 1) == each + 1
    assert drawn == [0, 1]
    assert batches.steps_to_come(Position(1, 2), 3) == left(Position(1, 2)) + each
    assert batches.steps_to_come(Position(5), 3) == 0
    assert batches.steps_to_come(Position(), 2, at_most=10**6) == 2 * each
