"""[samples]: what the model says while it is trained, and beside it what its base says.

Takes the prompts and the stage; at its steps writes the answers to the console, to samples.jsonl and, as text, to TensorBoard.
Nothing of the training changes by it: no generator that training draws from is used, no gradient is made, and the stage
is left in the mode it was in.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from pipeline.console import duration, log
from pipeline.generation import shown
from pipeline.generation.decoding import Answer, Asked, InOneProcess, OverProcesses, Stages, answers, speaking
from pipeline.generation.prompts import keys_of_noise
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.stage import Stage
from pipeline.training.engine.engine import Place
from pipeline.training.metrics import Metrics
from pipeline.training.start.questions import Questions
from pipeline.training.start.resolved import SampleSpec


class Samples:
    """The samples of a run. All processes make one, and write at the same steps; replicas share the prompts out.

    `dtype`: of hidden states between stages. `alive(what, waits)` is called for each token: the run gets on.
    """

    def __init__(
        self,
        spec: SampleSpec,
        questions: Questions,
        stage: Stage,
        place: Place,
        dtype: torch.dtype,
        metrics: Metrics,
        alive: Callable[[str, bool], None],
    ) -> None:
        self._spec, self._questions, self._stage, self._place = spec, questions, stage, place
        self._metrics, self._alive = metrics, alive
        self._stages = _stages(stage, place, dtype)
        self._base: list[Answer] | None = None  # greedy, it says the same at every step
        self._keys = keys_of_noise(spec.prompts)
        self._mine = range(place.replica, len(spec.prompts), place.replicas)

    def due(self, step: int, last: bool) -> bool:
        """Whether there are samples after `step`, or before the first one (0)."""
        if step == 0:
            return self._spec.at_start
        every = self._spec.every_steps
        return bool(every and step % every == 0) or (last and self._spec.at_end)

    def write(self, step: int) -> None:
        """Ask all prompts and write the answers. All processes must come here."""
        began = time.monotonic()
        with speaking([self._stage]):
            said = self._answers(step)
            if self._spec.compare and (self._base is None or self._spec.sampling.temperature > 0):
                with adapters_off(self._stage):
                    self._base = self._answers(step)
        if self._place.rank == 0:
            base = self._base if self._spec.compare else None
            samples = shown.samples(self._spec.prompts, said, base, self._questions.asker.text)
            self._metrics.samples(step, samples)
            log(shown.described(samples, f"step {step}  samples", duration(time.monotonic() - began)))

    def _answers(self, step: int) -> list[Answer]:
        """To all prompts, on every process."""
        sampling = self._spec.sampling
        asked = [Asked(self._questions.ids[n], sampling.noise(step, self._keys[n])) for n in self._mine]
        own = answers(
            self._stages,
            asked,
            sampling,
            self._questions.asker.stops,
            self._spec.max_new_tokens,
            lambda *_: self._alive("writing samples", True),
        )
        everyone: list[Any] = [None] * self._place.world
        dist.all_gather_object(everyone, dict(zip(self._mine, own, strict=True)))
        found: dict[int, Answer] = {number: answer for part in everyone for number, answer in part.items()}
        return [found[number] for number in range(len(found))]


def _stages(stage: Stage, place: Place, dtype: torch.dtype) -> Stages:
    """This process's way to all stages of its replica."""
    if place.stages == 1:
        return InOneProcess([stage], place.device)
    # Tokens are on the CPU, where a GPU's backend moves nothing. All processes take part in making a group.
    group = None if place.device.type == "cpu" else dist.new_group(backend="gloo")
    ranks = [place.topology.get_rank(pipe=n, data=place.replica) for n in range(place.stages)]
    return OverProcesses(stage, ranks, place.device, dtype, group)
