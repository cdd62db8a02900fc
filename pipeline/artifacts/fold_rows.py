"""The arithmetic of a fold, a block of rows at a time, and what survived the last rounding.

Takes a `Change`; gives the new tensor's rows, rounded once, and the figures of how much of ΔW is in them. Everything is
computed in fp32 without TF32; a block and the R × D_in projection are all that is in memory.

Both kinds are W' = W + s·B·M with M [R, D_in]:  M = A (lora),  M = A·W (multiplicative; (I + sBA)W = W + sB(AW)).
B·(A·W) takes 4·R operations an element where (B·A)·W takes 2·D_out.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pipeline.artifacts.adapter_files import Kind
from pipeline.artifacts.fold_plan import Change
from pipeline.artifacts.safetensors_stream import FLOATS, StoredTensor, read_floats
from pipeline.console import UserError

BLOCK_ITEMS = 2**19  # values of a block. 2 MiB in fp32: about ten such arrays are alive at a time


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Matrix products of fp32 in fp32: no TF32 on a GPU, no bf16 in oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def additive_projection(A: torch.Tensor, rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """M = A, whatever the weight."""
    return A


def multiplicative_projection(A: torch.Tensor, rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """M = A·W [R, D_in] from the rows of W [D_out, D_in] in blocks: the sum of A[:, block]·W[block, :]."""
    first, total = 0, None
    for block in rows:
        part = A[:, first : first + len(block)] @ block
        total = part if total is None else total.add_(part)
        first += len(block)
    assert total is not None and first == A.shape[1]
    return total


PROJECTIONS: dict[Kind, Callable[[torch.Tensor, Iterable[torch.Tensor]], torch.Tensor]] = {
    "lora": additive_projection,
    "multiplicative_lora": multiplicative_projection,
}


@dataclass
class Survival:
    """How much of a change ΔW is in the written weight W': Frobenius products over the tensor, D = W' − W.

    gain = ⟨D, ΔW⟩ / ‖ΔW‖²: the strength at which the change arrived, 1 where nothing is lost.
    error = ‖D − ΔW‖ / ‖ΔW‖: with the noise of rounding in it.
    unchanged: share of weights with W' = W.  size = ‖ΔW‖ / ‖W‖.
    """

    name: str
    products: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("D·Δ", "Δ·Δ", "E·E", "W·W"), 0.0))
    equal: int = 0
    items: int = 0

    def add(self, before: torch.Tensor, change: torch.Tensor, after: torch.Tensor) -> None:
        """Count a block: W and ΔW in fp32, and W' as rounded. Sums of products are kept in fp64."""
        difference = after.float() - before
        error = difference - change
        for key, left, right in (
            ("D·Δ", difference, change), ("Δ·Δ", change, change), ("E·E", error, error), ("W·W", before, before),
        ):  # fmt: skip
            self.products[key] += float(torch.sum(left * right, dtype=torch.float64))
        self.equal += int((difference == 0).sum())
        self.items += before.numel()

    @property
    def gain(self) -> float:
        return self.products["D·Δ"] / self.products["Δ·Δ"] if self.products["Δ·Δ"] else math.nan

    @property
    def error(self) -> float:
        return math.sqrt(self.products["E·E"] / self.products["Δ·Δ"]) if self.products["Δ·Δ"] else math.nan

    @property
    def unchanged(self) -> float:
        return self.equal / self.items

    @property
    def size(self) -> float:
        return math.sqrt(self.products["Δ·Δ"] / self.products["W·W"]) if self.products["W·W"] else math.nan


def fold_rows(
    change: Change, kind: Kind, dtype: str, device: torch.device, survival: Survival
) -> Iterator[torch.Tensor]:
    """The rows of W' in blocks [rows, D_in], on the CPU, in the safetensors dtype `dtype`. Fills `survival`.

    Raises UserError where a value is NaN or infinite, or too large for `dtype`.
    """
    A = change.pair.A.to(device, torch.float32)
    B = change.pair.B.to(device, torch.float32)

    def rows() -> Iterator[torch.Tensor]:
        for block in read_floats(change.tensor, change.columns, BLOCK_ITEMS):
            yield block.to(device, torch.float32)

    M = PROJECTIONS[kind](A, rows())
    first = 0
    for before in rows():
        delta = torch.mm(B[first : first + len(before)], M).mul_(change.scaling)
        exact = before + delta
        if not torch.isfinite(exact).all():
            raise UserError(
                f"{change.tensor.name}: the fold gives NaN or infinite values. Either the base holds them already, or "
                "the adapter or --scale is far too large. Nothing was written."
            )
        after = round_to(exact, dtype, change.tensor.name)
        survival.add(before, delta, after)
        first += len(before)
        yield after.cpu()


def round_to(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """`values` in the safetensors dtype `dtype`, rounded to nearest even. Raises UserError where one is too large."""
    rounded = values.to(FLOATS[dtype])
    lost = torch.isfinite(values) & ~torch.isfinite(rounded)
    if lost.any():
        raise UserError(
            f"{name}: {float(values[lost].abs().max()):.4g} does not fit: {dtype} ends at "
            f"{torch.finfo(FLOATS[dtype]).max:.4g}. Nothing was written; use --dtype bfloat16 or --dtype float32."
        )
    return rounded


def convert(tensor: StoredTensor, dtype: str) -> Iterator[torch.Tensor]:
    """The values of a tensor that the adapter leaves alone, in another dtype, in flat blocks. Raises as `round_to`."""
    for block in read_floats(tensor, 1, BLOCK_ITEMS):
        yield round_to(block, dtype, tensor.name)
