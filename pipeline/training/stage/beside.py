"""The reference beside the policy in each micro-batch, and taps on the hidden states of layers, which compare the two.

Takes a stage and what is compared; gives the stage a forward that, handed `marks` with a micro-batch, runs twice. Once for those
rows that are compared with, as the reference, without gradients, dropout or noise; hooks keep the tapped layers' outputs.
Then for all rows, and hooks add what the taps measure to a number for each tap and unit. These travel behind the hidden state
(model/structure/carried.py), so that whatever is tapped a micro-batch runs backward once through each layer. The reference's
hidden state goes with the integers, as int32: no gradient of it comes back. It goes as far as a tap reads it, or, where its
log-probabilities are computed in the step, to the head.

Hooks are outside what is recomputed in backward (model/memory/activation.py), so nothing is measured twice.

S rows of a unit, U units, B = S·U rows, slot after slot; K taps.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from pipeline.model.stage import FIRST_READS, Stage
from pipeline.model.structure.carried import pack, unpack
from pipeline.objectives.representation import Tap


class _Pass(NamedTuple):
    """One forward through the stage that is running: of the reference's rows, or of all with what was measured so far [K, U]."""

    slots: Sequence[int]
    units: int
    marks_SUT: Tensor
    carried: Tensor | None


class Beside:
    """The reference and the taps of one stage.

    `slots`: rows of a unit; `reference_slots`: those that the reference runs. `as_reference`: a block in which the stage is the
    reference. `scores`: whether the head reads its hidden state, too.
    """

    def __init__(
        self,
        stage: Stage,
        taps: Sequence[Tap],
        slots: int,
        reference_slots: Sequence[int],
        as_reference: Callable[[], AbstractContextManager[None]],
        scores: bool = False,
    ) -> None:
        self.taps, self.as_reference = taps, as_reference
        self._slots, self._reference_slots, self._scores = slots, list(reference_slots), scores
        last = max((layer for tap in taps for layer in tap.layers), default=-1)
        self._runs_reference = scores or last >= stage.layer_indices.start
        self._hands_reference_on = not stage.is_last and (scores or last >= stage.layer_indices.stop)
        self._pass: _Pass | None = None
        self._states: dict[int, dict[int, Tensor]] = {}  # the reference's, by layer and slot
        self._measured: Tensor | None = None
        self._reference: Tensor | None = None
        self._cosines: dict[str, list[Tensor]] = {}
        for index in sorted({layer for tap in taps for layer in tap.layers} & set(stage.layer_indices)):
            stage.layers[index].register_forward_hook(functools.partial(self._hook, index))
        stage.forward = functools.partial(self._run, stage, stage.forward)  # type: ignore[method-assign]

    def take(self) -> Tensor:
        """On the last stage, what was measured of the micro-batch that has just run: fp32 [K, U], with its gradient."""
        assert self._measured is not None, "no micro-batch has run since the last one was taken"
        measured, self._measured = self._measured, None
        return measured

    def take_reference(self) -> Tensor:
        """On the last stage, the reference's normed hidden state of the same, [B, T, D]."""
        assert self._reference is not None, "the reference has not run since it was last taken"
        reference, self._reference = self._reference, None
        return reference

    def begin_step(self) -> None:
        """A step begins: what is logged is of its micro-batches."""
        self._cosines = {}

    def measured(self) -> dict[str, float]:
        """Of the step so far, 'tap_cosine/<name>/<layer>': the mean cosine of the states that are compared."""
        return {name: float(torch.cat(values).mean()) for name, values in self._cosines.items()}

    def _run(
        self, stage: Stage, forward: Callable[..., Any], inputs: tuple[Tensor, ...], cache: Cache | None = None
    ) -> Any:
        """As `Stage.forward`; where marks are handed in, with the taps.

        First stage: (*FIRST_READS, marks int8 [B, T]). Later: (hidden with what was measured, what follows it, marks, and the
        reference's hidden state where it is read). Returns these, or on the last stage the normed hidden state.
        """
        untapped = len(FIRST_READS) if stage.is_first else 3 if stage.has_embedding else 2
        if len(inputs) <= untapped:
            return forward(inputs, cache)
        positions_BT = inputs[1]
        rows, tokens = positions_BT.shape
        units = rows // self._slots
        shape = len(self.taps), units
        if stage.is_first:
            x, marks_BT, carried = inputs[0], inputs[3], torch.zeros(shape, device=positions_BT.device)
            reference = self._of_reference(x)
            mine: tuple[Tensor, ...] = inputs[:3]
        else:
            x, values = (
                unpack(inputs[0], tokens, shape[0] * shape[1]) if self.taps else (inputs[0], inputs[0].new_empty(0))
            )
            marks_BT, carried = inputs[untapped], values.view(shape)
            reference = inputs[untapped + 1].view(x.dtype) if self._runs_reference else x
            mine = x, *inputs[1:untapped]
        marks_SUT = marks_BT.view(self._slots, units, tokens)
        left = None
        if self._runs_reference:
            with torch.no_grad(), _evaluating(stage), self.as_reference(), self._passing(units, marks_SUT, None):
                left = forward((reference, *map(self._of_reference, mine[1 : 2 if stage.is_first else None])))
        with self._passing(units, marks_SUT, carried):
            output = forward(mine)
            assert self._pass is not None
            assert self._pass.carried is not None
            carried = self._pass.carried
        self._states = {}
        if stage.is_last:
            self._measured, self._reference = carried, left if self._scores else None
            return output
        sent = (left[0].view(torch.int32),) if self._hands_reference_on and left is not None else ()
        handed = pack(output[0], carried.flatten()) if self.taps else output[0]
        return handed, *output[1:], marks_BT, *sent

    def _of_reference(self, x: Tensor) -> Tensor:
        """Of all rows [B, …], those that the reference runs."""
        by_slot = x.unflatten(0, (self._slots, -1))
        return by_slot[self._reference_slots].flatten(0, 1)

    @contextmanager
    def _passing(self, units: int, marks_SUT: Tensor, carried: Tensor | None) -> Iterator[None]:
        slots = range(self._slots) if carried is not None else self._reference_slots
        self._pass = _Pass(slots, units, marks_SUT, carried)
        try:
            yield
        finally:
            self._pass = None

    def _hook(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if (now := self._pass) is None:
            return
        states = (output[0] if isinstance(output, tuple) else output).unflatten(0, (len(now.slots), now.units))
        if now.carried is None:
            self._states[layer] = dict(zip(now.slots, states, strict=True))
            return
        found = [
            tap.measured(states, self._states[layer], now.marks_SUT) if layer in tap.layers else None
            for tap in self.taps
        ]
        none = torch.zeros(now.units, device=states.device)
        added = torch.stack([none if one is None else one[0].float() for one in found])
        self._pass = now._replace(carried=now.carried + added)
        if module.training:
            real_U = (now.marks_SUT != 0).any(2).any(0)
            for tap, one in zip(self.taps, found, strict=True):
                if one is not None:
                    self._cosines.setdefault(f"tap_cosine/{tap.name}/{layer}", []).append(one[1][real_U])


@contextmanager
def _evaluating(stage: Stage) -> Iterator[None]:
    """Inside, no dropout and no noise."""
    training = stage.training
    stage.eval()
    try:
        yield
    finally:
        stage.train(training)
