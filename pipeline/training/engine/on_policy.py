"""rejected = 'generate': before each step the model answers the step's prompts, and these answers are its rejected ones.

Takes the stores and a step's units, as the stage then is; gives stores in which these units are whole, with what the reference
says of them. What was said is in the run's folder before the step begins, a line a unit, and a resumed run reads it there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from pipeline.data.row_store import RowId, RowStore
from pipeline.data.units.generated import GeneratedPairs
from pipeline.files import sync_stream, write_text
from pipeline.generation.decoding import Asked
from pipeline.training.data.read import Spoken
from pipeline.training.engine import reference
from pipeline.training.engine.asking import RunAsker
from pipeline.training.start.resolved import GenerationSpec

FILE = "generated.jsonl"
Key = tuple[int, str, int]  # the step, the dataset's name, the unit


class Negatives:
    """The rejected answers of a run. All processes make one. `against`: the reference, where a loss reads one; `step`: the last
    completed one, after which answers that `run_dir` has are taken from there."""

    def __init__(
        self,
        spec: GenerationSpec,
        spoken: Spoken,
        asker: RunAsker,
        against: reference.Pass | None,
        run_dir: Path,
        step: int,
    ) -> None:
        self._spec, self._spoken, self._asker, self._against = spec, spoken, asker, against
        self._file, self._writes = run_dir / FILE, dist.get_rank() == 0
        told: list[Any] = [_read(self._file, step) if self._writes else None]
        dist.broadcast_object_list(told)
        self._known: dict[Key, list[int]] = told[0]
        self._measured: dict[str, float] = {}

    def stores(self, stores: Sequence[RowStore], rows: Sequence[RowId], step: int) -> list[RowStore]:
        """`stores`, in which those of `rows` that wait for an answer have it. All processes must come here, before `step`."""
        found, said = list(stores), list[tuple[GeneratedPairs, int, list[int]]]()
        for index, store in enumerate(stores):
            units = sorted({row for where, row in rows if where == index})
            if not isinstance(store, GeneratedPairs) or not units:
                continue
            answers = dict(zip(units, self._answers(store, units, step), strict=True))
            said += [(store, unit, ids) for unit, ids in answers.items()]
            whole = store.answered(answers)
            if self._against is not None:
                whole = reference.scored(self._against, whole, np.array(units))
            found[index] = whole
        self._measure(said)
        return found

    def measured(self) -> dict[str, float]:
        """Of the last step's answers: tokens in the mean, shares that the model ended, and that are the chosen one."""
        return self._measured

    def _answers(self, store: GeneratedPairs, units: list[int], step: int) -> list[list[int]]:
        """Each unit's answer, its end included: known, or asked for and written down."""
        missing = [unit for unit in units if (step, store.name, unit) not in self._known]
        rejected, sampling = store.rejected, self._spec.sampling
        asked = [
            Asked(
                rejected.prompt(unit).tolist(),
                sampling.noise(step, f"{store.name} {unit}"),
                most=int(rejected.targets[unit]),
            )
            for unit in missing
        ]
        longest = max((one.most or 0 for one in asked), default=0)
        new = self._asker.answers(asked, sampling, self._spoken.stops, longest) if asked else []
        ids = [[*answer.tokens, *([] if answer.stop is None else [answer.stop])] for answer in new]
        fresh = dict(zip(missing, ids, strict=True))
        self._write(store, fresh, step)
        return [fresh[unit] if unit in fresh else self._known.pop((step, store.name, unit)) for unit in units]

    def _write(self, store: GeneratedPairs, answers: dict[int, list[int]], step: int) -> None:
        """Durable when it returns."""
        if not self._writes or not answers:
            return
        with self._file.open("a", encoding="utf-8") as file:
            for unit, ids in answers.items():
                line = {"step": step, "dataset": store.name, "row": unit, "place": store.documents(unit)[0].name}
                said = {"text": self._spoken.text(ids), "stopped": ids[-1] in self._spoken.stops, "ids": ids}
                file.write(json.dumps({**line, **said}, ensure_ascii=False) + "\n")
            sync_stream(file)

    def _measure(self, said: list[tuple[GeneratedPairs, int, list[int]]]) -> None:
        count = len(said)
        same = sum(
            store.slots[0].ids(unit)[int(store.rejected.starts[unit]) :].tolist() == ids for store, unit, ids in said
        )
        stopped = sum(ids[-1] in self._spoken.stops for _, _, ids in said)
        tokens = sum(len(ids) for _, _, ids in said)
        totals = {"tokens": tokens, "stopped": stopped, "same": same}
        self._measured = {f"train/generated/{name}": total / count for name, total in totals.items()} if count else {}


def _read(file: Path, step: int) -> dict[Key, list[int]]:
    """The answers to steps after `step`; a line that a kill has cut short is taken out of the file."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(file, text)
    lines = map(json.loads, text.splitlines())
    return {(line["step"], line["dataset"], line["row"]): line["ids"] for line in lines if line["step"] > step}
