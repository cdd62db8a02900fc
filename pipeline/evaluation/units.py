"""What is scored: units of rows that are compared with each other, each row with the run of tokens whose probability counts.

Takes stores of rows (data/row_store.py); gives units. A unit of `rows` is one row, of 'preference' the chosen and the
rejected completion of a prompt, of 'ranked' several, the best first, of 'unpaired' one that is good or bad, of 'multiple_choice'
a question's options in one order.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from pipeline.data.row_store import RowStore
from pipeline.data.units.store import UnitRows

SEED = 42  # of `subsample`, as in training

Kind = Literal["rows", "preference", "unpaired", "ranked", "multiple_choice"]
Decode = Callable[[list[int]], str]


class Row(NamedTuple):
    """Token ids, the runs (start, end) of them that are scored, and the bytes that these spell."""

    ids: list[int]
    spans: list[tuple[int, int]]
    n_bytes: int

    @property
    def n_targets(self) -> int:
        return sum(end - start for start, end in self.spans)


class Unit(NamedTuple):
    """Rows that are compared, of which number `right` is the wanted one.

    `prompt` and `content`: hashes of what comes before the scored tokens, shared by all units of a prompt, and of everything.
    `place`: file and line. `order`: of a question's options, as the file numbers them. `desirable`: of an answer by
    itself.
    """

    prompt: str
    content: str
    place: str
    rows: tuple[Row, ...]
    right: int = 0
    truncated: bool = False
    order: tuple[int, ...] = ()
    desirable: bool = True


@dataclass(frozen=True)
class UnitSet:
    """A dataset to evaluate on. `role`: what its rows are to the training. `notes`: what became of its rows, in words."""

    name: str
    kind: Kind
    role: str
    units: list[Unit]
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """Of all units, in order."""
        return [row for unit in self.units for row in unit.rows]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


def digest(*parts: Iterable[int] | str) -> str:
    """A short hash of ids and texts."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode() if isinstance(part, str) else np.array(list(part), dtype="<i4").tobytes()
        hashed.update(len(content).to_bytes(8, "little") + content)
    return hashed.hexdigest()


def row_of(ids: Sequence[int], spans: Sequence[tuple[int, int]], decode: Decode) -> Row:
    """A row; the bytes of its scored tokens are those of their text."""
    ids, runs = [int(id) for id in ids], [(int(start), int(end)) for start, end in spans]
    text = "".join(decode(ids[start:end]) for start, end in runs)
    return Row(ids, runs, len(text.encode("utf-8", "replace")))


def units_of_rows(store: RowStore, decode: Decode) -> list[Unit]:
    """Each row with targets is a unit. Rows of one conversation have the prompt of its first."""
    prompts: dict[int, str] = {}
    units = []
    for number in np.flatnonzero(store.targets).tolist():
        row = row_of(store.ids(number).tolist(), store.spans(number), decode)
        prompt = digest(row.ids[: row.spans[0][0]])
        if store.groups is not None:
            prompt = prompts.setdefault(int(store.groups[number]), prompt)
        elif row.spans[0][0] <= 1:  # a chunk of a book has no prompt: it stands for itself
            prompt = digest(row.ids)
        edges = [edge for run in row.spans for edge in run]
        units.append(Unit(prompt, digest(row.ids, edges), store.documents(number)[0].name, (row,)))
    return units


def units_of_answers(store: UnitRows, decode: Decode) -> list[Unit]:
    """Pairs and ranked answers as they are, the best first; of unpaired ones the answer alone. Those of one prompt have the
    prompt of the first."""
    slots = store.slots[:1] if store.kind == "unpaired" else store.slots
    prompts: dict[int, str] = {}
    units = []
    for number in range(len(store)):
        rows = tuple(row_of(slot.ids(number).tolist(), slot.spans(number), decode) for slot in slots)
        start, good = rows[0].spans[0][0], bool(store.desirable[number])
        prompt = prompts.setdefault(int(store.groups[number]), digest(rows[0].ids[:start]))
        content = digest(rows[0].ids, [start] if good else [start, 0], *(row.ids for row in rows[1:]))
        truncated = bool(store.cut[number][: len(rows)].any())
        units.append(Unit(prompt, content, store.documents(number)[0].name, rows, truncated=truncated, desirable=good))
    return units


def subsampled(units: list[Unit], part: float | None) -> list[Unit]:
    """The part of the prompts that is kept after a shuffle, rounded down but at least one, with all their units, in order."""
    if part is None:
        return units
    prompts = list(dict.fromkeys(unit.prompt for unit in units))
    kept = np.random.default_rng(SEED).permutation(len(prompts))[: max(1, int(len(prompts) * part))]
    chosen = {prompts[place] for place in kept.tolist()}
    return [unit for unit in units if unit.prompt in chosen]
