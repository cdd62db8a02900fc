"""Rows of their own length, with targets in runs: through micro-batches, evaluation, the mixture, the split, the preview.

Oracle: each row by itself, as plain lists.
"""

import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pipeline.kernels.cross_entropy import LogitTransform

from pipeline.console import UserError
from pipeline.data.batches import EvaluationBatches, MicroBatches, Position
from pipeline.data.microbatch import MicroBatch
from pipeline.data.mixing import Mixture, mix
from pipeline.data.preview import preview
from pipeline.data.selection import Selection, Streams, split
from pipeline.objectives.language_modelling import LanguageModelling
from tests.helpers import data as helpers_data
from tests.helpers.row_store import ListStore, stores

FAST = settings(max_examples=60, deadline=None)
divisions = st.tuples(st.integers(1, 3), st.integers(1, 3))  # accumulation steps, ranks
sizes = st.sampled_from([{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"batch_size_tokens": 400}])


def everything(*given: ListStore) -> list[Selection]:
    return [Selection(store, np.arange(len(store))) for store in given]


def wanted(store: ListStore, row: int) -> list[int]:
    """The labels of a row, from its runs."""
    ids, runs = store.rows[row]
    return [id if any(start <= place < end for start, end in runs) else -100 for place, id in enumerate(ids)]


def check(batch: MicroBatch, given: list[ListStore]) -> None:
    """Every row as it is in its store, and nothing beside."""
    for row, ids, labels, length in zip(batch.rows, batch.input_ids, batch.labels, batch.lengths.tolist(), strict=True):
        expected = [] if row is None else given[row[0]].rows[row[1]][0]
        assert length == len(expected)
        assert ids[:length].tolist() == expected
        assert labels[:length].tolist() == ([] if row is None else wanted(given[row[0]], row[1]))
        assert (labels[length:] == -100).all()
        assert (ids[length:] == 2).all()


@FAST
@given(given=st.lists(stores, min_size=1, max_size=2), division=divisions, size=sizes, grouped=st.booleans())
def test_a_step_weighs_each_target_alike(
    given: list[ListStore], division: Any, size: dict[str, int], grouped: bool
) -> None:
    assume(all(store.targets.any() for store in given))
    gas, dp = division
    sets = [Selection(store, np.flatnonzero(store.targets)) for store in given]
    position, seen = Position(), Counter[Any]()
    options = {"seed": 0, "gradient_accumulation_steps": gas, "dp_world": dp, "group_by_length": grouped, **size}
    ranks = [MicroBatches(given, mix(sets, seed=0), dp_rank=rank, **options) for rank in range(dp)]
    while not position.epoch:
        both = [rank.step(position) for rank in ranks]
        batches, info = [batch for part, _ in both for batch in part], both[0][1]
        for batch in batches:
            check(batch, given)
        assert info.targets == sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
        assert info.tokens == sum(int(batch.lengths.sum()) for batch in batches)
        weight = sum(int((batch.labels != -100).sum()) * batch.loss_scale for batch in batches) / (gas * dp)
        assert math.isclose(weight, 1, rel_tol=1e-12)  # a sum of at most 9 products, each rounded twice (2⁻⁵³)
        seen.update(info.rows)
        position = info.next_position
    assert seen == Counter((i, int(row)) for i, chosen in enumerate(sets) for row in chosen.rows)


@FAST
@given(store=stores, size=sizes, dp=st.integers(1, 3))
def test_evaluation_scores_every_row_once(store: ListStore, size: dict[str, int], dp: int) -> None:
    assume(store.targets.any())
    ranks = [EvaluationBatches(everything(store)[0], dp_rank=rank, dp_world=dp, **size) for rank in range(dp)]
    batches = [batch for rank in ranks for batch in rank]
    assert len(batches) == dp * len(ranks[0])
    for batch in batches:
        check(batch, [store])
        assert batch.input_ids.numel() <= size.get("batch_size_tokens", math.inf)
    assert Counter(row for batch in batches for row in batch.rows if row) == Counter((0, i) for i in range(len(store)))
    assert ranks[0].targets == sum(int((batch.labels != -100).sum()) for batch in batches)


@FAST
@given(store=stores, size=sizes)
def test_the_loss_is_the_mean_over_targets(store: ListStore, size: dict[str, int]) -> None:
    """Of a toy whose hidden state is its ids' embedding, against one row at a time in fp64; summed in fp32 over ≤ 1800."""
    assume(store.targets.any())
    generator = torch.Generator().manual_seed(0)
    table, head = torch.randn(64, 8, generator=generator), torch.nn.Linear(8, 64, bias=False)
    objective = LanguageModelling(head.requires_grad_(False), LogitTransform())
    total = 0.0
    for ids, runs in store.rows:
        losses = torch.nn.functional.cross_entropy(
            (table[ids].double() @ head.weight.double().T)[:-1], torch.tensor(ids[1:]), reduction="none"
        )
        total += sum(float(losses[place - 1]) for start, end in runs for place in range(start, end))
    expected = total / int(store.targets.sum())
    batches = EvaluationBatches(everything(store)[0], **size)
    sums = [objective.row_sums(table[batch.input_ids], batch.tensors())["loss"].double().sum() for batch in batches]
    assert float(sum(sums)) / batches.targets == pytest.approx(expected, rel=1e-5)
    loader = MicroBatches([store], mix(everything(store), seed=0), seed=0, gradient_accumulation_steps=200, **size)
    parts, info = loader.step(Position())
    assert info.next_position == Position(1)
    losses = [float(objective.loss(table[batch.input_ids], batch.tensors())) for batch in parts]
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-5)


