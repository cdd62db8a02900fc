"""What a linear head does with one block of logits, between its two products.

Takes the block as the first product made it, raw logits [n, V] in the weight's dtype, and labels [n]; gives the negative
log-likelihood of each token and overwrites the block with its own gradient, from which the second product makes the
hidden state's. Or gives, of the same block, log-probability and entropy. Everything between load and store is fp32 (fp64
for fp64, which only tests have), and no fp32 copy of the block is made.

With z the transformed logits, m = max z and S = Σ exp(z − m): nll = log S − (z_label − m), d nll / d z = exp(z − m)/S −
one-hot, entropy = −Σ p·log p with log p = (z − m) − log S. Price in memory traffic: a row is read twice and written once.
Triton: a program takes a row in tiles; its lanes keep maximum and sum each for itself, so that the first pass waits for
nothing; the second computes gradient or entropy. PyTorch: a few rows at a time in fp32 and in place, so that a block
costs four times 8 MiB at most beside itself.

Source of maximum and sum in one pass: Milakov & Gimelshein 2018 (arXiv:1805.02867), algorithm 3; of the gradient in
place of the logits: Liger-Kernel's fused linear cross-entropy (BSD-2).

Letters: n tokens of the block, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pipeline.kernels.dispatch import Kernel, takes_triton
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path serves every device
    triton = None

IGNORED = -100
# Elements of the rows that the PyTorch path has in fp32 at a time: 8 MiB, which a processor's cache may hold.
ROWS_ELEMENTS = 2**21
TILE = 4096  # elements of a row that a Triton program takes at a time: 16 a thread


class LogitTransform(NamedTuple):
    """logits = after · softcap(before · (h·Wᵀ + bias)), softcap(z) = cap · tanh(z / cap) where `cap` is set."""

    before: float = 1.0
    cap: float | None = None
    after: float = 1.0

    def apply(self, raw: Tensor) -> Tensor:
        """Transformed logits of `raw`, at least fp32, differentiable."""
        logits = raw.to(wide(raw)) * self.before
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


def wide(x: Tensor) -> torch.dtype:
    """The dtype of everything that is computed from x: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def parts(length: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `length`."""
    return (slice(start, start + size) for start in range(0, length, size))


def loss(
    logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform, scale_n: Tensor | None, wants_gradient: bool
) -> Tensor:
    """nll [n] in fp32, 0 where ignored, of a block of raw logits, which is used up.

    Where the gradient is wanted, the block holds scale · d nll / d raw afterwards (0 where ignored; no scale is 1).
    """
    return LOSS(takes_triton(logits_nV), logits_nV, labels_n, transform, scale_n, wants_gradient)


def statistics(logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the label (0 where ignored), entropy and log S, each [n] in fp32, of a block, which is used up."""
    return STATISTICS(takes_triton(logits_nV), logits_nV, labels_n, transform)


# PyTorch: the reference, and the path of the CPU


def pytorch_loss(
    logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform, scale_n: Tensor | None, wants_gradient: bool
) -> Tensor:
    """Like `loss`. A label that is not a token raises what PyTorch's gather raises."""
    nll = torch.empty(len(logits_nV), dtype=wide(logits_nV), device=logits_nV.device)
    for part in parts(len(logits_nV), max(1, ROWS_ELEMENTS // logits_nV.shape[1])):
        raw, ignored = logits_nV[part], labels_n[part] == IGNORED
        value, slope = _shifted(raw, transform)
        target = labels_n[part].masked_fill(ignored, 0).unsqueeze(1)
        at_target = value.gather(1, target)
        total = value.exp_().sum(1, keepdim=True)
        nll[part] = (total.log() - at_target).squeeze(1).masked_fill_(ignored, 0)
        if wants_gradient:
            share = torch.ones_like(total) if scale_n is None else scale_n[part].unsqueeze(1).to(total.dtype)
            share = share if isinstance(slope, Tensor) else share * slope
            value.mul_(share / total).scatter_add_(1, target, -share)
            if isinstance(slope, Tensor):
                value.mul_(slope)
            raw.copy_(value.masked_fill_(ignored.unsqueeze(1), 0))
    return nll


def pytorch_statistics(logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Like `statistics`. A label that is not a token raises what PyTorch's gather raises."""
    found = torch.empty(3, len(logits_nV), dtype=wide(logits_nV), device=logits_nV.device)
    for part in parts(len(logits_nV), max(1, ROWS_ELEMENTS // logits_nV.shape[1])):
        ignored = labels_n[part] == IGNORED
        value, _ = _shifted(logits_nV[part], transform)
        log_total = value.exp().sum(1, keepdim=True).log_()
        value.sub_(log_total)
        target = labels_n[part].masked_fill(ignored, 0).unsqueeze(1)
        found[0, part] = value.gather(1, target).squeeze(1).masked_fill_(ignored, 0)
        found[1, part] = torch.special.entr(value.exp_()).sum(1)
        found[2, part] = log_total.squeeze(1)
    return found[0], found[1], found[2]


def _shifted(raw: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """z − max z in fp32 (in `raw` itself if it is that), and d z / d raw."""
    value = raw.to(wide(raw))
    slope = transform.apply_in_place(value)
    return value.sub_(value.amax(1, keepdim=True)), slope


# Triton

if triton is not None:
    _IGNORED = tl.constexpr(IGNORED)
    # Below every logit, and finite: the difference of two of it is 0, not NaN.
    _LOWEST = tl.constexpr(-3.0e38)

    @triton.jit
    def _transformed(raw, before, cap, after, CAPPED: tl.constexpr) -> tuple:
        """z and d z / d raw. tanh u = sign(u)·(1 − e)/(1 + e) and 1 − tanh² u = 4e/(1 + e)² with e = exp(−2|u|)."""
        if CAPPED:
            u = raw * (before / cap)
            e = tl.exp(-2.0 * tl.abs(u))
            tanh = tl.where(u < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
            z = tanh * (cap * after)
            slope = 4.0 * e / ((1.0 + e) * (1.0 + e)) * (before * after)
        else:
            slope = before * after
            z = raw * slope
        return z, slope

    @triton.jit
    def _largest_and_total(row, V, before, cap, after, CAPPED: tl.constexpr, BLOCK: tl.constexpr) -> tuple:
        """m = max z and S = Σ exp(z − m) of a row: each lane over its own columns, then over the lanes."""
        largest = tl.full([BLOCK], _LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            raw = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
            z, _ = _transformed(raw, before, cap, after, CAPPED)
            z = tl.where(column < V, z, float("-inf"))
            higher = tl.maximum(largest, z)
            total = total * tl.exp(largest - higher) + tl.exp(z - higher)
            largest = higher
        m = tl.max(largest, axis=0)
        return m, tl.sum(total * tl.exp(largest - m), axis=0)

    @triton.jit
    def _at_label(row, label, V, before, cap, after, CAPPED: tl.constexpr) -> tl.tensor:
        """z of the label; NaN for a label that is not a token."""
        raw = tl.load(row + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        z, _ = _transformed(raw, before, cap, after, CAPPED)
        return z

    @triton.jit
    def _loss_kernel(
        logits,
        labels,
        scale,
        nll,
        V,
        before,
        cap,
        after,
        CAPPED: tl.constexpr,
        SCALED: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """A program a row."""
        n = tl.program_id(0)
        row = logits + n.to(tl.int64) * V
        label = tl.load(labels + n)
        counted = label != _IGNORED
        z_label = _at_label(row, label, V, before, cap, after, CAPPED)
        m, total = _largest_and_total(row, V, before, cap, after, CAPPED, BLOCK)
        tl.store(nll + n, tl.where(counted, tl.log(total) - (z_label - m), 0.0))
        if GRADIENT:
            factor = 1.0
            if SCALED:
                factor = tl.load(scale + n).to(tl.float32)
            for start in range(0, V, BLOCK):
                column = start + tl.arange(0, BLOCK)
                raw = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
                z, slope = _transformed(raw, before, cap, after, CAPPED)
                error = tl.exp(z - m) / total
                error = tl.where(column == label, error - 1.0, error) * slope * factor
                error = tl.where(counted, error, 0.0)
                tl.store(row + column, error.to(logits.dtype.element_ty), mask=column < V)

    @triton.jit
    def _statistics_kernel(
        logits, labels, found, N, V, before, cap, after, CAPPED: tl.constexpr, BLOCK: tl.constexpr
    ) -> None:
        """A program a row; found is [3, N]."""
        n = tl.program_id(0)
        row = logits + n.to(tl.int64) * V
        label = tl.load(labels + n)
        m, total = _largest_and_total(row, V, before, cap, after, CAPPED, BLOCK)
        log_total = tl.log(total)
        at_label = _at_label(row, label, V, before, cap, after, CAPPED) - m - log_total
        entropy = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            raw = tl.load(row + column, mask=column < V, other=0.0).to(tl.float32)
            z, _ = _transformed(raw, before, cap, after, CAPPED)
            log_p = z - m - log_total
            p = tl.exp(log_p)
            entropy -= tl.where((column < V) & (p > 0.0), p * log_p, 0.0)
        tl.store(found + n, tl.where(label != _IGNORED, at_label, 0.0))
        tl.store(found + N + n, tl.sum(entropy, axis=0))
        tl.store(found + 2 * N + n, log_total)


def _tiles(logits_nV: Tensor, transform: LogitTransform) -> tuple[tuple, dict]:
    """Arguments of both kernels that come from the transform and V."""
    before, cap, after = transform
    v = logits_nV.shape[1]
    block = min(TILE, triton.next_power_of_2(v))
    constants = {"CAPPED": cap is not None, "BLOCK": block, "num_warps": min(8, max(1, block // 512))}
    return (v, float(before), float(cap or 1.0), float(after)), constants


def triton_loss(
    logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform, scale_n: Tensor | None, wants_gradient: bool
) -> Tensor:
    """Like `loss`, in one kernel, which holds only nll beside the block. NaN for a label that is not a token."""
    nll = torch.empty(len(logits_nV), dtype=torch.float32, device=logits_nV.device)
    if len(logits_nV):
        arguments, constants = _tiles(logits_nV, transform)
        scale = None if scale_n is None else scale_n.contiguous()
        with torch.cuda.device_of(logits_nV):
            _loss_kernel[(len(logits_nV),)](
                logits_nV,
                labels_n.contiguous(),
                scale,
                nll,
                *arguments,
                SCALED=scale is not None,
                GRADIENT=wants_gradient,
                **constants,
            )
    return nll


def triton_statistics(logits_nV: Tensor, labels_n: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Like `statistics`, in one kernel, which leaves the block as it is. NaN for a label that is not a token."""
    found = torch.empty(3, len(logits_nV), dtype=torch.float32, device=logits_nV.device)
    if len(logits_nV):
        arguments, constants = _tiles(logits_nV, transform)
        with torch.cuda.device_of(logits_nV):
            _statistics_kernel[(len(logits_nV),)](
                logits_nV, labels_n.contiguous(), found, len(logits_nV), *arguments, **constants
            )
    return found[0], found[1], found[2]


LOSS, STATISTICS = Kernel(pytorch_loss, triton_loss), Kernel(pytorch_statistics, triton_statistics)
