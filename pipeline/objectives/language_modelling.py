"""Language modelling: the next token's negative log-likelihood, from the normed hidden state on the last stage.

Takes the hidden state [B, T, D], the head and a micro-batch's labels; gives the loss in fp32. The logits of a whole
chunk are never made (kernels/cross_entropy.py).
"""

from torch import Tensor, nn

from pipeline.kernels.cross_entropy import IGNORED, LogitTransform, linear_cross_entropy


def token_losses(hidden_BTD: Tensor, labels_BT: Tensor, head: nn.Linear, transform: LogitTransform) -> Tensor:
    """fp32 [B, T]: at position t the loss of predicting labels[t + 1]; 0 at the last position and before an ignored label."""
    next_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    losses_N = linear_cross_entropy(hidden_BTD.flatten(0, 1), head.weight, head.bias, next_BT.flatten(), transform)
    return losses_N.view_as(labels_BT)


def training_loss(
    hidden_BTD: Tensor, labels: tuple[Tensor, Tensor], head: nn.Linear, transform: LogitTransform
) -> Tensor:
    """fp32 scalar: loss_scale · Σ token losses. `labels` = (labels [B, T], loss_scale []).

    loss_scale carries the step's token count, so that the mean over micro-batches and replicas is the mean over tokens.
    """
    labels_BT, loss_scale = labels
    return token_losses(hidden_BTD, labels_BT, head, transform).sum() * loss_scale


def row_losses(hidden_BTD: Tensor, labels: tuple[Tensor, Tensor], head: nn.Linear, transform: LogitTransform) -> Tensor:
    """fp32 [B]: the sum of each row's token losses, for evaluation."""
    return token_losses(hidden_BTD, labels[0], head, transform).sum(dim=1)
