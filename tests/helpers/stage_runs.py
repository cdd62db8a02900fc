"""Runs of `stage_worker.py`: cases in, what all processes computed out.

A case is a configuration and how many steps of it; all cases of one launch share the processes, which cost more to
start than the cases to train.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import builders
from tests.helpers.paths import WORKERS
from tests.helpers.row_store import Row

WORKER = WORKERS / "stage_worker.py"
STEPS = 5


@dataclass
class Case:
    """One configuration, with overrides as `--set` takes them. `evaluate_at`: numbers of steps done.

    `rows`: to train and to evaluate on, in place of the config's datasets.
    """

    name: str
    config: Path
    overrides: list[str] = field(default_factory=list)
    steps: int = STEPS
    evaluate_at: list[int] = field(default_factory=list)
    sabotage: str | None = None
    rows: tuple[list[Row], list[Row]] | None = None

    def as_json(self) -> dict[str, Any]:
        """For the worker."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return {**given, "config": str(self.config)}


@dataclass
class Result:
    """What the processes of one case left in `folder`."""

    folder: Path

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """The facts of each rank."""
        count = len(list(self.folder.glob("*.json")))
        assert count, f"no results in {self.folder}"
        return [json.loads((self.folder / f"{rank}.json").read_text()) for rank in range(count)]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Of all ranks; what several of them have (replicas, the two ends of a tied weight) must be bit-equal."""
        merged: dict[str, Tensor] = {}
        for rank in range(len(self.ranks)):
            for name, tensor in load_file(self.folder / f"{rank}.safetensors").items():
                assert torch.equal(merged.setdefault(name, tensor), tensor), f"rank {rank} has another {name}"
        return merged

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with `prefix`, without it."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    @property
    def initial(self) -> dict[str, Tensor]:
        """Trained parameters before the first step."""
        return self.under("initial/")

    @property
    def weights(self) -> dict[str, Tensor]:
        """Trained parameters after the last step."""
        return self.under("weights/")

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Of step `step`, counted from 1, before clipping."""
        return self.under(f"gradient/{step}/")

    def agreed(self, key: str) -> Any:
        """A fact on which all ranks must agree to the last bit."""
        first = self.ranks[0][key]
        assert all(rank[key] == first for rank in self.ranks), f"ranks disagree on {key}"
        return first

    @cached_property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.agreed("run_dir"))

    @cached_property
    def losses(self) -> list[float]:
        """train/loss of each step, from the run's metrics."""
        return [line["train/loss"] for line in builders.metrics(self.run_dir) if "train/loss" in line]

    def evaluation(self, steps_done: int) -> dict[str, float]:
        """The evaluation losses by set."""
        return self.agreed("evaluations")[str(steps_done)]  # type: ignore[no-any-return]


def run(processes: int, cases: list[Case], folder: Path, worker: Path = WORKER) -> dict[str, Result]:
    """Launch the worker (or one that counts more) over all cases; results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([case.as_json() for case in cases]))
    builders.launch(processes, worker, str(folder / "cases.json"), str(folder))
    return {case.name: Result(folder / case.name) for case in cases}
