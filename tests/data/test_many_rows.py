"""A dataset of three million rows: how many of them are read to plan epochs and steps, and how many files are opened."""

import sys
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
FACTS = {"name": "rows", "bos": 1, "eos": 2, "kind": "completion", "read": ROWS}
opened: Counter[str] | None = None


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and str(arguments[0]).endswith((".arrow", ".json")):
        opened[Path(str(arguments[0])).name] += 1


sys.addaudithook(note)  # which stays as long as the process: it does nothing where nobody counts


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
    global opened
    opened = Counter()
    try:
        store = Counted(folder)
        chosen = split(Streams(store), eval_size=1000)
        batches = MicroBatches(
            [store], mix([chosen.train], seed=1), seed=1, gradient_accumulation_steps=4, dp_rank=1, dp_world=2, **size
        )
        batches.order_hash(0)
        half = Position(0, 0)
        for _ in range(3):
            half = batches.info(half).next_position
        assert batches.steps_to_come(half, 2) > ROWS / 64
    finally:
        found, opened = opened, None
    assert not store.read, "lengths and targets are arrays"
    assert sum(found.values()) <= 4, found
    for _ in range(3):
        store.read.clear()
        micro_batches, info = batches.step(half)
        own = {row[1] for batch in micro_batches for row in batch.rows if row}
        assert set(store.read) == own, "this replica's rows of the step, and no others"
        assert max(store.read.values()) <= 2, "the ids, and where the targets are"
        half = info.next_position
