"""Takes rows as they stand in their files, a few at a time; gives what was made of each, in the form in which it is kept.

This is the work of preparing that several processes share (preparing/workers.py) and that is not done twice
(preparing/journal.py), for rows as for units (units/prepared.py). What depends on the rows before, such as what is a duplicate,
is build.py's.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.chat.turns import Refused
from pipeline.data.preparing.journal import Entry, Journal
from pipeline.data.preparing.workers import in_order
from pipeline.data.reading import records
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.json_rows import Broken
from pipeline.data.reading.records import Record
from pipeline.data.reading.sources import Source
from pipeline.data.rows.makers import Maker
from pipeline.data.rows.store import Runs

AT_ONCE = 64  # rows of the files that are encoded together

Place = tuple[int, int]  # a file's number, and how many of its rows are done


@dataclass(frozen=True)
class Prepared:
    """What became of a row of a file: its rows of ids (int32 [length]) with runs of targets, or why it is bad.

    `digest`: of its content, None where it is no readable text. `size`: characters of that. `refused`: reason and remedy.
    """

    where: str
    digest: str | None
    size: int
    rows: list[tuple[NDArray[np.int32], Runs]]
    notes: dict[str, int]
    refused: tuple[str, str] | None = None

    def entry(self) -> Entry:
        """As a journal keeps it."""
        facts = [
            self.where,
            self.digest,
            self.size,
            [[len(ids), runs] for ids, runs in self.rows],
            self.notes,
            self.refused,
        ]
        return facts, np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in self.rows)])

    @classmethod
    def of(cls, entry: Entry) -> "Prepared":
        """As a journal kept it."""
        (where, digest, size, rows, notes, refused), ids = entry
        ends = list(itertools.accumulate(length for length, _ in rows))
        made = [
            (ids[end - length : end], [(first, last) for first, last in runs])
            for end, (length, runs) in zip(ends, rows, strict=True)
        ]
        return cls(where, digest, size, made, notes, None if refused is None else (refused[0], refused[1]))


class Kept(Protocol):
    """What a journal can keep of a row."""

    def entry(self) -> Entry:
        """As a journal keeps it."""

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """As a journal kept it."""


Of = TypeVar("Of", bound=Kept)
Work = Callable[[list[Record]], list[Of]]


def prepared(work: Work[Of], kind: type[Of], sources: list[Source], journal: Journal, processes: int) -> Iterator[Of]:
    """What becomes by `work` of every row of the files, in order: what the journal has, then the rest, which goes into it."""
    yield from map(kind.of, journal.kept())
    file, done = journal.place or (0, 0)
    places: list[Place] = []

    def batches() -> Iterator[list[Record]]:
        for batch, place in _batches(sources, file, done):
            places.append(place)
            yield batch

    for number, results in enumerate(in_order(work, batches(), processes)):
        for result in results:
            journal.add(*result.entry())
            yield result
        journal.reached(places[number])


def of_records(work: Work[Of], found: Iterator[Record], processes: int = 1) -> Iterator[Of]:
    """What becomes by `work` of records that were read already, in order."""
    batches = iter(lambda: list(itertools.islice(found, AT_ONCE)), [])
    for results in in_order(work, batches, processes):
        yield from results


def _batches(sources: list[Source], file: int, done: int) -> Iterator[tuple[list[Record], Place]]:
    """The rows of the files from row `done` of number `file` on, a few at a time, each with the place after them."""
    batch: list[Record] = []
    place = (file, done)
    for number in range(file, len(sources)):
        found = records.read(sources[number : number + 1], Findings())
        for row, record in enumerate(found, 1):
            if (number, row) <= (file, done):
                continue
            batch.append(record)
            place = (number, row)
            if len(batch) == AT_ONCE:
                yield batch, place
                batch = []
    if batch:
        yield batch, place


class RowWork:
    """What a process does with a batch of rows."""

    def __init__(self, make: Maker) -> None:
        self._make = make

    def __call__(self, batch: list[Record]) -> list[Prepared]:
        looked_at = [content(record) for record in batch]
        sound = [record for record, found in zip(batch, looked_at, strict=True) if isinstance(found, bytes)]
        made = iter(made_of(self._make, sound))
        results = []
        for record, found in zip(batch, looked_at, strict=True):
            if isinstance(found, str):
                results.append(Prepared(record.where, None, len(str(record.value)), [], {}, (found, detail(record))))
                continue
            digest, result = digest_of(found), next(made)
            if isinstance(result, Refused):
                refused = (result.reason, result.detail)
                results.append(Prepared(record.where, digest, len(found), [], {}, refused))
            else:
                rows = [(np.array(row.ids, dtype=np.int32), list(row.spans)) for row in result.rows]
                results.append(Prepared(record.where, digest, len(found), rows, dict(result.notes)))
        return results


def content(record: Record) -> bytes | str:
    """What the row holds, by which it is known again; as text, why it is bad."""
    if isinstance(record.value, Broken):
        return record.value.reason
    try:
        return json.dumps(record.value, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return "half a surrogate pair in its text, which is not a character"


def detail(record: Record) -> str:
    """Where within a row that cannot be read the fault is, for the report, which has this of the first of a reason."""
    broken = record.value
    return f"the first {broken.sentence}" if isinstance(broken, Broken) and broken.sentence != broken.reason else ""


def digest_of(found: bytes) -> str:
    """Tells a row's content from others'."""
    return hashlib.blake2b(found, digest_size=8).hexdigest()


def made_of(make: Callable[[list[Any]], list[Any]], sound: Sequence[Record]) -> list[Any]:
    """Results of `make` for the values of all records; an error that ends it all is said with the place of the row that it is
    about."""
    if not sound:
        return []
    try:
        return make([record.value for record in sound])
    except UserError:
        for record in sound:
            try:
                make([record.value])
            except UserError as error:
                raise UserError(f"{record.where}: {error}") from None
        raise
