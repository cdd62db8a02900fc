"""What a step is made of, for the log: where its time went on this process, and the gradient's norm by layer.

Takes what the engine says it is about to do, and the optimizer's sums of gradients; gives numbers by TensorBoard tag.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from pipeline.names import layer_of
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer

# By what the engine announces (engine.IN_WORDS), what it counts as; waiting and messages are "wait", the rest "other".
PARTS = {
    "reading a micro-batch": "data",
    "the forward pass": "forward",
    "the backward pass": "backward",
    "the optimizer's update": "optimizer",
}
BETWEEN = "between two instructions"


class StepTimes:
    """Seconds by part since they were last taken, as this process's main thread spent them.

    On a GPU a pass is over for it when its kernels are launched, and their time shows where it next waits for the device.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._part: str | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, which the engine's announcements divide."""
        self._turn_to("other")
        try:
            yield
        finally:
            self._turn_to(None)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Something between two steps."""
        self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(None)

    def doing(self, what: str, waits: bool) -> None:
        """The engine is about to do this; outside a step, in an evaluation, it divides nothing."""
        if self._part in (*PARTS.values(), "wait", "other"):
            self._turn_to(PARTS.get(what) or ("wait" if waits and what != BETWEEN else "other"))

    def taken(self) -> dict[str, float]:
        """All since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _turn_to(self, part: str | None) -> None:
        now = time.perf_counter()
        if self._part is not None:
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now


class LayerGradients:
    """The gradient's norm by layer before clipping, at every `every`th step (None: never); of what lies in no layer, by its
    name."""

    def __init__(self, optimizer: PipelineOptimizer, every: int | None) -> None:
        self._optimizer = optimizer
        self._norms: dict[str, float] = {}
        if every:
            optimizer.on_gradients = partial(self._take, every)

    def begin_step(self) -> None:
        """A step begins."""
        self._norms = {}

    def measured(self) -> dict[str, float]:
        """Of this stage at the step that has ended; empty where none were due."""
        return {f"grad_norm/{layer}": norm for layer, norm in self._norms.items()}

    def _take(self, every: int, sums: Mapping[str, Tensor]) -> None:
        if (self._optimizer.completed_steps + 1) % every or not sums:
            return
        # In one transfer: a device is waited for once, not once a parameter.
        squares = torch.stack([torch.linalg.vector_norm(g).double() ** 2 for g in sums.values()]).tolist()
        by_layer: dict[str, float] = {}
        for name, square in zip(sums, squares, strict=True):
            layer = layer_of(name)
            key = name if layer is None else f"{layer:03d}"
            by_layer[key] = by_layer.get(key, 0.0) + square
        self._norms = {key: math.sqrt(square) for key, square in by_layer.items()}
