"""Losses of hidden states: taps on layers' outputs, each a distance between the policy's state and a reference's.

A tap is of one row of a unit, and compares it with a row of the same unit under the reference. What the layers measure, a number
for each unit, is summed from stage to stage (training/stage/beside.py) and comes out beside the last stage's hidden state. The
loss of a step is

    L = Σ over taps of weight · schedule(p) · mean over the step's units of Σ over the tap's layers of the distance,

p the part of the run that is done, and what preference losses at the head add (preference.py), if there are any: without them
the head is not run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.kernels.cross_entropy import IGNORED
from pipeline.objectives import distances
from pipeline.objectives.distances import BETWEEN, Numbers
from pipeline.objectives.objective import Tensors
from pipeline.objectives.preference import Preference, StepTotals

IS_TOKEN, IS_ANSWER = 1, 2  # bits of a place's mark
# Of p, from 0 at the first step towards 1 at the end of the run.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "1 - p/2": lambda p: 1 - p / 2,
    "p/2": lambda p: p / 2,
    "p": lambda p: p,
    "1 - p": lambda p: 1 - p,
}
PLAIN = Numbers()
EVALUATED_AT = 0.5  # p in evaluation: a schedule's mean, so that a run's evaluations can be compared


@dataclass(frozen=True)
class Tap:
    """`of`: the policy's row of a unit (its slot), `to`: the reference's, at the outputs of these layers, by their index.

    Of a distance between answers (`distances.BETWEEN`) they are the two answers, under both. `align`: tokens are compared
    with each other, or the rows' means. `relative`: divided by the reference's mean norm.
    """

    name: str
    of: int
    to: int
    layers: tuple[int, ...]
    distance: str
    answers_only: bool = True
    align: Literal["token", "mean"] = "token"
    weight: float = 1.0
    schedule: str = "constant"
    relative: bool = False
    numbers: Numbers = PLAIN

    @property
    def reference_slots(self) -> set[int]:
        """Which rows of a unit the reference runs for it."""
        return {self.of, self.to} if self.distance in BETWEEN else {self.to}

    def coefficient(self, progress: float) -> float:
        """weight · schedule(p)."""
        return self.weight * SCHEDULES[self.schedule](progress)

    def measured(
        self, policy_SUTD: Tensor, reference: Mapping[int, Tensor], marks_SUT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """At one layer, ([U]: the distance, with a gradient by the policy's states; [U]: a cosine, for the log).

        `reference`: states [U, T, D] by slot. `marks_SUT`: int8, of each place IS_TOKEN and IS_ANSWER. Filler has 0.
        """
        mask_SUT = (marks_SUT & (IS_ANSWER if self.answers_only else IS_TOKEN)) != 0
        of_UT, to_UT = mask_SUT[self.of], mask_SUT[self.to]
        x_UTD, y_UTD = policy_SUTD[self.of], reference[self.to]
        if self.distance in BETWEEN:
            other_UTD = policy_SUTD[self.to]
            a_UD = distances.masked_mean(x_UTD, of_UT) - distances.masked_mean(other_UTD, to_UT)
            v_UD = distances.masked_mean(reference[self.of], of_UT) - distances.masked_mean(y_UTD, to_UT)
            return distances.between(self.distance, a_UD, v_UD)
        if self.align == "mean":
            x_UTD, y_UTD = (distances.masked_mean(z, m)[:, None] for z, m in ((x_UTD, of_UT), (y_UTD, to_UT)))
            mask_UT = (of_UT.any(1) & to_UT.any(1))[:, None]
        else:
            mask_UT = of_UT & to_UT
        found_U, cosine_U = distances.of_rows(self.distance, x_UTD, y_UTD, mask_UT, self.numbers)
        if self.relative:
            norm_U = distances.mean_norm(y_UTD, mask_UT)
            found_U = found_U / torch.where(norm_U > 0, norm_U, 1)
        return found_U, cosine_U


@dataclass(frozen=True)
class WithTaps:
    """An `Objective`: taps, and the losses of answers' log-probabilities `objective`, where there are any.

    `carried`: takes what the layers have measured of the micro-batch that has just run, fp32 [K, U]. `step`: what training
    measures on its way, and how far the run is; the same one as `objective`'s.
    """

    objective: Preference | None
    taps: tuple[Tap, ...]
    slots: int
    step: StepTotals
    carried: Callable[[], Tensor]

    first_reads: ClassVar[tuple[str, ...]] = ("marks",)

    @property
    def reads(self) -> tuple[str, ...]:
        """Those of both."""
        others = self.objective.reads if self.objective else ()
        return tuple(dict.fromkeys(("labels", "unit_scale", *others)))

    @property
    def measures(self) -> tuple[str, ...]:
        """Of each tap its distance, and what it comes to in the loss."""
        own = [name for tap in self.taps for name in (tap.name, _weighted(tap), _coefficient(tap))]
        return ("tapped units", *own, *(self.objective.measures if self.objective else ()))

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """fp32 scalar: unit_scale · Σ of taps and units, and the other losses."""
        found = self._columns(given, self.step.progress)
        self.step.add(found)
        tapped = sum(found[_weighted(tap)].sum() for tap in self.taps) * given["unit_scale"]
        return tapped + self.objective.loss(hidden_BTD, given) if self.objective else tapped

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """fp32 [U] for each of `measures`; 0 for filler. Taps weigh what they do in the mean of a run."""
        others = self.objective.row_sums(hidden_BTD, given) if self.objective else {}
        return self._columns(given, EVALUATED_AT) | others

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """'loss'; of each tap 'tap/<name>', the distance summed over its layers, 'tap/<name>/coefficient', weight and schedule,
        and 'tap/<name>/weighted', its part of the loss; what the other losses say."""
        found = self.objective.means(totals, targets) if self.objective else {"loss": 0.0}
        units = max(1.0, totals["tapped units"])
        for tap in self.taps:
            found[f"tap/{tap.name}"] = totals[tap.name] / units
            found[f"tap/{tap.name}/weighted"] = weighted = totals[_weighted(tap)] / units
            found[f"tap/{tap.name}/coefficient"] = totals[_coefficient(tap)] / units
            found["loss"] += weighted
        return found

    def _columns(self, given: Tensors, progress: float) -> dict[str, Tensor]:
        """fp32 [U] each; 0 for filler."""
        labels_BT = given["labels"]
        real_U = (labels_BT[:, 1:] != IGNORED).any(1).view(self.slots, -1).any(0)
        found = {"tapped units": real_U.float()}
        for tap, measured_U in zip(self.taps, self.carried(), strict=True):
            found[tap.name] = torch.where(real_U, measured_U, 0)
            found[_weighted(tap)] = tap.coefficient(progress) * found[tap.name]
            found[_coefficient(tap)] = tap.coefficient(progress) * found["tapped units"]
        return found


def _weighted(tap: Tap) -> str:
    return f"{tap.name}, weighted"


def _coefficient(tap: Tap) -> str:
    return f"{tap.name}, coefficient"
