"""Cross-entropy of a linear head, without the logits of all tokens.

Takes the normed hidden state [N, D], the head's weight [V, D] and labels [N]; gives the negative log-likelihood of each
token [N] in fp32. Peak memory beyond weight and hidden state is one block of logits [block, V], forward and backward.

With a frozen head the gradient of the hidden state is computed in the same pass as the loss, while the block of logits
is still there: two matrix products in all, where autograd through the logits needs the logits kept, or a third
product. A trainable head recomputes its blocks in backward, because its own gradient needs the upstream weights.

The idea of chunking the head and of a gradient in the forward pass: Liger-Kernel's fused linear cross-entropy (BSD-2)
and Apple's cut-cross-entropy (Wijmans et al. 2024, arXiv:2411.09009). Gradients of the cross-entropy: softmax − one-hot.

Letters: N tokens, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
# Large enough that re-reading the head's weight for each block costs less than the products themselves.
BLOCK_TOKENS = 1024


class LogitTransform(NamedTuple):
    """logits = after · softcap(before · (h·Wᵀ + bias)), softcap(z) = cap · tanh(z / cap) where `cap` is set."""

    before: float = 1.0
    cap: float | None = None
    after: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """Transformed logits of `raw`, fp32, differentiable."""
        logits = raw.float() * self.before
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits * self.after

    def apply_in_place(self, logits: Tensor) -> Tensor | float:
        """Transform fp32 `logits` where they are; returns d logits / d raw (a number where it is constant)."""
        slope = self.before * self.after
        if self.cap is None:
            if slope != 1.0:
                logits.mul_(slope)
            return slope
        logits.mul_(self.before / self.cap).tanh_()
        derivative = logits.square().neg_().add_(1).mul_(slope)
        logits.mul_(self.cap * self.after)
        return derivative


def reference(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, transform: LogitTransform
) -> Tensor:
    """The same through plain PyTorch and full logits; for tests and benchmarks. Returns fp32 [N], 0 where ignored."""
    logits = transform.apply(torch.nn.functional.linear(hidden_ND, weight_VD, bias_V))
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="none")


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor,
    transform: LogitTransform = LogitTransform(), block_tokens: int = BLOCK_TOKENS,
) -> Tensor:  # fmt: skip
    """Negative log-likelihood per token, fp32 [N]; 0 for labels of −100. Differentiable in hidden, weight and bias.

    The logits of a block are computed in the weight's dtype, everything after them in fp32.
    """
    trainable = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    function = _TrainableHead if trainable and torch.is_grad_enabled() else _FrozenHead
    return function.apply(hidden_ND, weight_VD, bias_V, labels_N, transform, block_tokens)


def _block(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """One block of tokens: nll [n] and d nll / d raw logits [n, V], fp32; both zero where the label is ignored.

    In place throughout: besides the product in the weight's dtype there is one fp32 block (two with a soft cap).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    slope = transform.apply_in_place(logits)
    counted = labels != IGNORED
    target = labels.clamp_min(0).unsqueeze(1)
    largest = logits.amax(dim=1, keepdim=True)
    at_target = logits.gather(1, target) - largest
    error = logits.sub_(largest).exp_()
    total = error.sum(dim=1, keepdim=True)
    nll = (total.log() - at_target).squeeze(1) * counted
    error.div_(total)
    error.scatter_add_(1, target, torch.full_like(target, -1, dtype=error.dtype))
    return nll, error.mul_(slope).mul_(counted.unsqueeze(1))


class _FrozenHead(torch.autograd.Function):
    """Saves d nll / d hidden, [N, D] in hidden's dtype, and nothing else."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, transform, block_tokens):  # noqa: ANN205
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), block_tokens):
            part = slice(start, start + block_tokens)
            nll[part], error = _block(hidden[part], weight, bias, labels[part], transform)
            if gradient is not None:
                gradient[part] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(*([gradient] if gradient is not None else []))
        return nll

    @staticmethod
    def backward(ctx, upstream_N):  # noqa: ANN205
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream_N.unsqueeze(1)).to(gradient.dtype), None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Saves its inputs; recomputes each block's logits in backward. The weight's gradient is summed in fp32."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, transform, block_tokens):  # noqa: ANN205
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.transform, ctx.block_tokens = transform, block_tokens
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), block_tokens):
            part = slice(start, start + block_tokens)
            nll[part] = _block(hidden[part], weight, bias, labels[part], transform)[0]
        return nll

    @staticmethod
    def backward(ctx, upstream_N):  # noqa: ANN205
        hidden, weight, bias, labels = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        for start in range(0, len(hidden), ctx.block_tokens):
            part = slice(start, start + ctx.block_tokens)
            _, raw = _block(hidden[part], weight, bias, labels[part], ctx.transform)
            raw.mul_(upstream_N[part].unsqueeze(1))
            if d_bias is not None:
                d_bias += raw.sum(0)
            raw = raw.to(weight.dtype)
            d_hidden[part] = raw @ weight
            d_weight += raw.T @ hidden[part]
        d_bias = d_bias.to(bias.dtype) if d_bias is not None else None
        return d_hidden, d_weight.to(weight.dtype), d_bias, None, None, None
