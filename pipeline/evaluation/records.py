"""What is kept of each unit under each adapter: a row of records.parquet, from which every figure is made.

Takes units and their rows' scores; gives records. Columns of the rejected row are null where a unit has one row only; of a
question, `lp_w` is the right option's and `lp_l` the likeliest wrong one's, and `lp_options` has all, as they were listed; of
ranked answers it has all, the best first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.harness import TaskResult
from pipeline.evaluation.scoring import Score
from pipeline.evaluation.units import Unit, UnitSet

SCHEMA = pa.schema(
    [
        ("adapter", pa.string()),
        ("adapter_sha256", pa.string()),  # of its file of weights; null for the base
        ("dataset", pa.string()),
        ("role", pa.string()),
        ("kind", pa.string()),
        ("place", pa.string()),
        ("prompt_hash", pa.string()),
        ("content_hash", pa.string()),
        ("lp_w", pa.float64()),  # Σ log p over the scored tokens, nats
        ("lp_l", pa.float64()),
        ("n_w", pa.int64()),  # scored tokens
        ("n_l", pa.int64()),
        ("bytes_w", pa.int64()),  # of their text
        ("bytes_l", pa.int64()),
        ("ref_w", pa.float64()),  # lp_w and lp_l of the base
        ("ref_l", pa.float64()),
        ("truncated", pa.bool_()),
        ("order", pa.list_(pa.int32())),  # of a question's options
        ("right", pa.int32()),  # where the right one is listed
        ("lp_options", pa.list_(pa.float64())),
        ("desirable", pa.bool_()),  # of unpaired answers
    ]
)


class Record(NamedTuple):
    """One unit under one adapter; fields are the columns of SCHEMA behind `kind`, but for the base's."""

    unit: Unit
    logprobs: tuple[float, ...]  # of its rows

    @property
    def rejected(self) -> int | None:
        """The row that the wanted one is compared with: the likeliest of the others; None where there is no other."""
        others = [place for place in range(len(self.logprobs)) if place != self.unit.right]
        return max(others, key=lambda place: self.logprobs[place]) if others else None


def records(units: UnitSet, scores: Sequence[Score]) -> list[Record]:
    """`scores`: of `units.rows`, in their order."""
    found, at = [], 0
    for unit in units.units:
        of_unit = scores[at : at + len(unit.rows)]
        found.append(Record(unit, tuple(score.logprob for score in of_unit)))
        at += len(unit.rows)
    return found


class Scored(NamedTuple):
    """All records of an adapter on a dataset, in the order of its units. `adapter`: its name; `sha256`: None of the base."""

    adapter: str
    sha256: str | None
    data: UnitSet
    records: list[Record]


def write(path: Path, scored: Sequence[Scored]) -> None:
    """The records of all adapters. The first of those on a dataset are the base's."""
    base: dict[str, list[Record]] = {}
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for one in scored:
            base.setdefault(one.data.name, one.records)
            rows = [_row(one, mine, ref) for mine, ref in zip(one.records, base[one.data.name], strict=True)]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def _row(scored: Scored, mine: Record, base: Record) -> dict[str, object]:
    unit, other = mine.unit, mine.rejected
    wanted, rejected = unit.rows[unit.right], None if other is None else unit.rows[other]
    return {
        "adapter": scored.adapter,
        "adapter_sha256": scored.sha256,
        "dataset": scored.data.name,
        "role": scored.data.role,
        "kind": scored.data.kind,
        "place": unit.place,
        "prompt_hash": unit.prompt,
        "content_hash": unit.content,
        "lp_w": mine.logprobs[unit.right],
        "lp_l": None if other is None else mine.logprobs[other],
        "n_w": wanted.n_targets,
        "n_l": rejected and rejected.n_targets,
        "bytes_w": wanted.n_bytes,
        "bytes_l": rejected and rejected.n_bytes,
        "ref_w": base.logprobs[unit.right],
        "ref_l": None if other is None else base.logprobs[other],
        "truncated": unit.truncated,
        "order": list(unit.order) or None,
        "right": unit.right if unit.order else None,
        "lp_options": list(mine.logprobs) if unit.order or scored.data.kind == "ranked" else None,
        "desirable": unit.desirable if scored.data.kind == "unpaired" else None,
    }


TASKS = pa.schema(
    [
        ("adapter", pa.string()),
        ("task", pa.string()),
        ("document_hash", pa.string()),
        ("logprobs", pa.list_(pa.float64())),  # of its requests
        ("figures", pa.map_(pa.string(), pa.float64())),
        ("weights", pa.map_(pa.string(), pa.float64())),
    ]
)


def write_tasks(path: Path, results: Sequence[TaskResult]) -> None:
    """A row for each adapter and document of a task."""
    rows = [
        {
            "adapter": one.adapter,
            "task": one.task,
            "document_hash": document.hash,
            "logprobs": list(document.logprobs),
            "figures": [(name, number) for name, (number, _) in document.figures.items()],
            "weights": [(name, weight) for name, (_, weight) in document.figures.items()],
        }
        for one in results
        for document in one.documents
    ]
    pq.write_table(pa.Table.from_pylist(rows, TASKS), path)
