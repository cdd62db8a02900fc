"""An objective with the loss of a mixture's routers added to it, in training.

Takes an objective and where the routers' loss of the micro-batch that has just run comes from (model/router_loss.py).
Evaluation measures the objective's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.objectives.objective import Objective, Tensors


@dataclass(frozen=True)
class WithRouterLoss:
    """An `Objective`: `objective`'s, and `coefficient` times the routers' loss, of which each micro-batch has its own."""

    objective: Objective
    coefficient: float
    router_loss: Callable[[], Tensor]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.objective.reads

    @property
    def first_reads(self) -> tuple[str, ...]:
        return self.objective.first_reads

    @property
    def measures(self) -> tuple[str, ...]:
        return self.objective.measures

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """fp32 scalar."""
        return self.objective.loss(hidden_BTD, given) + self.coefficient * self.router_loss()

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """The objective's."""
        return self.objective.row_sums(hidden_BTD, given)

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """The objective's."""
        return self.objective.means(totals, targets)
