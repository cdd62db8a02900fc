"""A run's folder, read for its report: the numbers of metrics.jsonl by tag, what was said, the plan, and the card's facts.

Takes a folder that a run has written or is writing; a line that is not whole yet is left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.artifacts import saved_at
from pipeline.artifacts.saved_at import Saved
from pipeline.console import UserError
from pipeline.foreign import read_object
from pipeline.publishing.facts import Facts, read_facts, whole_lines

NORM = "adapter_norm/"


class Value(NamedTuple):
    """A number at a step."""

    step: int
    value: float


Series = list[Value]


@dataclass(frozen=True)
class Run:
    """`series`: by tag. `spoken`: by step, what was said then. `plan`: plan.json, empty until the run has ended."""

    folder: Path
    facts: Facts
    series: dict[str, Series]
    spoken: dict[int, list[dict[str, Any]]]
    plan: dict[str, Any]

    @property
    def published(self) -> Saved:
        """What its commands are about: best_loss/ where the run was asked for that, else its last step's."""
        best = bool(self.facts.config.get("load_best_at_end"))
        return saved_at.last_or_best(self.folder, self.facts.step, best=best)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def norms(self) -> dict[str, Series]:
        """‖B·A‖ of each module of the adapter."""
        return {tag.removeprefix(NORM): found for tag, found in self.series.items() if tag.startswith(NORM)}


def read(folder: Path) -> Run:
    """The run in `folder`. UserError where that is no run, or one without a step."""
    if not (folder / "config.toml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} is no run: it has no config.toml or no metrics.jsonl; give a folder under output_dir"
        )
    lines = whole_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: the run has logged nothing yet")
    series: dict[str, Series] = {}
    for line in lines:
        for tag, value in line.items():
            if tag != "step" and value is not None:
                series.setdefault(tag, []).append(Value(line["step"], value))
    spoken: dict[int, list[dict[str, Any]]] = {}
    for line in whole_lines(folder / "samples.jsonl"):
        spoken.setdefault(line["step"], []).append(line)
    last = lines[-1]["step"]
    facts = read_facts(folder, Saved(folder / f"step{last}", last))
    return Run(folder, facts, series, spoken, _plan(folder))


def _plan(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "plan.json", "the plan of a run")
    except UserError:
        return {}
