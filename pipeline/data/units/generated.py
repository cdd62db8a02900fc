"""Pairs of which the model gives the rejected answer itself, before the step in which they are trained.

Takes a written store of prompts with their chosen answers; gives a store of pairs (units/store.py) whose second rows are the
prompts alone, as long as their answers may become, and a view of it in which some of them are answered.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.data.rows.store import Runs
from pipeline.data.units.store import UnitRows, slot_names


@dataclass(frozen=True)
class AnsweredRows:
    """The rejected rows, as a store (row_store.py), beside the `chosen`. `starts`, `lengths` int64 [U]: where answers
    begin, and tokens of a row, at most for those without an answer; `answers`: those that are known, int32 [n] each."""

    name: str
    chosen: RowStore
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    answers: Mapping[int, NDArray[np.int32]]

    @property
    def bos(self) -> int | None:
        """The dataset's."""
        return self.chosen.bos

    @property
    def eos(self) -> int:
        """The dataset's."""
        return self.chosen.eos

    @property
    def content_hash(self) -> str:
        """The dataset's: an order of the rows is one whatever is answered."""
        return self.chosen.content_hash

    @property
    def width(self) -> None:
        """Padded to no fixed number of tokens."""

    @property
    def reaches(self) -> NDArray[np.int64]:
        """Positions run through a row, int64 [U]."""
        return self.lengths

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of the answers, int64 [U]."""
        return self.lengths - self.starts

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """int64 [U]: units of one prompt have one number."""
        return self.chosen.groups

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """This one alone."""
        return (self,)

    def __len__(self) -> int:
        return len(self.starts)

    def prompt(self, row: int) -> NDArray[np.int32]:
        """The ids before the answer: those of the chosen row up to where its answer begins."""
        return self.chosen.ids(row)[: int(self.starts[row])]

    def ids(self, row: int) -> NDArray[np.int32]:
        """The prompt, and its answer where there is one."""
        return np.append(self.prompt(row), self.answers.get(row, np.zeros(0, np.int32))).astype(np.int32)

    def spans(self, row: int) -> Runs:
        """The answer, where there is one."""
        start = int(self.starts[row])
        return [(start, start + len(self.answers[row]))] if row in self.answers else []

    def restarts(self, row: int) -> list[int]:
        """Positions run through a row."""
        return [0]

    def documents(self, row: int) -> list[DocumentSpan]:
        """The one row of a file that the prompt comes from."""
        return [self.chosen.documents(row)[0]._replace(end=len(self.ids(row)))]

    def facts(self) -> dict[str, Any]:
        """The dataset's."""
        return self.chosen.facts()


class GeneratedPairs(UnitRows):
    """Pairs, as a store. `max_new_tokens`: of an answer; a row has `limit` tokens at most."""

    rejected: AnsweredRows

    def __init__(self, folder: Path, limit: int, max_new_tokens: int | None) -> None:
        """UserError if a file is missing or has not the size it was written with."""
        super().__init__(folder)
        (chosen,) = self.members
        starts = chosen.lengths - chosen.targets
        most = np.minimum(limit, starts + (limit if max_new_tokens is None else max_new_tokens))
        self._hold(AnsweredRows(f"{self.name}, {slot_names(self.kind, 2)[1]}", chosen, starts, most, {}))

    def answered(self, answers: Mapping[int, Sequence[int]]) -> "GeneratedPairs":
        """The same units, those of `answers` with their rejected answer, of one token or more, its end included."""
        view, lengths = copy.copy(self), self.rejected.lengths.copy()
        for row, ids in answers.items():
            lengths[row] = self.rejected.starts[row] + len(ids)
        found = {row: np.array(ids, dtype=np.int32) for row, ids in answers.items()}
        view._hold(replace(self.rejected, lengths=lengths, answers=found))
        return view

    def _hold(self, rejected: AnsweredRows) -> None:
        chosen = self.members[0]
        self.rejected = rejected
        self.members = (chosen, rejected)
        self.lengths = np.maximum(chosen.lengths, rejected.lengths)
        self.reaches = self.lengths
        self.targets = chosen.targets + rejected.targets