def test_rows_of_one_length_have_one_shape_whatever_is_masked() -> None:
    store = ListStore([([1, 5, 6, 7], [(2, 4)]), ([1, 8, 9, 2], [(1, 2), (3, 4)]), ([1, 3, 4, 5], [])])
    batches = MicroBatches([store], mix(everything(store), seed=0), seed=0, micro_batch_size=2)
    assert batches.fixed_shape == (2, 4) == EvaluationBatches(everything(store)[0], micro_batch_size=2).fixed_shape


def test_a_row_without_targets_is_left_out_and_said(tmp_path: Path) -> None:
    store = ListStore([([1, 5, 6], [(1, 3)]), ([1, 5], []), ([1, 7, 2], [(2, 3)]), ([1, 8, 2, 9], [(1, 4)])])
    found = split(Streams(store))
    assert found.train.rows.tolist() == [0, 2, 3]
    assert found.eval is None
    assert str(found) == "turns: 3 rows to train on; 1 without a token to train are left out"
    both = split(Streams(store), eval_size=1)
    assert both.eval is not None
    assert sorted([*both.train.rows, *both.eval.rows]) == [0, 2, 3]
    with pytest.raises(UserError, match="dataset 'empty': none of its 2 rows has a token to train on"):
        split(Streams(ListStore([([1, 5], []), ([1, 6], [])], name="empty")))


def test_nothing_is_divided_by_no_targets() -> None:
    """Such rows do not come through `split`; whoever brings them all the same is told."""
    store = ListStore([([1, 5, 6], []), ([1, 7], []), ([1, 8, 9], [(1, 3)])])
    batches = MicroBatches(
        [store], Mixture(lambda epoch: np.array([[0, 0], [0, 1]])), seed=0, gradient_accumulation_steps=2
    )
    assert batches.info(Position()).targets == 0
    with pytest.raises(UserError, match=r"none of the step's 2 rows.*'turns', has a token to train on: leave them out"):
        batches.step(Position())
    with pytest.raises(UserError, match="dataset 'turns': none of its 2 rows to evaluate on has a target"):
        EvaluationBatches(Selection(store, np.array([0, 1])))
    mixed = MicroBatches([store], mix(everything(store), seed=0), seed=0, gradient_accumulation_steps=4)
    scales = {batch.loss_scale for batch in mixed.step(Position())[0]}
    assert scales == {4 / 2, 0.0}  # of all but the filler, whatever the row


def test_tokens_are_weighed_by_the_mean_length() -> None:
    """Rows of 4 tokens on average against rows of 16, chances 4:1. Of n draws a share is off by at most √(¼/n), n ≥ 4000."""
    short = ListStore([([1] * length, [(1, 2)]) for length in (2, 4, 6)] * 2000)
    long = ListStore([([1] * 16, [(1, 16)])] * 4000)
    rows = mix(everything(short, long), seed=0, mode="interleave", weigh_tokens=True)(0)
    assert abs((rows[:, 0] == 0).mean() - 16 / 20) < 4 * math.sqrt(0.25 / 4000)


def test_a_row_too_long_for_the_budget_is_refused_wherever_it_lies() -> None:
    store = ListStore([([1, 5], [(1, 2)]), ([1] * 70, [(1, 70)])])
    for make, (budget, fits) in product(
        (lambda n: MicroBatches([store], mix(everything(store), seed=0), seed=0, batch_size_tokens=n),
         lambda n: EvaluationBatches(everything(store)[0], batch_size_tokens=n)),
        ((127, False), (128, True)),
    ):  # fmt: skip
        if fits:
            make(budget)
        else:
            with pytest.raises(UserError, match=r"longest row of dataset 'turns', which has 70 tokens \(128 padded"):
                make(budget)


def test_the_preview_counts_the_rows_own_tokens_and_targets() -> None:
    store = ListStore([([5, 6, 7, 8], [(2, 4)]), ([5] * 70, [(1, 70)])])
    backend = helpers_data.tokenizer()
    lines = preview(MicroBatches([store], Mixture(lambda epoch: np.array([[0, 0]])), seed=0), backend, 1)
    assert lines[0] == "row 1: no. 0 of 'turns', 4 tokens, 2 of them predicted, 60 padding, documents: 1"
    assert lines[2].endswith("⟦60 × padding⟧")
