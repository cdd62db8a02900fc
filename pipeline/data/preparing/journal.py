"""Keeps what is expensive to make while a dataset is prepared, so that a preparation that was killed goes on where it was.

Takes entries (facts as JSON, token ids) in order and, now and then, the place in the files up to which they reach; gives them
back at the next start. A part is `N.arrow` with its entries and `N.json` with the place, which is written last: a part without
it was not finished and is written anew. The rows themselves are put together from the beginning each time, which is quick.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.arrow_files import ArrowFile, numbers, opened
from pipeline.files import write_json

PART_IDS = 2**22  # token ids, after which a part ends: some seconds of work
BATCH_IDS = 2**20  # in memory
_SCHEMA = pa.schema([("facts", pa.string()), ("ids", pa.list_(pa.int32()))])

Entry = tuple[Any, NDArray[np.int32]]


class Journal:
    """The journal of the dataset that is prepared at `path` of a cache; its folder appears with the first part.

    First `kept`, to its end; then `add` and `reached`; `clear` when all is done. Hold the cache's lock.
    """

    def __init__(self, path: Path) -> None:
        dataset = path.name.rsplit("-", 1)[0]
        self._folder = path.with_name(f".parts-{path.name}")
        for other in path.parent.glob(f".parts-{dataset}-*"):
            if other != self._folder:  # of the same dataset as it was before its files or settings changed
                shutil.rmtree(other, ignore_errors=True)
        self._number = 0
        self._part: ArrowFile | None = None
        self._pending: list[Entry] = []
        self._pending_ids = self._part_ids = 0
        self.place: Any = None  # up to which the entries reach that were kept

    def kept(self) -> Iterator[Entry]:
        """The entries of an earlier preparation. Then `place` is where to go on, None for the beginning."""
        while (facts := self._folder / f"{self._number}.json").is_file():
            place = json.loads(facts.read_text(encoding="utf-8"))
            entries = opened(self._folder / f"{self._number}.arrow")
            for number in range(entries.num_record_batches):
                batch = entries.get_batch(number)
                for text, ids in zip(batch.column(0), batch.column(1), strict=True):
                    yield json.loads(text.as_py()), numbers(ids.values)
            self._number, self.place = self._number + 1, place

    def add(self, facts: Any, ids: NDArray[np.int32]) -> None:
        """The next entry."""
        self._pending.append((facts, ids))
        self._pending_ids += len(ids)
        self._part_ids += len(ids)
        if self._pending_ids >= BATCH_IDS:
            self._write()

    def reached(self, place: Any) -> None:
        """All entries so far reach up to `place` of the files (JSON): a part may end here."""
        if self._part_ids < PART_IDS:
            return
        self._write()
        assert self._part is not None
        self._part.close()
        write_json(self._folder / f"{self._number}.json", place)
        self._number, self._part, self._part_ids = self._number + 1, None, 0

    def clear(self) -> None:
        """The dataset is whole."""
        self.let_go()
        shutil.rmtree(self._folder, ignore_errors=True)

    def let_go(self) -> None:
        """Close what is open, as it is."""
        if self._part is not None:
            self._part.let_go()

    def _write(self) -> None:
        if not self._pending:
            return
        if self._part is None:
            self._folder.mkdir(exist_ok=True)
            self._part = ArrowFile(self._folder / f"{self._number}.arrow", _SCHEMA)
        facts = pa.array([json.dumps(entry, ensure_ascii=False) for entry, _ in self._pending], pa.string())
        ends = np.cumsum([0, *(len(ids) for _, ids in self._pending)], dtype=np.int32)
        lists = pa.ListArray.from_arrays(ends, pa.array(np.concatenate([ids for _, ids in self._pending]), pa.int32()))
        self._part.write([facts, lists])
        self._pending, self._pending_ids = [], 0
