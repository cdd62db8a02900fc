"""Rows packed into rows of one length: each once, as full as can be, and with the loss and gradients of each alone."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.console import UserError
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.row_store import RowStore
from pipeline.data.rows.apart import ApartChunks
from pipeline.data.rows.packing import PackedRows, best_fit
from pipeline.data.selection import Selection
from pipeline.data.store import ChunkStore, ChunkWriter, Marks
from pipeline.model.structure.build import logit_transform
from tests.helpers.builders import model_config, save_model
from tests.helpers.row_store import ListStore, stores
from tests.helpers.stages import chain, hidden


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
        assert len(ids) == rows.lengths[row] <= room == rows.width
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
        assert len(ids) == documents[-1].end
        assert rows.reaches[row] == max(span.end - span.start for span in documents)
        assert not any(place >= documents[-1].end for place in trained)
    assert sorted(seen) == sorted(f"{number}.txt" for number in range(len(store)))
    assert rows.targets.sum() == store.targets.sum()


@settings(max_examples=25, deadline=None)
@given(store=stores, room=st.integers(2, 200), apart=st.booleans())
def test_a_stream_is_its_rows_one_after_the_other(store: ListStore, room: int, apart: bool) -> None:
    rows = PackedRows(Selection(store, np.arange(len(store))), room, "stream", apart)
    total = int(store.lengths.sum())
    assert len(rows) == math.ceil(total / room)
    ids = np.concatenate([rows.ids(row) for row in range(len(rows))])
    assert ids.tolist() == [id for own, _ in store.rows for id in own]
    begun = np.cumsum([0, *store.lengths]).tolist()
    starts = {*begun[:-1], *range(0, total, room)}
    wanted = {begun[n] + place for n, (_, runs) in enumerate(store.rows) for a, b in runs for place in range(a, b)}
    trained = [room * row + place for row in range(len(rows)) for a, b in rows.spans(row) for place in range(a, b)]
    assert trained == sorted(wanted - starts)  # what begins a row without what was before it is predicted by nothing
    assert rows.targets.tolist() == [sum(b - a for a, b in rows.spans(row)) for row in range(len(rows))]
    found = [room * row + place for row in range(len(rows)) for place in rows.restarts(row)]
    padding = {total} if total < room * len(rows) else set()
    assert found == (sorted(starts | padding) if apart else list(range(0, total, room)))
    assert rows.cut == sum(a // room != (b - 1) // room for a, b in itertools.pairwise(begun))
    documents = [(room * row + d.start, d) for row in range(len(rows)) for d in rows.documents(row)]
    assert sorted(starts) == [place for place, _ in documents]
    assert [d.continued for _, d in documents] == [place not in begun for place, _ in documents]
    assert sum(d.end - d.start for _, d in documents) == total


def test_whether_rows_are_kept_apart_is_known_by_the_hash() -> None:
    chosen = Selection(ListStore([([5] * length, [(1, length)]) for length in (9, 7, 5, 3)]), np.arange(4))
    kinds: Any = itertools.product(("best_fit", "stream"), (True, False))
    assert len({PackedRows(chosen, 12, *kind).content_hash for kind in kinds}) == 4


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


def step(store: RowStore, model: torch.nn.Module, **size: Any) -> tuple[Tensor, list[Tensor]]:
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


class Stages(torch.nn.Module):
    """The model in `folder` in stages cut at `cuts`, in fp64, its layers trained; called as the whole is."""

    def __init__(self, folder: Path, cuts: list[int]) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(chain(folder, cuts, torch.float64))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".layers." in name)

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        stages: list[Any] = list(self.stages)
        raw = stages[-1].head(hidden(stages, input_ids, position_ids))
        return SimpleNamespace(logits=logit_transform(stages[-1].model.config).apply(raw))


@pytest.mark.parametrize("cuts", [pytest.param([0, 4], marks=SLOW), pytest.param([0, 2, 4], marks=SLOW), [0, 1, 3, 4]])
def test_packed_documents_have_their_loss_and_gradients_on_stages(tmp_path: Path, cuts: list[int]) -> None:
    save_model(tmp_path, "cohere2")
    store = drawn(64)
    loss, gradients = step(store, Stages(tmp_path, [0, 4]), micro_batch_size=1)
    packed_loss, packed_gradients = step(packed(store, 96), Stages(tmp_path, cuts), micro_batch_size=2)
    assert abs(packed_loss - loss) < 1e-6 * loss
    assert len(gradients) == len(packed_gradients) > 4 * 7
    for one, other in zip(gradients, packed_gradients, strict=True):  # by layer, in order
        assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp_min(1e-3)


def parts(store: RowStore) -> ListStore:
    """What restarts in a row, as a row by itself: nothing else is seen from it."""
    found = []
    for row in range(len(store)):
        edges = [start for start in store.restarts(row) if start < store.lengths[row]] + [int(store.lengths[row])]
        for a, b in itertools.pairwise(edges):
            runs = [(max(first, a) - a, min(end, b) - a) for first, end in store.spans(row)]
            found.append((store.ids(row)[a:b].tolist(), [run for run in runs if run[0] < run[1]]))
    return ListStore(found)


def books(folder: Path, bos: bool) -> Path:
    """A store of documents of 3 to 60 tokens in chunks of 48."""
    draw = random.Random(1)
    writer = ChunkWriter(folder / "store", "book", "all", 48, Marks(1 if bos else None, 2, None, ()))
    lengths = [
        47,
        *(draw.randint(3, 60) for _ in range(14)),
    ]  # with its EOS the first fills a chunk, or goes one beyond
    for number, length in enumerate(lengths):
        writer.add(f"{number}.txt", np.array([draw.randint(3, 60) for _ in range(length)], np.int32), last=True)
    writer.close()
    return folder / "store"


@pytest.mark.parametrize("bos", [True, False])
def test_documents_of_a_chunk_are_kept_apart(tmp_path: Path, bos: bool) -> None:
    folder = books(tmp_path, bos)
    plain, apart = ChunkStore(folder), ApartChunks(folder)
    assert plain.content_hash != apart.content_hash
    assert len(plain) == len(apart) > 5
    for chunk in range(len(apart)):
        assert (apart.ids(chunk) == plain.ids(chunk)).all()
        # A document begins behind EOS; one that begins right behind the chunk's BOS has that as its own.
        begins = [place + 1 for place in np.flatnonzero(apart.ids(chunk)[:-1] == apart.eos).tolist()]
        assert apart.restarts(chunk) == [0, *begins]
        trained = [place for a, b in apart.spans(chunk) for place in range(a, b)]
        assert trained == sorted(set(range(1, 48)) - set(begins))
        assert apart.targets[chunk] == len(trained)
        assert plain.restarts(chunk) == [0]
        assert plain.targets[chunk] == 47
        assert apart.reaches[chunk] == max(b - a for a, b in itertools.pairwise([0, *begins, 48]))


@pytest.mark.parametrize("kind", ["cohere2", pytest.param("llama", marks=SLOW), pytest.param("gemma2", marks=SLOW)])
def test_a_cut_stream_and_books_have_the_loss_and_gradients_of_their_parts_alone(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(kind)).double().eval()
    drawn_rows = drawn(24)
    stream = PackedRows(Selection(drawn_rows, np.arange(24)), 50, "stream")
    assert stream.cut > 5
    for store in (stream, ApartChunks(books(tmp_path, bos=True))):
        loss, gradients = step(parts(store), model, micro_batch_size=1)
        packed_loss, packed_gradients = step(store, model, micro_batch_size=2)
        assert abs(packed_loss - loss) < 1e-6 * loss
        for one, other in zip(gradients, packed_gradients, strict=True):
            assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("kind", ["longrope", pytest.param("dynamic", marks=SLOW)])
@pytest.mark.parametrize("size", [{"micro_batch_size": 3}, {"batch_size_tokens": 256}])
def test_no_row_has_its_rotary_embedding_from_another(kind: str, size: dict[str, int]) -> None:
    """Rows on both sides of 32 tokens, where the embedding changes; padded beyond it, packed, and each alone.

    'dynamic' goes by the longest row's own length, so that of longer ones all have one; and in transformers it does not come
    back to its first form for a row of 32 exactly.
    """
    factors = (
        {"long_factor": [3.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 32}
        if kind == "longrope"
        else {"factor": 2.0}
    )
    rope = {"rope_type": kind, "rope_theta": 10000.0, **factors}
    lengths = [5, 12, 40, 9, 31, 32 if kind == "longrope" else 30, 40, 20, 40, 7, 3, 28]
    draw = random.Random(3)
    rows = [([draw.randint(3, 60) for _ in range(n)], [(1, n)]) for n in lengths]

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        config = model_config("llama", rope_parameters=rope, max_position_embeddings=32, initializer_range=0.3)
        return AutoModelForCausalLM.from_config(config).double().eval()

    total, loss, gradients = sum(n - 1 for n in lengths), torch.zeros((), dtype=torch.float64), list[Tensor]()
    for length, row in zip(lengths, rows, strict=True):
        own, theirs = step(ListStore([row]), fresh(), micro_batch_size=1)  # one row: nothing is padded
        share = (length - 1) / total
        loss = loss + share * own
        gradients = [share * g + sum for g, sum in zip(theirs, gradients or [0] * len(theirs), strict=True)]
    store = ListStore(rows)
    best = PackedRows(Selection(store, np.arange(len(store))), 128, switch=32)
    assert [any(lengths[m] > 32 for m in members) for members in members_of(best)].count(True) == 1
    for rows_of, how in ((store, size), (best, {"micro_batch_size": 1})):
        found, their_gradients = step(rows_of, fresh(), switch=32, **how)
        assert abs(found - loss) < 1e-6 * loss
        for one, other in zip(gradients, their_gradients, strict=True):
            assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp_min(1e-3)
    off, _ = step(store, fresh(), **size)
    assert abs(off - loss) > 1e-3 * loss  # it is no small thing
    with pytest.raises(UserError, match="set micro_batch_size_per_gpu = 1"):
        step(best, fresh(), switch=32, micro_batch_size=2)


def members_of(rows: PackedRows) -> list[list[int]]:
    return [[int(d.name.removesuffix(".txt")) for d in rows.documents(row)] for row in range(len(rows))]


def test_a_step_counts_the_tokens_of_packed_rows_without_their_padding() -> None:
    store = drawn(24)
    rows = packed(store, 96)
    batches = MicroBatches([rows], mix([Selection(rows, np.arange(len(rows)))], seed=0), seed=0)
    position, tokens = Position(), 0
    while not position.epoch:
        (batch,), info = batches.step(position)
        assert batch.input_ids.shape == (1, 96)
        assert (batch.input_ids[0, int(batch.lengths) :] == store.eos).all()
        assert info.tokens == int(batch.lengths)
        position, tokens = info.next_position, tokens + info.tokens
    assert tokens == store.lengths.sum()
