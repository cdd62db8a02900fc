"""[samples]: what the model says while it is trained, and beside it what its base says.

Takes the prompts and the stage; at its steps writes the answers to the console, to samples.jsonl and, as text, to TensorBoard.
Nothing of the training changes by it (asking.py).
"""

import time
from collections.abc import Callable

import torch

from pipeline.console import duration, log
from pipeline.generation import shown
from pipeline.generation.decoding import Answer, Asked
from pipeline.generation.prompts import keys_of_noise
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.stage import Stage
from pipeline.training.data.questions import Questions
from pipeline.training.engine.asking import RunAsker
from pipeline.training.engine.engine import Place
from pipeline.training.metrics import Metrics
from pipeline.training.start.resolved import SampleSpec


class Samples:
    """The samples of a run. All processes make one, and write at the same steps.

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
        self._metrics = metrics
        self._asker = RunAsker(stage, place, dtype, lambda: alive("writing samples", True))
        self._base: list[Answer] | None = None  # greedy, it says the same at every step
        self._keys = keys_of_noise(spec.prompts)

    def due(self, step: int, last: bool) -> bool:
        """Whether there are samples after `step`, or before the first one (0)."""
        if step == 0:
            return self._spec.at_start
        every = self._spec.every_steps
        return bool(every and step % every == 0) or (last and self._spec.at_end)

    def write(self, step: int) -> None:
        """Ask all prompts and write the answers. All processes must come here."""
        began = time.monotonic()
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
        spec = self._spec
        asked = [
            Asked(ids, spec.sampling.noise(step, key)) for ids, key in zip(self._questions.ids, self._keys, strict=True)
        ]
        return self._asker.answers(asked, spec.sampling, self._questions.asker.stops, spec.max_new_tokens)
