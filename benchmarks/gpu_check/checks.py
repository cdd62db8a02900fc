"""The checks by name, each with its budget, and how one is carried out."""

import importlib
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.gpu_check.setting import Outcome, Setting


class Check(NamedTuple):
    """`name` in `module` of this package; `budget_s`: after so many seconds on a GPU it is given up."""

    module: str
    name: str
    budget_s: float

    def function(self) -> Callable[[Setting], Outcome]:
        """The check itself; only what it uses is imported."""
        found: Callable[[Setting], Outcome] = getattr(
            importlib.import_module(f"{__package__}.{self.module}"), self.name
        )
        return found


CHECKS = {
    "kernels": Check("kernels", "check", 60),
    "levels": Check("levels", "check", 40),
    "quantised": Check("quantised", "check", 30),
    "resumed": Check("training", "killed_and_resumed", 60),
    "planned": Check("training", "planned", 40),
    "peer": Check("peer", "check", 60),
}


def carry_out(name: str, run: Callable[[Setting], Outcome], given: Setting) -> dict[str, Any]:
    """The row of a check for the JSON; what it raises is in the row."""
    began = time.monotonic()
    try:
        row = {"name": name, **run(given)._asdict()}
    except Exception:
        row = failed(name, traceback.format_exc())
    return {**row, "seconds": time.monotonic() - began}


def failed(name: str, problem: str) -> dict[str, Any]:
    """The row of a check that came to no end."""
    return {"name": name, "passed": False, "compared": "", "tolerance": "", "figures": {}, "problem": problem}
