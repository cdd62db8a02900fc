"""The arithmetic of a fold, a block of rows at a time, and what survived the last rounding.

Takes a `Change`; gives the new tensor's rows, rounded once, and the figures of how much of ΔW is in them. Everything is
computed in fp32 without TF32; a block and the R × D_in projection are all that is in memory.

Both kinds are W' = W + s·B·M with M [R, D_in]:  M = A (lora),  M = A·W (multiplicative; (I + sBA)W = W + sB(AW)).
B·(A·W) takes 4·R operations an element where (B·A)·W takes 2·D_out. Several in sequence are one of the sum of ranks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from pipeline.artifacts.fold_plan import BaseQuant, Change, read_rows
from pipeline.artifacts.safetensors_stream import FLOATS, StoredTensor
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


@dataclass(frozen=True)
class LowRank:
    """All steps of a change as one: ΔW = B·M, with B [D_out, ΣR] (the scalings in it) and M [ΣR, D_in], fp32.

    `sizes`: ‖s_k·B_k·M_k‖ (Frobenius) of every step.
    """

    B: torch.Tensor
    M: torch.Tensor
    sizes: tuple[float, ...]


def compose(change: Change, device: torch.device) -> LowRank:
    """The steps of a change, made one of the sum of their ranks, in one pass over the weight.

    Step k turns W_{k-1} = W + Σ_{j<k} s_j·B_j·M_j into W_{k-1} + s_k·B_k·M_k, where M_k = A_k (lora) or
    M_k = A_k·W_{k-1} = A_k·W + Σ_{j<k} s_j·(A_k·B_j)·M_j (multiplicative). So all A_k·W are summed up while the rows
    of W go by, and the rest needs R × R matrices only.
    """
    of_weight = _projections(change, device)
    Bs: list[torch.Tensor] = []
    Ms: list[torch.Tensor] = []
    sizes = []
    for number, step in enumerate(change.steps):
        M = step.pair.A.to(device, torch.float32)
        if number in of_weight:
            M, A = of_weight[number], M
            for B, earlier in zip(Bs, Ms, strict=True):
                M = M + (A.double() @ B.double()).float() @ earlier
        B = step.pair.B.to(device, torch.float32) * step.scaling
        squared = torch.sum((B.T.double() @ B.double()) * (M.double() @ M.double().T))  # ‖B·M‖² = ⟨BᵀB, MMᵀ⟩
        sizes.append(math.sqrt(max(float(squared), 0.0)))
        Bs.append(B)
        Ms.append(M)
    return LowRank(torch.cat(Bs, dim=1), torch.cat(Ms), tuple(sizes))


def _projections(change: Change, device: torch.device) -> dict[int, torch.Tensor]:
    """{step: A·W [R, D_in]} of the multiplicative steps: sums of A[:, block]·W[block, :] over blocks of rows."""
    As = {n: s.pair.A.to(device, torch.float32) for n, s in enumerate(change.steps) if s.kind == "multiplicative_lora"}
    totals: dict[int, torch.Tensor] = {}
    first = 0
    for block in change.rows(BLOCK_ITEMS) if As else ():
        wide = block.to(device, torch.float32)
        for number, A in As.items():
            part = A[:, first : first + len(wide)] @ wide
            totals[number] = totals[number].add_(part) if number in totals else part
        first += len(wide)
    return totals


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
    parts: dict[int, float] = field(default_factory=dict)  # ‖ΔW‖ of each adapter's own change, by its place

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

    def share(self, part: int) -> float:
        """‖ΔW‖ / ‖W‖ of one adapter's own change."""
        return self.parts[part] / math.sqrt(self.products["W·W"]) if self.products["W·W"] else math.nan

    @property
    def size(self) -> float:
        return math.sqrt(self.products["Δ·Δ"] / self.products["W·W"]) if self.products["W·W"] else math.nan


def fold_rows(change: Change, dtype: str, device: torch.device, survival: Survival) -> Iterator[torch.Tensor]:
    """The rows of W' in blocks [rows, D_in], on the CPU, in the safetensors dtype `dtype`. Fills `survival`.

    Raises UserError where a value is NaN or infinite, or too large for `dtype`.
    """
    whole = compose(change, device)
    survival.parts = {step.part: size for step, size in zip(change.steps, whole.sizes, strict=True)}
    first = 0
    for block in change.rows(BLOCK_ITEMS):
        before = block.to(device, torch.float32)
        delta = torch.mm(whole.B[first : first + len(before)], whole.M)
        exact = before + delta
        if not torch.isfinite(exact).all():
            raise UserError(
                f"{change.tensor.name}: the fold gives NaN or infinite values. Either the base holds them already, or "
                "an adapter or --scale is far too large. Nothing was written."
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


def convert(tensor: StoredTensor, dtype: str, base_quant: BaseQuant | None = None) -> Iterator[torch.Tensor]:
    """The values of a tensor that no adapter changes, in another dtype or through 4 bits, in blocks.

    Raises as `round_to`.
    """
    for block in read_rows(tensor, tensor.shape[-1] if base_quant else 1, BLOCK_ITEMS, base_quant):
        yield round_to(block, dtype, tensor.name)
