"""`--profile N`: what N steps spend their time on, as a trace that Perfetto and chrome://tracing show.

Takes the run's folder; each process writes `profile/rank-<rank>.json.gz` into it when its steps are done. No number of the run
changes; the steps that are traced are slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.console import log, warn
from pipeline.files import rename

FOLDER = "profile"
STEPS_BEFORE = 1  # in the first step of a process much is set up


class StepProfiler:
    """Traces `steps` steps of this process, from its second on."""

    def __init__(self, run_dir: Path, rank: int, steps: int) -> None:
        self.file = run_dir / FOLDER / f"rank-{rank}.json.gz"
        self._steps, self._seen = steps, 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(activities=activities)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number` of the run, the others of which it leaves alone."""
        self._seen += 1
        place = self._seen - STEPS_BEFORE
        if not 1 <= place <= self._steps:
            yield
            return
        if place == 1:
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        if place == self._steps:
            self._profile.stop()
            self._write()

    def _write(self) -> None:
        """Whole, as another run may have left one there; what cannot be written does not end the run."""
        temporary = self.file.with_name(f".{self.file.name}")
        try:
            self.file.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
            rename(temporary, self.file)
        except (OSError, RuntimeError) as error:
            warn(f"{self.file}: cannot be written: {error}; the run goes on")
            return
        log(f"profile:  {self._steps} steps in {self.file.parent}")
