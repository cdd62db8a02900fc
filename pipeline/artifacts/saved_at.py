"""The step of a run at which a folder in it was saved, kept in the folder itself.

Takes a folder that is being written, or one that is there; the mark appears and goes with it. A run that goes on from an
older step knows by it what is of the branch that it leaves. The file is hidden: folds do not copy it, uploads leave it.
"""

from pathlib import Path
from typing import NamedTuple

FILE = ".saved_at_step"
BEST = "best_loss"  # in a run's folder, what was trained when the evaluation's loss was lowest


class Saved(NamedTuple):
    """A folder of a run with what was trained, as it was after `step`."""

    folder: Path
    step: int


def last_or_best(run_dir: Path, step: int, *, best: bool) -> Saved:
    """What there is of a run whose last step was `step`: step<N>/, or with `best` what was best, where that was saved."""
    if best and (when := step_of(run_dir / BEST)) is not None:
        return Saved(run_dir / BEST, when)
    return Saved(run_dir / f"step{step}", step)


def mark(folder: Path, step: int) -> None:
    """Note in `folder` that it was saved at `step`."""
    (folder / FILE).write_text(f"{step}\n", encoding="ascii")


def step_of(folder: Path) -> int | None:
    """The step at which `folder` was saved; None where nothing says so."""
    try:
        return int((folder / FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
