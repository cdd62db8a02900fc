"""Rows packed into rows of one length: each once, as full as can be, and with the loss and gradients of each alone."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.rows.packing import PackedRows, best_fit
from pipeline.data.selection import Selection
from tests.helpers.builders import model_config
from tests.helpers.row_store import ListStore, stores


@settings(max_examples=100, deadline=None)
@given(room=st.integers(1, 200), data=st.data())
def test_best_fit_is_best_fit(room: int, data: st.DataObject) -> None:
    """Oracle: the longest first, each into the row where it leaves the least room, by looking at all rows."""
    lengths = data.draw(st.lists(st.integers(1, room), max_size=60))
    rows = best_fit(lengths, room)
    assert Counter(place for row in rows for place in row) == Counter(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= room for row in rows)
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in free if left >= length]
        if fitting:
            free.remove(min(fitting))
        free.append((min(fitting) if fitting else room) - length)
    assert sorted(room - sum(lengths[place] for place in row) for row in rows) == sorted(free)


def test_chats_are_packed_full() -> None:
    """Log-normal lengths of median 700, as chats have them."""
    draw = random.Random(0)
    for room in (2048, 8192):
        lengths = [min(room, max(8, int(draw.lognormvariate(math.log(700), 0.9)))) for _ in range(4000)]
        rows = best_fit(lengths, room)
        assert sum(lengths) / (len(rows) * room) > 0.99


SLOW = pytest.mark.slow


def packed(store: ListStore, room: int) -> PackedRows:
    return PackedRows(Selection(store, np.arange(len(store))), room)


@settings(max_examples=25, deadline=None)
@given(store=stores, more=st.integers(0, 200))
def test_a_packed_row_is_its_rows(store: ListStore, more: int) -> None:
    room = int(store.lengths.max()) + more
    rows = packed(store, room)
    seen: list[str] = []
    for row in range(len(rows)):
        ids, starts = rows.ids(row), rows.restarts(row)
        trained = {place for a, b in rows.spans(row) for place in range(a, b)}
        assert len(ids) == room == rows.lengths[row]
        assert len(trained) == rows.targets[row]
        documents = rows.documents(row)
        assert starts == [span.start for span in documents] + ([documents[-1].end] if documents[-1].end < room else [])
        for span in documents:
            number = int(span.name.removesuffix(".txt"))
            own, runs = store.rows[number]
            assert ids[span.start : span.end].tolist() == own
            assert {place - span.start for place in trained if span.start <= place < span.end} == {
                place for a, b in runs for place in range(a, b)
            }
            assert span.start not in trained  # nothing before it predicts it
            seen.append(span.name)
        assert (ids[documents[-1].end :] == store.eos).all()
        assert not any(place >= documents[-1].end for place in trained)
    assert sorted(seen) == sorted(f"{number}.txt" for number in range(len(store)))
    assert rows.targets.sum() == store.targets.sum()


def test_the_order_and_content_are_known_by_the_hash() -> None:
    store = ListStore([([5] * length, [(1, length)]) for length in (9, 7, 5, 3)])
    assert packed(store, 12).content_hash == packed(store, 12).content_hash
    assert packed(store, 12).content_hash != packed(store, 13).content_hash
    assert packed(store, 12).content_hash != PackedRows(Selection(store, np.array([0, 1, 2])), 12).content_hash


def drawn(count: int) -> ListStore:
    draw, rows = random.Random(3), []
    for _ in range(count):
        length = draw.randint(2, 40)
        a, b = sorted((draw.randint(1, length - 1), draw.randint(1, length)))
        rows.append(([draw.randint(3, 60) for _ in range(length)], [(a, max(b, a + 1))]))
    return ListStore(rows)


def step(store: ListStore | PackedRows, model: torch.nn.Module, **size: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step over all rows, as the pipeline weighs them."""
    rows = [Selection(store, np.arange(len(store)))]
    batches = MicroBatches([store], mix(rows, seed=0), seed=0, gradient_accumulation_steps=len(store), **size)
    micro_batches, info = batches.step(Position())
    assert info.next_position.epoch == 1
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss = losses * batch.loss_scale / len(micro_batches)
        loss.backward()
        total += loss.detach()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["cohere2", pytest.param("llama", marks=SLOW), pytest.param("gemma2", marks=SLOW)])
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(kind)).double().eval()
    store = drawn(64 if kind == "llama" else 24)
    loss, gradients = step(store, model, micro_batch_size=1)
    for size in (1, 2):
        packed_loss, packed_gradients = step(packed(store, 96), model, micro_batch_size=size)
        # fp64, but masks, RoPE and the like are computed in fp32 (2⁻²³) by some families.
        assert abs(packed_loss - loss) < 1e-6 * loss
        for one, other in zip(gradients, packed_gradients, strict=True):
            assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp_min(1e-3)
