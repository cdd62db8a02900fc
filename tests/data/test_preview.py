"""Which rows a run trains on: split, mixed (both against Hugging Face's datasets), and shown by the preview."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.data import chunks
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import interleave, mix
from pipeline.data.preview import preview
from pipeline.data.selection import Selection, split
from pipeline.data.selection import whole as whole_rows
from pipeline.data.store import ChunkStore
from tests.helpers import data as helpers_data
from tests.helpers.data import build, prose, shelve, tokenizer, whole

FAST = settings(max_examples=60, deadline=None)


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return shelve(tmp_path / "shelf", *(prose(60 + 40 * i, seed=i) for i in range(10)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[ChunkStore]:
    """Stores of 24 chunks, each of another length."""
    folder = tmp_path_factory.mktemp("stores")
    return [helpers_data.store(folder / str(length), length, 24, f"set{length}") for length in (33, 64, 65, 130)]


# The preview


def loader(
    tmp_path: Path, texts: dict[str, str], lengths: tuple[int, ...], bos: bool = True, **options: Any
) -> MicroBatches:
    """Micro-batches of the texts, once for each row length."""
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sets = []
    for length in lengths:
        streams = chunks.build(
            name=f"set{length}",
            dataset_type="textfile",
            dataset_path=str(tmp_path / "*.txt"),
            sequence_len=length,
            tokenizer=tokenizer("gpt2", bos),
            cache_dir=tmp_path / "cache",
        )
        sets.append(split(streams).train)
    return MicroBatches([rows.store for rows in sets], mix(sets, seed=1), seed=1, **options)


def test_a_row_with_all_its_boundaries(tmp_path: Path) -> None:
    """One document's middle, another whole, and the beginning of a third, as they stand in one chunk."""
    backend = tokenizer()
    texts = {"a.txt": "roka linmo\nber", "b.txt": "“ka”", "c.txt": "thé fo"}
    ids = {name: backend(text, add_special_tokens=False)["input_ids"] for name, text in texts.items()}
    first = len(ids["a.txt"]) - 2
    # Chunk 0 is all of a.txt but its last two ids; chunk 1 has them, its EOS, b.txt with EOS, and two ids of c.txt.
    folder = tmp_path / "store"
    body = len(ids["b.txt"]) + 6
    stream = [7] * (body - first) + ids["a.txt"]
    writer = helpers_data.ChunkWriter(folder, "books", "all", body + 1, helpers_data.MARKS)
    for name, content in {"a.txt": stream, "b.txt": ids["b.txt"], "c.txt": ids["c.txt"] + [9] * body}.items():
        writer.add(name, np.array(content, dtype=np.int32), True)
    writer.close()
    store = helpers_data.ChunkStore(folder)
    lines = preview(MicroBatches([store], mix([Selection(store, np.array([1]))], seed=0), seed=0), backend, 3)
    end_of_a, start_of_c = backend.decode(ids["a.txt"][-2:]), backend.decode(ids["c.txt"][:2])
    assert [*lines[:2], "\n".join(lines[2:-1]), lines[-1]] == [
        f"row 1: no. 1 of 'books', {body + 1} tokens, {body} of them predicted, 0 padding, documents: 3",
        "─" * len(lines[0]),
        f"⟦BOS <s>⟧⟦… a.txt⟧{end_of_a}⟦EOS </s>⟧⟦b.txt⟧“ka”⟦EOS </s>⟧⟦c.txt⟧{start_of_c}",
        "",
    ]


@pytest.mark.parametrize("bos", [True, False])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(0, 12), micro_batch_size=st.integers(1, 4), gas=st.integers(1, 3))
def test_without_its_marks_a_row_is_its_text(
    tmp_path: Path, bos: bool, count: int, micro_batch_size: int, gas: int
) -> None:
    texts = {f"{i}.txt": prose(40, seed=i) for i in range(4)}
    batches = loader(
        tmp_path, texts, (50, 100), bos, micro_batch_size=micro_batch_size, gradient_accumulation_steps=gas
    )
    lines = preview(batches, tokenizer("gpt2", bos), count)
    heads = [place for place, line in enumerate(lines) if re.fullmatch("─+", line)]
    ends = [*heads[1:], len(lines) + 1]
    shown = ["\n".join(lines[head + 1 : end - 2]) for head, end in zip(heads, ends, strict=False)]
    trained, position = [], Position()
    while position.epoch == 0:
        step, info = batches.step(position)
        trained += [(row, batch.input_ids.shape[1]) for batch in step for row in batch.rows if row]
        position = info.next_position
    assert len(shown) == min(count, len(trained))
    for text, (row, width) in zip(shown, trained, strict=False):
        store = batches.stores[row[0]]
        plain = re.sub(r"⟦[^⟧]*⟧", "", text)
        assert plain == tokenizer().decode(store.ids(row[1]).tolist(), skip_special_tokens=True)
        assert text.count("⟦BOS") == bos
        assert text.count("⟦EOS") == (store.ids(row[1]) == 2).sum()
        assert re.findall(r"⟦(?:… )?(\d\.txt)⟧", text) == [span.name for span in store.documents(row[1])]
        padding = width - store.sequence_len
        assert text.endswith(f"⟦{padding} × padding⟧") == (padding > 0)


