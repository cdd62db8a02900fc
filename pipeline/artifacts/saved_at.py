"""The step of a run at which a folder in it was saved, kept in the folder itself.

Takes a folder that is being written, or one that is there; the mark appears and goes with it. A run that goes on from an
older step knows by it what is of the branch that it leaves. The file is hidden: folds do not copy it, uploads leave it.
"""

from pathlib import Path

FILE = ".saved_at_step"


def mark(folder: Path, step: int) -> None:
    """Note in `folder` that it was saved at `step`."""
    (folder / FILE).write_text(f"{step}\n", encoding="ascii")


def step_of(folder: Path) -> int | None:
    """The step at which `folder` was saved; None where nothing says so."""
    try:
        return int((folder / FILE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
