"""Two streams of rows as units: every row of the longer one once an epoch, each stream shuffled by itself."""

from collections import Counter

import numpy as np
import pytest

from pipeline.console import UserError
from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.row_store import IGNORED
from pipeline.data.selection import Selection
from pipeline.data.units.streams import Pairs, paired
from tests.helpers.row_store import ListStore, Row


def rows(first: int, count: int) -> list[Row]:
    """Rows that begin with their own number."""
    return [([first + n, *range(3, 3 + n % 4 + 2)], [(1, n % 4 + 3)]) for n in range(count)]


def chosen(first: int, count: int, name: str, some: list[int] | None = None) -> Selection:
    store = ListStore(rows(first, count), name=name)
    return Selection(store, np.arange(count) if some is None else np.array(some))


def firsts(units: Selection, slot: int) -> list[int]:
    store = units.store.slots[slot]
    return [int(store.ids(int(row))[0]) for row in units.rows]


def test_the_shorter_stream_begins_again_and_of_each_only_chosen_rows_come() -> None:
    units = paired({
        "breaker": [chosen(100, 5, "bad")],
        "retain": [chosen(200, 9, "chats", [0, 2, 4, 6]), chosen(300, 8, "books")],
    })  # fmt: skip
    assert len(units) == 12
    breaker, retain = firsts(units, 0), firsts(units, 1)
    assert sorted(retain) == [200, 202, 204, 206, *range(300, 308)]
    assert set(breaker) == set(range(100, 105))
    assert set(Counter(breaker).values()) == {2, 3}
    assert retain != sorted(retain)
    store = units.store
    assert isinstance(store, Pairs)
    assert [slot.name for slot in store.slots] == ["bad, breaker", "chats, books, retain"]
    for unit in range(len(store)):
        one, other = (slot.ids(unit) for slot in store.slots)
        assert store.lengths[unit] == max(len(one), len(other))
        assert store.targets[unit] == len(one) + len(other) - 2
        assert [span.name for span in store.documents(unit)] == [f"{one[0] - 100}.txt", f"{other[0] % 100}.txt"]
    other_rows = paired({"breaker": [chosen(100, 5, "bad")], "retain": [chosen(200, 12, "chats")]})
    assert other_rows.store.content_hash != store.content_hash


def test_a_micro_batch_holds_both_streams_and_all_units_come_once() -> None:
    units = paired({"breaker": [chosen(100, 7, "bad")], "retain": [chosen(200, 3, "chats")]})
    batches = MicroBatches(
        [units.store], mix([units], seed=1), seed=1, micro_batch_size=2, gradient_accumulation_steps=2
    )
    seen, position = list[int](), Position()
    while position.epoch == 0:
        micro, info = batches.step(position)
        for batch in micro:
            real = sum(row is not None for row in batch.rows)
            by_slot = batch.input_ids.view(2, len(batch.rows), -1)
            assert all(100 <= row[0] < 200 <= other[0] for row, other in zip(*by_slot[:, :real], strict=True))
            seen += by_slot[0, :real, 0].tolist()
            marks = batch.tensors()["marks"]
            assert ((marks & 2 != 0) == (batch.labels != IGNORED)).all()
            assert ((marks & 1).sum(1) == batch.lengths).all()
        position = info.next_position
    assert sorted(seen) == list(range(100, 107))


def test_a_stream_without_rows_is_refused() -> None:
    with pytest.raises(UserError, match="there is no row of stream = 'retain'"):
        paired({"breaker": [chosen(100, 5, "bad")]})
