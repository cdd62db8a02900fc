"""The arithmetic of a fold, a block of rows at a time, and what survived the last rounding.

Takes a `Change`; gives the new tensor's rows, rounded once, and the figures of how much of ΔW is in them. Everything is
computed in fp32 without TF32; a block, the R × D_in projections and a module's rotations are all that is in memory.

Pairs of both kinds are W' = W + s·B·M with M [R, D_in]:  M = A (lora),  M = A·W (multiplicative; (I + sBA)W = W + sB(AW)).
B·(A·W) takes 4·R operations an element where (B·A)·W takes 2·D_out. Several in sequence are one of the sum of ranks. The
maps of other families take each row by itself, so they wait between such sums, and where a multiplicative pair comes after
them one more pass over the weight gives its A·W.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch

from pipeline.artifacts.adapter.maps import RowChange
from pipeline.artifacts.fold.plan import Change, PairStep, RowStep, WholeStep, read_rows
from pipeline.console import UserError
from pipeline.families import MULTIPLICATIVE
from pipeline.formats.choices import BaseQuant, Dtype
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor

BLOCK_ITEMS = 2**19  # values of a block. 2 MiB in fp32: about ten such arrays are alive at a time
HELD_BYTES = 32 * 2**20  # a weight up to this size is read once, into memory; a larger one once for every pass over it


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
    """Steps in sequence that are pairs, as one: ΔW = B·M, with B [D_out, ΣR] (the scalings in it) and M [ΣR, D_in], fp32.

    `sizes`: (the adapter's place, ‖s_k·B_k·M_k‖, Frobenius) of every step.
    """

    B: torch.Tensor
    M: torch.Tensor
    sizes: tuple[tuple[int, float], ...]

    def change(self, W: torch.Tensor, first: int) -> torch.Tensor:
        """ΔW of a block of rows."""
        return torch.mm(self.B[first : first + len(W)], self.M)


@dataclass(frozen=True)
class ByRows:
    """A step whose maps take each row by itself. `part`: the adapter's place."""

    part: int
    maps: tuple[RowChange, ...]

    def apply(self, W: torch.Tensor, first: int) -> torch.Tensor:
        for one in self.maps:
            W = one(W, first)
        return W


@dataclass(frozen=True)
class Held:
    """A step that takes the whole weight at once: what it is after it [D_out, D_in], fp32. `part`: the adapter's place."""

    part: int
    values: torch.Tensor

    def apply(self, W: torch.Tensor, first: int) -> torch.Tensor:
        return self.values[first : first + len(W)]


Operation = LowRank | ByRows | Held


def prepare(change: Change, device: torch.device) -> tuple[Operation, ...]:
    """What a block of rows goes through: sequences of pairs as one, other steps one by one."""
    done: tuple[Operation, ...] = ()
    for in_pairs, group in groupby(change.steps, key=lambda step: isinstance(step, PairStep)):
        steps = list(group)
        if in_pairs:
            done += (
                compose([s for s in steps if isinstance(s, PairStep)], partial(_after, change, done, device), device),
            )
        for step in steps:
            if isinstance(step, RowStep):
                done += (ByRows(step.part, tuple(one.on(device) for one in step.maps)),)
            elif isinstance(step, WholeStep):
                done += (Held(step.part, _whole(change, done, step, device)),)
    return done


def _whole(change: Change, done: Sequence[Operation], step: WholeStep, device: torch.device) -> torch.Tensor:
    """The weight, or the bias as a column, after the step, fp32."""
    before = torch.cat(list(_after(change, done, device)))
    if step.weight is None:
        return step.map.merged(before)[0]
    weight = torch.cat(list(_after(step.weight, prepare(step.weight, device), device)))
    bias = step.map.merged(weight, before.flatten())[1]
    assert bias is not None, "a bias that was given comes back"
    return bias[:, None]


def _after(change: Change, operations: Sequence[Operation], device: torch.device) -> Iterator[torch.Tensor]:
    """The weight as `operations` leave it, in blocks of rows in fp32."""
    first = 0
    for block in change.rows(BLOCK_ITEMS):
        W = block.to(device, torch.float32)
        for operation in operations:
            W = W + operation.change(W, first) if isinstance(operation, LowRank) else operation.apply(W, first)
        first += len(W)
        yield W


def compose(steps: Sequence[PairStep], blocks: Callable[[], Iterator[torch.Tensor]], device: torch.device) -> LowRank:
    """Pairs in sequence, made one of the sum of their ranks, in one pass over the weight before them (`blocks`).

    Step k turns W_{k-1} = W + Σ_{j<k} s_j·B_j·M_j into W_{k-1} + s_k·B_k·M_k, where M_k = A_k (lora) or
    M_k = A_k·W_{k-1} = A_k·W + Σ_{j<k} s_j·(A_k·B_j)·M_j (multiplicative). So all A_k·W are summed up while the rows
    of W go by, and the rest needs R × R matrices only.
    """
    of_weight = _projections(steps, blocks, device)
    Bs: list[torch.Tensor] = []
    Ms: list[torch.Tensor] = []
    sizes = []
    for number, step in enumerate(steps):
        M = step.pair.A.to(device, torch.float32)
        if number in of_weight:
            M, A = of_weight[number], M
            for B, earlier in zip(Bs, Ms, strict=True):
                M = M + (A.double() @ B.double()).float() @ earlier
        B = step.pair.B.to(device, torch.float32) * step.scaling
        squared = torch.sum((B.T.double() @ B.double()) * (M.double() @ M.double().T))  # ‖B·M‖² = ⟨BᵀB, MMᵀ⟩
        sizes.append((step.part, math.sqrt(max(float(squared), 0.0))))
        Bs.append(B)
        Ms.append(M)
    return LowRank(torch.cat(Bs, dim=1), torch.cat(Ms), tuple(sizes))


def _projections(
    steps: Sequence[PairStep], blocks: Callable[[], Iterator[torch.Tensor]], device: torch.device
) -> dict[int, torch.Tensor]:
    """{step: A·W [R, D_in]} of the multiplicative steps: sums of A[:, block]·W[block, :] over blocks of rows."""
    As = {n: s.pair.A.to(device, torch.float32) for n, s in enumerate(steps) if s.kind == MULTIPLICATIVE}
    totals: dict[int, torch.Tensor] = {}
    first = 0
    for block in blocks() if As else ():
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
    parts: dict[int, float] = field(default_factory=dict)  # ‖ΔW‖² of each adapter's own change, by its place

    def add(self, before: torch.Tensor, change: torch.Tensor, after: torch.Tensor) -> None:
        """Count a block: W and ΔW in fp32, and W' as rounded. Products are summed in fp32 in a block, in fp64 over blocks."""
        difference = after.float() - before
        error = difference - change
        for key, left, right in (
            ("D·Δ", difference, change),
            ("Δ·Δ", change, change),
            ("E·E", error, error),
            ("W·W", before, before),
        ):
            self.products[key] += float(torch.dot(left.flatten(), right.flatten()))
        self.equal += before.numel() - int(torch.count_nonzero(difference))
        self.items += before.numel()

    def add_part(self, part: int, squared: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + squared

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
        return math.sqrt(self.parts[part] / self.products["W·W"]) if self.products["W·W"] else math.nan

    @property
    def size(self) -> float:
        return math.sqrt(self.products["Δ·Δ"] / self.products["W·W"]) if self.products["W·W"] else math.nan


def held(change: Change) -> Change:
    """The change with its weight in memory, where it takes several passes over one of at most HELD_BYTES (a multiplicative
    pair takes A·W first, in the fold and in its check): each byte is read once."""
    several = any(
        isinstance(step, WholeStep) or (isinstance(step, PairStep) and step.kind == MULTIPLICATIVE)
        for step in change.steps
    )
    if not several or change.tensor.n_bytes > HELD_BYTES:
        return change
    return replace(change, blocks=tuple(change.rows(BLOCK_ITEMS)))


def fold_rows(
    change: Change, dtype: str, device: torch.device, survival: Survival
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of rows [rows, D_in] of W, as stored, and of W', in the safetensors dtype `dtype`, on the CPU. Fills `survival`.

    Raises UserError where a value is NaN or infinite, or too large for `dtype`.
    """
    operations = prepare(change, device)
    for part, size in (size for operation in operations if isinstance(operation, LowRank) for size in operation.sizes):
        survival.add_part(part, size**2)
    first = 0
    for block in change.rows(BLOCK_ITEMS):
        before = block.to(device, torch.float32)
        exact = before
        for operation in operations:
            if isinstance(operation, LowRank):
                delta = operation.change(exact, first)
                exact = exact + delta
            else:
                changed = operation.apply(exact, first)
                survival.add_part(operation.part, float(torch.sum((changed - exact).double().square())))
                exact = changed
        if len(operations) > 1 or not isinstance(operations[0], LowRank):
            delta = exact - before
        if not all_finite(exact):
            raise UserError(
                f"{change.tensor.name}: the fold gives NaN or infinite values. Either the base holds them already, or "
                "an adapter or --scale is far too large. Nothing was written."
            )
        after = round_to(exact, dtype, change.tensor.name)
        survival.add(before, delta, after)
        first += len(before)
        yield block, after.cpu()


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Then the sum is finite too, which is found at a fortieth of the time; where it
    is not, it may have been too large itself."""
    return bool(values.sum().isfinite()) or bool(torch.isfinite(values).all())


def round_to(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """`values` in the safetensors dtype `dtype`, rounded to nearest even. Raises UserError where one is too large."""
    rounded = values.to(FLOATS[dtype])
    if all_finite(rounded):
        return rounded
    lost = torch.isfinite(values) & ~torch.isfinite(rounded)
    if lost.any():
        raise UserError(
            f"{name}: {float(values[lost].abs().max()):.4g} does not fit: {dtype} ends at "
            f"{torch.finfo(FLOATS[dtype]).max:.4g}. Nothing was written; use --dtype bfloat16 or --dtype float32."
        )
    return rounded


def convert(
    tensor: StoredTensor, dtype: str, base_quant: BaseQuant | None = None, base_dtype: Dtype | None = None
) -> Iterator[torch.Tensor]:
    """The values of a tensor that no adapter changes, in another dtype or through 4 bits, in blocks.

    Raises as `round_to`.
    """
    for matrix in tensor.matrices() if base_quant else [tensor]:
        for block in read_rows(matrix, matrix.shape[-1] if base_quant else 1, BLOCK_ITEMS, base_quant, base_dtype):
            yield round_to(block, dtype, tensor.name)
