"""Language modelling: the next token's negative log-likelihood, from the normed hidden state on the last stage.

Takes the hidden state [B, T, D], the head and a micro-batch's labels; gives the loss in fp32. The logits of a whole
chunk are never made (kernels/cross_entropy.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from pipeline.kernels.cross_entropy import IGNORED, LogitTransform, linear_cross_entropy
from pipeline.objectives.objective import Tensors


@dataclass(frozen=True)
class LanguageModelling:
    """An `Objective`. `head`: None on stages that compute no loss. `train_scale`: of the logits, in training only."""

    head: nn.Linear | None
    transform: LogitTransform
    train_scale: float = 1.0

    reads: ClassVar[tuple[str, ...]] = ("labels", "loss_scale")
    first_reads: ClassVar[tuple[str, ...]] = ()
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """fp32 scalar: loss_scale · Σ token losses.

        loss_scale carries the step's count of targets, so that the mean over micro-batches and replicas is the mean over them.
        """
        transform = self.transform._replace(after=self.train_scale)
        return self._token_losses(hidden_BTD, given, transform).sum() * given["loss_scale"]

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """'loss', fp32 [B]: the sum of each row's token losses."""
        return {"loss": self._token_losses(hidden_BTD, given, self.transform).sum(dim=1)}

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """'loss', in nats a token."""
        return {"loss": totals["loss"] / targets}

    def _token_losses(self, hidden_BTD: Tensor, given: Tensors, transform: LogitTransform) -> Tensor:
        assert self.head is not None, "only the last stage computes a loss"
        return token_losses(hidden_BTD, given["labels"], self.head, transform)


def token_losses(hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Linear, transform: LogitTransform) -> Tensor:
    """fp32 [B, T]: at place t the loss of predicting labels[t + 1]; 0 at the last place and before an ignored label."""
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    losses_N = linear_cross_entropy(hidden_BTD.flatten(0, 1), head.weight, head.bias, next_BT.flatten(), transform)
    return losses_N.view_as(labels_BT)
