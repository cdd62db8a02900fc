"""A dataset of three million rows: how many of them are read to plan epochs and steps, counted."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.batches import MicroBatches, Position
from pipeline.data.mixing import mix
from pipeline.data.rows.store import RowWriter, UnequalRows
from pipeline.data.selection import Streams, split

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROWS = 3_000_000
FACTS = {"name": "rows", "bos": 1, "eos": 2, "kind": "completion", "read": ROWS, "bad": 0, "duplicates": 0}


class Counted(UnequalRows):
    """A store that notes which rows are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: Counter[int] = Counter()

    def _item(self, column: int, row: int) -> Any:
        self.read[row] += 1
        return super()._item(column, row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("many") / "rows"
    writer = RowWriter(where, frozenset({2}))
    row = np.array([5, 6, 7, 2], dtype=np.int32)
    for number in range(ROWS):
        writer.add(row[number % 2 :], [(1, 3)], number, "a.jsonl")
    writer.close(**FACTS)
    return where


@pytest.mark.parametrize("size", [{"micro_batch_size": 2}, {"batch_size_tokens": 64}], ids=str)
def test_no_row_is_read_to_plan_and_a_step_reads_its_own(folder: Path, size: dict[str, int]) -> None:
    store = Counted(folder)
    chosen = split(Streams(store), eval_size=1000)
    batches = MicroBatches(
        [store], mix([chosen.train], seed=1), seed=1, gradient_accumulation_steps=4, dp_rank=1, dp_world=2, **size
    )
    batches.order_hash(0)
    place = Position(0, 0)
    for _ in range(3):
        place = batches.info(place).next_position
    assert batches.steps_to_come(place, 2) > ROWS / 64
    assert not store.read, "lengths and targets are arrays"
    for _ in range(3):
        store.read.clear()
        micro_batches, info = batches.step(place)
        own = {row[1] for batch in micro_batches for row in batch.rows if row}
        assert set(store.read) == own, "this replica's rows of the step, and no others"
        assert max(store.read.values()) <= 2, "the ids, and where the targets are"
        place = info.next_position