def test_eos_is_marked_as_such_where_it_is_bos_too(tmp_path: Path) -> None:
    """GPT-2's tokenizer has one id for both."""
    backend = helpers_data.tokenizer.__wrapped__("gpt2")
    backend.bos_token = backend.eos_token
    (tmp_path / "a.txt").write_text("roka")
    (tmp_path / "b.txt").write_text("linmo " * 9)
    streams = chunks.build(
        name="one",
        dataset_type="textfile",
        dataset_path=str(tmp_path / "*.txt"),
        sequence_len=12,
        tokenizer=backend,
        cache_dir=tmp_path,
    )
    rows = Selection(streams.train, np.array([0]))
    text = preview(MicroBatches([streams.train], mix([rows], seed=0), seed=0), backend, 1)[2]
    assert text.startswith("⟦BOS </s>⟧⟦a.txt⟧roka⟦EOS </s>⟧⟦b.txt⟧linmo linmo")


# The split


@pytest.mark.parametrize("eval_size", [0.01, 0.25, 0.9, 1, 7])
@pytest.mark.parametrize("subsample", [None, 0.3, 1.0])
def test_the_split_by_chunk_is_hugging_faces(shelf: Path, eval_size: float, subsample: float | None) -> None:
    streams = build(shelf)
    rows = datasets.Dataset.from_dict({"chunk": list(range(len(streams.train)))})
    expected = rows.train_test_split(test_size=eval_size, shuffle=True, seed=42)
    parts = {name: part.shuffle(seed=42) for name, part in expected.items()}
    if subsample:
        parts = {name: part.select(range(int(len(part) * subsample))) for name, part in parts.items()}
    if not all(len(part) for part in parts.values()):
        with pytest.raises(UserError, match=r"subsample = 0\.3 of \d+ rows leaves none"):
            split(streams, eval_size, subsample)
        return
    found = split(streams, eval_size, subsample)
    assert found.eval is not None
    assert found.train.rows.tolist() == sorted(parts["train"]["chunk"])
    assert found.eval.rows.tolist() == sorted(parts["test"]["chunk"])


def test_whole_documents_are_held_out(shelf: Path) -> None:
    streams = build(shelf, eval_size=0.25, eval_split="document")
    assert streams.eval is not None
    found = split(streams, 0.25, num_repeats=2)
    assert found.train.of_epoch(3).tolist() == list(range(len(streams.train))) * 2
    assert found.eval is not None
    assert found.eval.store is streams.eval
    assert [report.stream for report in (store.report for store in streams.stores)] == ["train", "eval"]
    sides = [
        {span.name for chunk in range(len(s)) for span in s.documents(chunk)} for s in (streams.train, streams.eval)
    ]
    assert len(sides[0]) == 7
    assert len(sides[1]) == 3
    assert not sides[0] & sides[1]
    held_out = [[*whole("gpt2", (shelf / name).read_text()), 2] for name in sorted(sides[1])]
    stream = [id for ids in held_out for id in ids]
    body = np.concatenate([streams.eval.ids(chunk)[1:] for chunk in range(len(streams.eval))])
    assert body.tolist() == stream[: len(body)]
    assert streams.eval.report.tail_tokens == len(stream) - len(body)
    assert streams.train.report.documents == 7


def test_documents_of_a_list_can_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": prose(60, seed=i)}) + "\n" for i in range(6)))
    rows = {"dataset_type": "doclist", "dataset_path": str(tmp_path / "a.jsonl")}
    streams = build(tmp_path, eval_size=2, eval_split="document", **rows)
    assert streams.eval is not None
    assert (streams.train.report.documents, streams.eval.report.documents) == (4, 2)


