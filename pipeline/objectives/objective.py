"""What an objective is: named tensors in, named outputs out, on the last stage.

Takes a micro-batch's tensors by name; gives a loss to train on and, for evaluation, what is measured of each row. Nothing
here or in an objective knows how tensors travel: `training/engine/wires.py` packs them into DeepSpeed's tuples and unpacks
them by the names an objective gives.
"""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

Tensors = Mapping[str, Tensor]


class Objective(Protocol):
    """B rows, T tokens, D hidden size."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the micro-batch's tensors that the last stage needs (see `data.microbatch.MicroBatch.tensors`)."""

    @property
    def first_reads(self) -> tuple[str, ...]:
        """Names of those that the first stage is handed beside `model.stage.FIRST_READS`, for hooks on the stages."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what `row_sums` gives."""

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """fp32 scalar: this micro-batch's part of the step's loss. Their mean over micro-batches and replicas is the loss."""

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """For each of `measures`, fp32 [B]: its sum over a row's targets (or of a unit, [U]); filler adds 0."""

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """What is shown of a set, 'loss' among it, from each measure's sum over all its rows, which have so many targets."""
