"""Weights as 4-bit training sees them: rounded to NormalFloat-4 and back.

Takes a stored float tensor; gives its values after bitsandbytes' nf4 and its inverse, a block of rows at a time: the
weights W of the function y = W·x that a QLoRA run trained an adapter on. Plain torch, without bitsandbytes.

nf4 (QLoRA, arXiv 2305.14314, section 3): blocks of 64 consecutive values, each value / absmax of its block rounded to
the nearest of 16 quantiles of the normal distribution. With double quantisation the absmax, less their mean, are
stored in 8 bits themselves: blocks of 256, a code of 256 values (dynamic tree, arXiv 1511.04561).
"""

import math
from collections.abc import Iterator

import torch

from pipeline.console import UserError
from pipeline.formats.safetensors import StoredTensor, read_floats

BLOCK = 64  # weights that share a scale (QLoRA, Dettmers et al. 2023, section 3)
ABSMAX_BLOCK = 256  # scales that share one, where they are quantised as well ('double quantisation')
SMALLEST_ABSMAX = 1e-38  # of a block of zeros, so that none is divided by zero
# Quantiles of N(0, 1), scaled to [-1, 1], with an exact zero: bitsandbytes' table, to the last bit of fp32.
CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


def dynamic_code() -> torch.Tensor:
    """The 8-bit code [256] of the absmax, ascending, fp32: 7 decades, each with twice the values of the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        decade = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_CODE = dynamic_code()


def quantise(values: torch.Tensor, code: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 values [N] → indices into `code` [N] (int32) and the absmax of each block [⌈N / block⌉], fp32.

    `code` is ascending, in [-1, 1]. The last block may be short.
    """
    padded = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    absmax = absmax_of(values, block)
    scaled = padded * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    rest = len(values) % block
    if rest:  # bitsandbytes divides in a short block, and multiplies by the inverse in the others
        scaled[-1] = padded[-1] / absmax[-1].clamp(min=SMALLEST_ABSMAX)
    return _nearest(scaled.clamp_(-1, 1).view(-1), code)[: len(values)], absmax


def _nearest(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code by binary search, the lower of two as near; several times as fast as torch.bucketize."""
    middles, indices = (code[:-1] + code[1:]) / 2, torch.zeros(len(values), dtype=torch.int32)
    half = len(code) // 2  # a power of two, as len(code) is
    while half:
        indices += (values > middles.index_select(0, indices + (half - 1))).int().mul_(half)
        half //= 2
    return indices


def dequantise(indices: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, block: int) -> torch.Tensor:
    """The inverse: code[index] · absmax of the block, fp32 [N]."""
    padded = torch.nn.functional.pad(indices, (0, -len(indices) % block)).view(-1, block)
    return (code.index_select(0, padded.view(-1)).view(-1, block) * absmax[:, None]).view(-1)[: len(indices)]


def double_quantised(absmax: torch.Tensor) -> torch.Tensor:
    """absmax [N] as they come back from 8 bits: quantised less their mean, which is kept in fp32."""
    mean = absmax.mean()
    indices, scales = quantise(absmax - mean, DYNAMIC_CODE, ABSMAX_BLOCK)
    return dequantise(indices, scales, DYNAMIC_CODE, ABSMAX_BLOCK) + mean


def read_nf4(
    tensor: StoredTensor, columns: int, piece_items: int, *, double_quant: bool, held: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """The values of a float `tensor` [rows, columns] after nf4 and back, in blocks of rows.

    `held`: the dtype in which the training had the weights before it rounded them, and that of the result; None: as they
    are stored. It matters: of normal weights held in bf16, 0.4% get another code than in fp16 or fp32, and these
    together differ by 2% of the weights' size. A block has about `piece_items` values, and a whole number of nf4 blocks.
    With `double_quant` the tensor is read twice. Raises UserError where a value is NaN or infinite.
    """
    together = BLOCK // math.gcd(BLOCK, columns)  # so many rows are a whole number of nf4 blocks
    rows = together * max(1, piece_items // (columns * together))

    def blocks() -> Iterator[torch.Tensor]:
        return (block.to(held or block.dtype) for block in read_floats(tensor, columns, rows * columns))

    stored = None
    if double_quant:
        # Filled in place: a small tensor kept from every block would leave gaps between the freed ones, of twice the weight.
        stored, first = torch.empty(-(-math.prod(tensor.shape) // BLOCK)), 0
        for block in blocks():
            found = absmax_of(block.float().view(-1), BLOCK)
            stored[first : first + len(found)] = found
            first += len(found)
        stored = double_quantised(stored)
    first = 0
    for block in blocks():
        indices, absmax = quantise(block.float().view(-1), CODE, BLOCK)
        if not torch.isfinite(absmax).all():
            raise UserError(f"{tensor.name} holds NaN or infinite values: it has no 4-bit form.")
        scales = absmax if stored is None else stored[first : first + len(absmax)]
        first += len(absmax)
        yield dequantise(indices, scales, CODE, BLOCK).to(block.dtype).view(-1, columns)


def absmax_of(values: torch.Tensor, block: int) -> torch.Tensor:
    """The largest |value| of each block of `values` [N]; the last block may be short."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block).abs().amax(dim=1)
