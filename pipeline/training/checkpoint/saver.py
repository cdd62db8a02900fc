"""What a run keeps: checkpoints of the last completed step, and the adapter or model as it is at a step.

Takes the run's folder, the state and a way to write what is trained; decides names, what is superseded and what is
pruned. `checkpoint` may be called from the watching thread as well as from the main one.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.console import log
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.checkpoint import retention
from pipeline.training.checkpoint.state import RunState
from pipeline.training.engine.engine import Place
from pipeline.training.metrics import Metrics
from pipeline.training.nodes.carrying import Carrier

SUPERSEDED_WAIT_S = 0.2


class Saver:
    """`resumed_at`: the step whose checkpoint is there already, if any. `keep`: newest saves of each kind; −1 keeps all.

    `carrier`: of a run whose nodes have disks of their own.
    """

    def __init__(
        self,
        run_dir: Path,
        launch: str,
        place: Place,
        state: RunState,
        metrics: Metrics,
        write: Callable[[Path, int], None],
        keep: int,
        resumed_at: int | None,
        carrier: Carrier | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.last_checkpoint = time.monotonic()
        self._launch, self._place, self._state, self._metrics = launch, place, state, metrics
        self._write, self._keep = write, keep
        self._checkpointed = set() if resumed_at is None else {resumed_at}
        self._step_saved: int | None = None
        self._carrier = carrier
        self._settle = carrier.settle if carrier else lambda: None
        self.kept_on = carrier.kept_on if carrier else ""  # the host whose disk has all this, if it is another
        self._one_at_a_time = threading.Lock()

    def checkpoint(self) -> None:
        """Save the last completed step, unless it is saved. Returns when all processes' parts are in place."""
        with self._one_at_a_time:
            while (step := self._state.completed_step) not in self._checkpointed:
                self._metrics.sync()
                step, tensors, facts = self._state.snapshot()
                with contextlib.suppress(checkpoint.Superseded):
                    checkpoint.save(
                        self.run_dir,
                        self._launch,
                        self._place.rank,
                        self._place.world,
                        step,
                        tensors,
                        facts,
                        self._settle,
                    )
                    self._checkpointed.add(step)
                    return
                while (
                    self._state.completed_step == step
                ):  # another process has completed a later step; so will this one
                    time.sleep(SUPERSEDED_WAIT_S)

    def checkpoint_and_prune(self) -> None:
        """At a step boundary: `checkpoint`, say so, and drop the oldest beyond `keep`."""
        if self._state.completed_step in self._checkpointed:
            return
        began = time.monotonic()
        self.checkpoint()
        self.last_checkpoint = time.monotonic()
        self._prune("global_step")
        log(f"step {self._state.completed_step}  checkpoint saved in {self.last_checkpoint - began:.1f} s")

    def trained(self, name: str) -> None:
        """What is trained, as it is now, under `name` in the run's folder."""
        self._write(self.run_dir / name, self._state.completed_step)

    def trained_at(self, step: int) -> None:
        """What is trained as `step<N>`, once a step, and drop the oldest beyond `keep`."""
        if step != self._step_saved:
            self.trained(f"step{step}")
            self._step_saved = step
            self._prune("step")

    def close(self) -> None:
        """The run is over: nothing more is saved."""
        if self._carrier:
            self._carrier.close()

    def _prune(self, prefix: str) -> None:
        if self._place.rank == 0:
            retention.prune(self.run_dir, prefix, self._keep)
