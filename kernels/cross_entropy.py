"""Cross-entropy of a linear head, without the logits of all tokens.

Takes the normed hidden state [N, D], the head's weight [V, D] and labels [N]; gives the negative log-likelihood of each
token [N].

A block of tokens at a time: a product makes its logits [n, V] in the weight's dtype, the block's kernel takes the loss
from them and overwrites them with their gradient (cross_entropy_block.py), a second product makes the hidden state's.
So with a frozen head loss and gradient cost two products in one pass, where autograd through the logits needs all
logits kept, or a third product. A trainable head recomputes its blocks in backward, where the upstream weights of its
own gradient are known.

Memory. Forward holds, beyond weight, hidden state and the hidden state's gradient, one block of logits and a few numbers
a token: for any vocabulary at most BLOCK_BYTES = 512 MiB (on the PyTorch path 32 MiB more, for rows in fp32). A block is
1024 tokens, fewer where they would take more than that: in bf16 it is 16.8 MB for V = 8192, 524 MB for V = 256 000.
Smaller blocks would read the weight too often (at 1024 tokens a product does 1024 operations a byte of the weight; a
large GPU needs some hundreds), larger ones gain nothing. Backward of a frozen head holds two gradients of the hidden
state: the saved one, and its multiple that is returned. A trainable head's holds the weight's gradient in fp32, one
block, and a product to be added to the sum, no larger than the block.

The idea of chunking the head and of a gradient in the forward pass: Liger-Kernel's fused linear cross-entropy (BSD-2)
and Apple's cut-cross-entropy (Wijmans et al. 2024, arXiv:2411.09009).

Letters: N tokens, n tokens of a block, D hidden, V vocabulary.
"""

from typing import Any

import torch
from pipeline.kernels.cross_entropy_block import IGNORED, LogitTransform, loss, parts, wide
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

__all__ = [
    "IGNORED",
    "LogitTransform",
    "linear_cross_entropy",
    "reference",
    "tokens_per_block",
]

BLOCK_TOKENS, BLOCK_BYTES = 1024, 512 * 2**20
# The least that is added to a weight's gradient at a time, in elements: more would save no memory worth its launches.
PRODUCT_ELEMENTS = 2**22


def reference(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, transform: LogitTransform
) -> Tensor:
    """The same through plain PyTorch and full logits; for tests and benchmarks. Returns fp32 [N], 0 where ignored."""
    logits = transform.apply(linear(hidden_ND, weight_VD, bias_V))
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=IGNORED, reduction="none")


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    transform: LogitTransform = LogitTransform(),
    block_tokens: int | None = None,
) -> Tensor:
    """Negative log-likelihood per token, [N]; 0 for labels of −100. Differentiable in hidden, weight and bias.

    It is the label's negative log-probability: preference losses take −nll, and differentiate it.
    Hidden, weight and bias are of one dtype, in which the logits are; all between is fp32, as is the result (fp64 for
    fp64, which only tests have). `block_tokens` is 1024, or what keeps a block within BLOCK_BYTES.
    Raises ValueError where shapes, dtypes or block_tokens do not fit.
    """
    block = _checked_block(hidden_ND, weight_VD, labels_N, block_tokens)
    inputs = (hidden_ND, weight_VD, bias_V, labels_N, transform, block)
    head_is_trained = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    if not torch.is_grad_enabled() or not (head_is_trained or hidden_ND.requires_grad):
        return _losses(*inputs, None)
    return (_TrainableHead if head_is_trained else _FrozenHead).apply(*inputs)  # type: ignore[no-any-return]


def tokens_per_block(vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens of a block where the caller names none: 1024, or as many as BLOCK_BYTES hold, at least one."""
    return max(1, min(BLOCK_TOKENS, BLOCK_BYTES // (vocabulary * dtype.itemsize)))


def _checked_block(hidden: Tensor, weight: Tensor, labels: Tensor, block_tokens: int | None) -> int:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        got = f"{list(hidden.shape)} {hidden.dtype} and {list(weight.shape)} {weight.dtype}"
        raise ValueError(f"cross-entropy: hidden state and weight must be [N, D] and [V, D] of one dtype, are {got}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"cross-entropy: labels {list(labels.shape)} must be one per token, [{len(hidden)}]")
    if block_tokens is not None and block_tokens < 1:
        raise ValueError(f"cross-entropy: a block of {block_tokens} tokens; want at least 1")
    return block_tokens or tokens_per_block(len(weight), weight.dtype)


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    block_tokens: int,
    gradient: Tensor | None,
) -> Tensor:
    """nll [N]; d nll / d hidden into `gradient` [N, D], if one is given."""
    nll = torch.empty(len(hidden), dtype=wide(hidden), device=hidden.device)
    for part in parts(len(hidden), block_tokens):
        logits = linear(hidden[part], weight, bias)
        nll[part] = loss(logits, labels[part], transform, None, gradient is not None)
        if gradient is not None:
            torch.mm(logits, weight, out=gradient[part])
        del logits  # before the next block is made
    return nll


class _FrozenHead(torch.autograd.Function):
    """Saves d nll / d hidden, [N, D] in hidden's dtype, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        block_tokens: int,
    ) -> Tensor:
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        nll = _losses(hidden, weight, bias, labels, transform, block_tokens, gradient)
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        d_hidden = torch.empty_like(gradient)
        for part in parts(len(gradient), BLOCK_TOKENS):  # on the CPU PyTorch widens what it multiplies
            torch.mul(gradient[part], upstream_N[part].unsqueeze(1), out=d_hidden[part])
        return d_hidden, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    """Saves its inputs; recomputes each block's logits in backward. Gradients of weight and bias are summed in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        block_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.transform, ctx.block_tokens = transform, block_tokens
        return _losses(hidden, weight, bias, labels, transform, block_tokens, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide(weight)) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide(weight)) if wants_bias else None
        for part in parts(len(hidden), ctx.block_tokens):
            error = linear(hidden[part], weight, bias)
            loss(error, labels[part], ctx.transform, upstream_N[part], True)
            if d_hidden is not None:
                torch.mm(error, weight, out=d_hidden[part])
            if d_bias is not None:
                d_bias += error.sum(0, dtype=wide(weight))
            if d_weight is not None:
                # By rows of the weight, so that what is added takes no more memory than the block (or 8 MB).
                for rows in parts(len(weight), max(1, max(error.numel(), PRODUCT_ELEMENTS) // weight.shape[1])):
                    d_weight[rows] += error[:, rows].T @ hidden[part]
            del error
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None, None
