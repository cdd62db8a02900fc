"""A process that has finished a run and does what follows: `after_training_worker.py FOLDER PART ...`, signals held as in
train.py. Prints a line before it begins, and one when it is done."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.training.run.stop import Watcher, hold_signals

HELD = hold_signals()

from pipeline.publishing.after_training import FinishedRun, follow  # noqa: E402


def main() -> None:
    folder, *asked = sys.argv[1:]
    watcher = Watcher(HELD)
    run_dir = Path(folder) / "run"
    watcher.attach(run_dir, lambda: None)
    watcher.detach()
    print("handing over", flush=True)
    watcher.hand_over()
    follow(
        FinishedRun(run_dir, run_dir / "step1", 1, Path(folder) / "base", "the line that resumes", asked, None, True)
    )
    print("done", flush=True)


if __name__ == "__main__":
    main()