def test_a_split_that_leaves_one_side_empty_is_refused(shelf: Path) -> None:
    streams = build(shelf)
    count = len(streams.train)
    for eval_size, message in (
        (count, f"would hold out {count} of {count} chunks and leave 0 to train on"),
        (count + 1, f"would hold out {count + 1} of {count} chunks and leave 0 to train on"),
        (-1, "would hold out -1"),
        (1.5, "must be 0, a part below 1, or a whole number of chunks"),
    ):
        with pytest.raises(UserError, match=message):
            split(streams, eval_size)
    for subsample in (0.0, 1.01):
        with pytest.raises(UserError, match="must be greater than 0 and at most 1"):
            split(streams, 0, subsample)
    assert whole_rows(streams).rows.tolist() == list(range(count))
    assert len(whole_rows(streams, 0.5)) == count // 2
    with pytest.raises(UserError, match=r"num_repeats = 0 of .* rows leaves none"):
        split(streams, num_repeats=0)
    with pytest.raises(UserError, match="would hold out 10 of 10 documents"):
        build(shelf, eval_size=10, eval_split="document")
    with pytest.raises(UserError, match="eval_split = 'page' is not known; use chunk or document"):
        build(shelf, eval_split="page")
    with pytest.raises(UserError, match="sequence_len = 2 leaves nothing to predict"):
        build(shelf, sequence_len=2)
    with pytest.raises(UserError, match=r"1 documents held for 'eval' give \d+ tokens, fewer than the 2,999"):
        build(shelf, sequence_len=3000, eval_size=1, eval_split="document")


# Mixtures


@FAST
@given(
    sizes=st.lists(st.integers(1, 24), min_size=2, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    strategy=st.sampled_from(["first_exhausted", "all_exhausted"]),
    seed=st.integers(0, 2**32),
)
def test_interleaving_is_hugging_faces(sizes: list[int], weights: list[float], strategy: str, seed: int) -> None:
    chances = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
    sets = [datasets.Dataset.from_dict({"set": [index] * size}) for index, size in enumerate(sizes)]
    expected = datasets.interleave_datasets(sets, probabilities=chances.tolist(), seed=seed, stopping_strategy=strategy)
    assert interleave(np.array(sizes), chances, strategy, [seed]).tolist() == expected["set"][:]


@FAST
@given(st.data(), st.sampled_from(["first_exhausted", "all_exhausted"]), st.integers(0, 99))
def test_an_interleaved_epoch_takes_rows_in_turns_of_their_set(
    stores: list[ChunkStore], data: st.DataObject, strategy: str, seed: int
) -> None:
    counts = data.draw(st.lists(st.integers(1, 24), min_size=2, max_size=4))
    sets = [Selection(store, 23 - np.arange(count)) for store, count in zip(stores, counts, strict=False)]
    epoch_rows = mix(sets, seed=seed, mode="interleave", stopping_strategy=strategy)
    for epoch in (0, 1):
        seen = [Counter(chunk for index, chunk in epoch_rows(epoch).tolist() if index == i) for i in range(len(sets))]
        full = [len(times) == len(rows) for times, rows in zip(seen, sets, strict=True)]
        assert any(full) if strategy == "first_exhausted" else all(full)
        for times, rows in zip(seen, sets, strict=True):
            assert set(times) <= set(rows.rows.tolist())
            assert max(times.values(), default=0) - min(times.values(), default=0) <= 1  # none again before all were
            assert strategy == "all_exhausted" or max(times.values(), default=0) <= 1


def test_rows_that_one_epoch_leaves_out_come_in_another(stores: list[ChunkStore]) -> None:
    sets = [Selection(stores[0], np.arange(24)), Selection(stores[1], np.arange(3))]
    epoch_rows = mix(sets, seed=3, mode="interleave")
    seen = [{chunk for index, chunk in epoch_rows(epoch).tolist() if index == 0} for epoch in range(30)]
    assert max(map(len, seen)) < 24
    assert set().union(*seen) == set(range(24))


def test_weights_are_of_rows_or_of_tokens(stores: list[ChunkStore]) -> None:
    """Of n draws a share's standard deviation is √(p(1 − p)/n) ≤ √(¼/n); n is at least 9600, a whole set."""
    sets = [Selection(stores[0], np.tile(np.arange(24), 400)), Selection(stores[3], np.tile(np.arange(24), 400))]
    for weigh_tokens, expected in ((False, 0.75), (True, 3 / 33 / (3 / 33 + 1 / 130))):
        rows = mix(sets, seed=0, mode="interleave", weights=[3, 1], weigh_tokens=weigh_tokens)(0)
        assert abs((rows[:, 0] == 0).mean() - expected) < 4 * math.sqrt(0.25 / 9600)


def test_what_cannot_be_mixed_is_refused(stores: list[ChunkStore]) -> None:
    sets = [Selection(stores[0], np.arange(2)), Selection(stores[1], np.arange(2))]
    for options, message in (
        ({"mode": "stack"}, "dataset_combination_mode = 'stack' is not known; use one of: concatenate, interleave"),
        ({"stopping_strategy": "never"}, "dataset_interleave_stopping_strategy = 'never' is not known"),
        ({"mode": "interleave", "weights": [1, 0]}, "dataset 'set64': sample_weight = 0 must be a positive number"),
        ({"mode": "interleave", "weights": [1, float("nan")]}, "sample_weight = nan must be"),
    ):
        with pytest.raises(UserError, match=message):
            mix(sets, seed=0, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no rows to train on"):
        mix([], seed=0)
