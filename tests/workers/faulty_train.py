"""`train.py`, in which something runs out: `deepspeed --num_gpus N tests/workers/faulty_train.py --config …`, and in FAULT what.

`step-memory:<step>`: the last process asks in that step's forward for 4 PiB more than it has. `load-memory`: it does so
where it would read its weights. `metrics-disk:<step>`: the metrics' file is on a full disk when the step is logged. These
are refused by the system itself: its allocator, or /dev/full. `step-hang:<step>`: the last process sleeps in that step's forward.
`step-kill:<step>`: it is killed there by SIGKILL, as by a system that is out of memory.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train  # first: it holds the signals

import torch  # isort: skip

from pipeline.console import run_command
from pipeline.model import weights
from pipeline.training.metrics import Metrics
from pipeline.training.run import assemble, stop

KIND, _, AT = os.environ["FAULT"].partition(":")
IS_LAST = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def too_much() -> None:
    """Ask for more than any machine has."""
    torch.empty(2**52, dtype=torch.uint8)


def faulty_trainer(*arguments: Any) -> Any:
    """The run, with a forward that in one step needs too much, or too long, or does not come back."""
    run = assembled(*arguments)
    forward = run.engine.module.forward

    def hungry(*inputs: Any, **named: Any) -> Any:
        if run.step == int(AT) - 1 and IS_LAST:
            IN_A_STEP[KIND]()
        return forward(*inputs, **named)

    run.engine.module.forward = hungry
    return run


def log_on_a_full_disk(self: Metrics, step: int, values: dict[str, float]) -> None:
    """Append to /dev/full from step AT on."""
    if self._file is not None and step == int(AT):
        self._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    log(self, step, values)


IN_A_STEP: dict[str, Callable[[], None]] = {
    "step-memory": too_much,
    "step-hang": lambda: time.sleep(3600),
    "step-kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
assembled, load, log = assemble.trainer, weights.load, Metrics.log
PATCHES = {
    **dict.fromkeys(IN_A_STEP, lambda: mock.patch.object(assemble, "trainer", faulty_trainer)),
    "load-memory": lambda: mock.patch.object(weights, "load", lambda *a: too_much() if IS_LAST else load(*a)),
    "metrics-disk": lambda: mock.patch.object(Metrics, "log", log_on_a_full_disk),
}

if __name__ == "__main__":
    stop.BOUNDARY_GRACE_S = 1.0  # the others need not wait long for a step that does not end
    with PATCHES[KIND]():
        run_command(train.main)
