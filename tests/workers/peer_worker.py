"""A process of a run as far as stop.py and peers.py know it: no model, no collective.

`python tests/workers/peer_worker.py FOLDER RANK WORLD [DOES]`: steps until a file `go` is there; then its main thread does what
it is told (`work`: a step every 0.05 s; `wait`, `hang`: sleeps for ever, as one that waits for others or works).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.training.nodes.records import Mapped
from pipeline.training.run import peers, stop

HELD = stop.hold_signals()
stop.BOUNDARY_GRACE_S, stop.LOST_GRACE_S, stop.OTHER_RANKS_WAIT_S = 0.3, 0.5, 0.5
peers.SILENT_S = 1.0


def main(folder: Path, rank: int, world: int, does: str) -> None:
    """The run."""
    watcher = stop.Watcher(HELD)
    watcher.meet(Mapped(folder / "peers", peers.RECORD, world), rank, world, timeout_minutes=2 / 60)
    watcher.attach(folder, lambda: (folder / f"saved{rank}").touch(), "the line")
    step = 0
    while not watcher.requested():
        step += 1
        if step == 3:  # how long a step takes is known
            (folder / f"up{rank}").touch()
        with watcher.phase("step", step):
            watcher.doing("the forward pass")
            time.sleep(0.05)
            if does != "work" and (folder / "go").exists():
                if does == "wait":
                    watcher.doing("waiting for activations", True)
                time.sleep(3600)
    time.sleep(3600)  # no step boundary any more: the second thread saves


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
