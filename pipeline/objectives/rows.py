"""Log-probabilities of rows' targets, summed by row, from the normed hidden state on the last stage.

The head runs over the places before targets alone, so that a prompt costs nothing there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.kernels.cross_entropy import IGNORED, LogitTransform, linear_cross_entropy, tokens_per_block
from pipeline.objectives.objective import Tensors


def log_probs(
    hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Linear, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """(fp32 [B]: Σ log p of each row's targets, int64 [B]: how many they are), with a gradient by the hidden state."""
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    places_N = (next_BT.flatten() != IGNORED).nonzero().squeeze(1)
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1)[places_N], next_BT.flatten()[places_N]
    losses_N = linear_cross_entropy(hidden_ND, head.weight, head.bias, labels_N, transform)
    # Every place once, so that what is summed, and in which order, does not depend on a device's atomics.
    losses_BT = torch.zeros(next_BT.numel(), device=losses_N.device).index_put((places_N,), losses_N).view_as(next_BT)
    return -losses_BT.sum(dim=1), (next_BT != IGNORED).sum(dim=1)


@torch.no_grad()
def token_facts(
    hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Linear, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's targets, summed, fp32 [B]: the entropy of what is predicted, in nats; the mean of its logits; how often the
    likeliest token is the target. A block of logits at a time."""
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    places_N = (next_BT.flatten() != IGNORED).nonzero().squeeze(1)
    facts = torch.zeros(3, next_BT.numel(), device=hidden_BTD.device)
    for places in places_N.split(tokens_per_block(head.out_features, head.weight.dtype)):
        logits = transform.apply(head(hidden_BTD.flatten(0, 1)[places])).float()
        shares = logits.softmax(-1)
        facts[0, places] = logits.logsumexp(-1) - (shares * logits).sum(-1)
        facts[1, places] = logits.mean(-1)
        facts[2, places] = (logits.argmax(-1) == next_BT.flatten()[places]).float()
    entropy_B, logits_B, right_B = facts.view(3, *next_BT.shape).sum(-1)
    return entropy_B, logits_B, right_B


@dataclass(frozen=True)
class RowScores:
    """An `Objective` that measures alone: the log-probabilities of units' rows, of U units with `slots` rows each."""

    head: nn.Linear | None
    transform: LogitTransform
    slots: int

    reads: ClassVar[tuple[str, ...]] = ("labels",)
    first_reads: ClassVar[tuple[str, ...]] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        return tuple(f"slot {number}" for number in range(self.slots))

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """Nothing is trained by it."""
        raise NotImplementedError("rows are scored in evaluation")

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """fp32 [U] for each slot."""
        assert self.head is not None, "only the last stage scores"
        sums_B, _ = log_probs(hidden_BTD, given["labels"], self.head, self.transform)
        return dict(zip(self.measures, sums_B.view(self.slots, -1), strict=True))

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """As they are summed up."""
        return dict(totals)
