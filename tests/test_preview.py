"""The preview: what it shows is the text of the rows that are trained on first, with every boundary where it is."""

import re
from pathlib import Path
from typing import Any

import helpers_data
import numpy as np
import pytest
from helpers_data import prose, tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import chunks
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixture import mix
from pipeline.data.preview import preview
from pipeline.data.split import Rows, split


def loader(
    tmp_path: Path, texts: dict[str, str], lengths: tuple[int, ...], bos: bool = True, **options: Any
) -> MicroBatches:
    """Micro-batches of the texts, once for each row length."""
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sets = []
    for length in lengths:
        streams = chunks.build(
            name=f"set{length}", dataset_type="textfile", dataset_path=str(tmp_path / "*.txt"), sequence_len=length,
            tokenizer=tokenizer("gpt2", bos), cache_dir=tmp_path / "cache",
        )  # fmt: skip
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
    lines = preview(MicroBatches([store], mix([Rows(store, np.array([1]))], seed=0), seed=0), backend, 3)
    end_of_a, start_of_c = backend.decode(ids["a.txt"][-2:]), backend.decode(ids["c.txt"][:2])
    assert [*lines[:2], "\n".join(lines[2:-1]), lines[-1]] == [
        f"row 1: chunk 1 of 'books', {body + 1} tokens, {body} of them predicted, 0 padding, documents: 3",
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
        assert plain == tokenizer().decode(store[row[1]].tolist(), skip_special_tokens=True)
        assert text.count("⟦BOS") == bos and text.count("⟦EOS") == (store[row[1]] == 2).sum()
        assert re.findall(r"⟦(?:… )?(\d\.txt)⟧", text) == [span.name for span in store.spans(row[1])]
        padding = width - store.sequence_len
        assert text.endswith(f"⟦{padding} × padding⟧") == (padding > 0)


def test_eos_is_marked_as_such_where_it_is_bos_too(tmp_path: Path) -> None:
    """GPT-2's tokenizer has one id for both."""
    backend = helpers_data.tokenizer.__wrapped__("gpt2")
    backend.bos_token = backend.eos_token
    (tmp_path / "a.txt").write_text("roka")
    (tmp_path / "b.txt").write_text("linmo " * 9)
    streams = chunks.build(
        name="one", dataset_type="textfile", dataset_path=str(tmp_path / "*.txt"), sequence_len=12,
        tokenizer=backend, cache_dir=tmp_path,
    )  # fmt: skip
    rows = Rows(streams.train, np.array([0]))
    text = preview(MicroBatches([streams.train], mix([rows], seed=0), seed=0), backend, 1)[2]
    assert text.startswith("⟦BOS </s>⟧⟦a.txt⟧roka⟦EOS </s>⟧⟦b.txt⟧linmo linmo")
