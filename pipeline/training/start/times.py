"""How long a start takes, phase by phase, from the making of the process to the end of its first step.

Takes a mark at the end of each phase; gives seconds by phase, for one line of the first process's log and for run.json.
"""

import time

import psutil

from pipeline.console import log


class StartTimes:
    """`seconds` by phase, in the order in which they first ended; what ran under a name several times is one sum."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        age = time.time() - psutil.Process().create_time()
        self._marked = time.monotonic() - max(0.0, age)

    def ended(self, phase: str) -> None:
        """All since the last mark, or since the process was made, belongs to `phase`."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._marked
        self._marked = now

    def say(self) -> None:
        """The one line."""
        log("start:    " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items()))
