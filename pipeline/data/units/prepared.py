"""Takes rows of preference data as they stand in their files; gives what was made of each, in the form in which it is kept.

As rows/prepared.py, whose processes and journal it shares: a row gives units, mostly one.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.chat.turns import Refused
from pipeline.data.preparing.journal import Entry
from pipeline.data.reading.records import Record
from pipeline.data.rows.prepared import content, detail, digest_of, made_of
from pipeline.data.units.encode import Rows, UnitEncoder
from pipeline.data.units.formats import Kind, Names, Unit, units


@dataclass(frozen=True)
class PreparedUnits:
    """What became of a row of a file: its units, what was met in them, reasons and remedies for which others are refused.

    `digest`: of its content, None where it is no readable text. `size`: characters of that.
    """

    where: str
    digest: str | None
    size: int
    units: list[Rows]
    notes: Mapping[str, int]
    refused: list[tuple[str, str]]

    def entry(self) -> Entry:
        """As a journal keeps it."""
        of_units = [[[len(row) for row in unit.ids], *unit[1:]] for unit in self.units]
        ids = [np.array(row, np.int32) for unit in self.units for row in unit.ids]
        facts = [self.where, self.digest, self.size, of_units, dict(self.notes), self.refused]
        return facts, np.concatenate([np.empty(0, np.int32), *ids])

    @classmethod
    def of(cls, entry: Entry) -> "PreparedUnits":
        """As a journal kept it."""
        (where, digest, size, of_units, notes, refused), ids = entry
        left, made = iter(ids.tolist()), []
        for lengths, *rest in of_units:
            rows = [list(itertools.islice(left, length)) for length in lengths]
            made.append(Rows(rows, *rest))
        return cls(where, digest, size, made, notes, [(reason, remedy) for reason, remedy in refused])


@dataclass(frozen=True)
class UnitWork:
    """What a process does with a batch of rows."""

    kind: Kind
    names: Names
    ranks: int
    encode: UnitEncoder

    def __call__(self, batch: list[Record]) -> list[PreparedUnits]:
        looked_at = [content(record) for record in batch]
        sound = [record for record, found in zip(batch, looked_at, strict=True) if isinstance(found, bytes)]
        made = iter(made_of(self._made, sound))
        results = []
        for record, found in zip(batch, looked_at, strict=True):
            if isinstance(found, str):
                size = len(str(record.value))
                results.append(PreparedUnits(record.where, None, size, [], {}, [(found, detail(record))]))
            else:
                results.append(PreparedUnits(record.where, digest_of(found), len(found), *next(made)))
        return results

    def _made(self, values: list[Any]) -> list[tuple[list[Rows], Counter[str], list[tuple[str, str]]]]:
        """For each value its units, what was met, and what is refused. The texts of all are encoded together."""
        of_values = [self._units(value) for value in values]
        encoded = iter(self.encode([unit for found in of_values if isinstance(found, list) for unit in found]))
        results = []
        for found in of_values:
            rows, notes, refused = list[Rows](), Counter[str](), list[tuple[str, str]]()
            for result in [next(encoded) for _ in found] if isinstance(found, list) else [found]:
                if isinstance(result, Refused):
                    refused.append((result.reason, result.detail))
                    continue
                unit, met = result
                notes += met
                rows += [] if unit is None else [unit]
            results.append((rows, notes, refused))
        return results

    def _units(self, value: Any) -> list[Unit] | Refused:
        try:
            return units(value, self.kind, self.names, self.ranks)
        except Refused as refused:
            return refused
