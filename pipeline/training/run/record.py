"""run.json: what a run read, and for each part of it (from a start or a resumption to its end or a stop) where it ran,
how long, and in how much memory.

Takes the trainer before and after its run; the first process writes into the run's folder, whole. A part that was
killed has no entry, which its neighbours' steps show; nothing is guessed for it.
"""

import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline import version
from pipeline.console import UserError
from pipeline.data.selection import Selection
from pipeline.files import write_json
from pipeline.foreign import read_object
from pipeline.training.data.read import Data
from pipeline.training.engine.engine import Place
from pipeline.training.metrics import peak_memory

FILE = "run.json"
FORMAT = 1
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors")


class RunRecord:
    """Records one segment of a run in `run_dir`, from its start or resumption at `step` to its stop.

    `start_s`: how long each phase of the first process's start took, read at the end.
    """

    def __init__(self, run_dir: Path, place: Place, data: Data, step: int, start_s: Mapping[str, float]) -> None:
        self._run_dir, self._place, self._data, self._step, self._start_s = run_dir, place, data, step, start_s
        self._began = time.monotonic()

    def end(self, step: int) -> None:
        """The part has ended after step `step`. All processes must come here; a part without a step adds no entry."""
        seconds = time.monotonic() - self._began
        everyone: list[Any] = [None] * self._place.world
        dist.all_gather_object(everyone, (device_name(), peak_memory()))
        if self._place.rank != 0:
            return
        part = {
            "from_step": self._step,
            "to_step": step,
            "seconds": seconds,
            "start_s": {phase: round(s, 3) for phase, s in self._start_s.items()},
            "stages": self._place.stages,
            "replicas": self._place.replicas,
            "devices": [name for name, _ in everyone],
            "peak_bytes": [peak for _, peak in everyone],
            "versions": versions(),
        }
        earlier = read(self._run_dir).get("parts", [])
        parts = earlier + [part] * (step > self._step)
        write_json(self._run_dir / FILE, {"format": FORMAT, "data": describe(self._data), "parts": parts}, indent=1)


def read(run_dir: Path) -> dict[str, Any]:
    """What run.json says; empty where there is none, or none that this program reads."""
    try:
        content = read_object(run_dir / FILE, "the record of a run")
    except UserError:
        return {}
    return content if content.get("format") == FORMAT else {}


def describe(data: Data) -> list[dict[str, Any]]:
    """For every set, in training's order and then evaluation's: its name, documents, tokens, chunks and those used; of a stream
    what was read of it."""
    sets = [("training", rows.store.name, rows) for rows in data.train]
    sets += [("evaluation", name, rows) for name, rows in data.evaluation.items()]
    windows = data.stream and data.stream.windows
    streamed = [{"use": "training", "name": windows.name, **windows.facts()}] if windows else []
    return streamed + [_described(use, name, rows) for use, name, rows in sets]


def _described(use: str, name: str, rows: Selection) -> dict[str, Any]:
    """What the store says of the whole text; `rows` of it are used, and `different` is how many without repeats."""
    return {
        "use": use,
        "name": name,
        **rows.store.facts(),
        "rows": len(rows),
        "different": len(np.unique(rows.rows)),
    }


def versions() -> dict[str, str]:
    """Ours and those of the libraries that the numbers depend on."""
    return {version.NAME: version.full(), **{package: metadata.version(package) for package in PACKAGES}}


def device_name() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
