"""The run's report (publishing/report/), written by a process of its own every few minutes and at the end.

Takes the run's folder; the first process starts what writes. A report that fails is said once and fails nothing else.
"""

import subprocess
import sys
import time
from pathlib import Path

from pipeline.console import log, rank, warn

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_S = 120.0  # of the run's end for the last report


class Reports:
    """Those of one run. `every_minutes`: 0 for none."""

    def __init__(self, run_dir: Path, every_minutes: float) -> None:
        self._run_dir = run_dir
        self._every_s = every_minutes * 60 if rank() == 0 else 0.0
        self._writing: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()

    def step_done(self) -> None:
        """A step is over: begin with a report if one is due, and none is being written."""
        due = self._every_s and time.monotonic() - self._began > self._every_s
        if due and (self._writing is None or self._writing.poll() is not None):
            self._begin()

    def run_ended(self) -> None:
        """All is logged: write the last report and say where it is."""
        if not self._every_s:
            return
        try:
            if self._writing is not None:
                self._writing.wait(PATIENCE_S)
            _, said = self._begin().communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            warn(f"the report is not written after {PATIENCE_S:.0f} s; later: {' '.join(_command(self._run_dir))}")
            return
        if self._writing is not None and self._writing.returncode:
            warn(f"there is no report: {said.decode(errors='replace').strip()}")
        else:
            log(f"report:   {self._run_dir / 'report.html'}")

    def _begin(self) -> "subprocess.Popen[bytes]":
        self._began = time.monotonic()
        self._writing = subprocess.Popen(
            _command(self._run_dir),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        return self._writing


def _command(run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline.publishing.report", str(run_dir.resolve())]
