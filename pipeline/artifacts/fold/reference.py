"""Rows of a folded tensor in fp64, by a path of their own, and how far the fold's fp32 may be from them.

Takes a `Change` and some rows of the weight before it; gives those rows after it. Adapter after adapter, with a pass over
the weight as it stands for each multiplicative pair; rotations by Horner's rule and the other form of Cayley's transform,
reflections one at a time.

Every value w goes with a bound e of its fp32 error. Rounding errors of a sum of n terms grow as √n·u with overwhelming
probability, not as the worst case n·u (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4): λ·√n·u fails with
probability 2·exp(−λ²/2), 3e-14 for λ = 8, and the Cauchy-Schwarz bounds it is used with below are far from reached.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from pipeline.artifacts.adapter.maps import (
    Added,
    ColumnFactors,
    Multiplied,
    Reflected,
    Replaced,
    RowFactors,
    RowMap,
    RowNorms,
    Turned,
    skew_symmetric,
)
from pipeline.artifacts.fold.plan import Change, PairStep, RowStep, WholeStep
from pipeline.families import MULTIPLICATIVE

UNIT_FP32 = 2.0**-24
LAMBDA = 8.0
Numbers = list[int] | slice  # of rows
Rows = tuple[torch.Tensor, torch.Tensor]  # values and error bounds [N, D_in], fp64
RowPath = Callable[[Rows, Numbers], Rows]


def recomputed(change: Change, before: torch.Tensor, numbers: Numbers, piece_items: int) -> Rows:
    """Rows `numbers` of W' in fp64 and their bounds, `before` being those of W. Passes go by `piece_items` values."""
    rows: Rows = before, torch.zeros_like(before)
    for path in _paths(change, piece_items):
        rows = path(rows, numbers)
    return rows


def _paths(change: Change, piece_items: int) -> list[RowPath]:
    """Its steps, each on any rows of the weight before it."""
    done: list[RowPath] = []
    for in_pairs, group in groupby(change.steps, key=lambda step: isinstance(step, PairStep)):
        steps = list(group)
        if in_pairs:
            done.append(_sequence(change, [s for s in steps if isinstance(s, PairStep)], list(done), piece_items))
        else:
            for step in steps:
                if isinstance(step, RowStep):
                    done += [_mapped(one) for one in step.maps]
                elif isinstance(step, WholeStep):
                    done.append(_whole(change, step, list(done), piece_items))
    return done


def _whole(change: Change, step: WholeStep, before: Sequence[RowPath], piece_items: int) -> RowPath:
    """PEFT's own layer once more, in fp64: it shows what fp32 has rounded, and not what the layer gets wrong.

    The bound is of sums of D_in + D_out terms as large as the largest of W and of its change, and of what the largest error
    before it may have become.
    """

    def all_of(one: Change, paths: Sequence[RowPath]) -> Rows:
        pieces = [rows for _, rows in _streamed(one, paths, piece_items)]
        return torch.cat([values for values, _ in pieces]), torch.cat([errors.expand_as(v) for v, errors in pieces])

    W, errors = all_of(change, before)
    if step.weight is None:
        after = step.map.merged(W)[0]
    else:
        weight, beside = all_of(step.weight, _paths(step.weight, piece_items))
        bias = step.map.merged(weight, W.flatten())[1]
        assert bias is not None, "a bias that was given comes back"
        after, errors = bias[:, None], errors + beside.max()
    largest = float(W.abs().max() + (after - W).abs().max())
    bound = LAMBDA * math.sqrt(sum(after.shape)) * UNIT_FP32 * largest
    if (most := float(errors.max())) > 0:
        bound += 2 * most * max(1.0, float(torch.linalg.norm(after) / torch.linalg.norm(W)))
    return lambda _, numbers: (after[numbers], torch.full_like(after[numbers], bound))


@dataclass(frozen=True)
class _Term:
    """s·B·M of a pair: B [D_out, R] with s in it, M [R, D_in]; the sums of absolute values behind M, whose fp32 error grows
    with them; and the error that M has from that of the weight before the sequence."""

    B: torch.Tensor
    M: torch.Tensor
    sums: torch.Tensor
    handed: torch.Tensor


def _sequence(change: Change, steps: Sequence[PairStep], before: Sequence[RowPath], piece_items: int) -> RowPath:
    """Pairs one after the other, as fp32 does them all at once: W + Σ s·B·M (`fold_rows.compose`).

    The sums behind M = A are those of A; behind M = A·(W + Σ s_j·B_j·M_j), by Cauchy-Schwarz, ‖row of A‖·‖column of W‖ +
    Σ |s_j|·‖row of A‖·‖column of B_j‖·(those of M_j). A factor for each step covers the errors that one hands on to the
    next.
    """
    terms: list[_Term] = []
    lengths = 1
    for step in steps:
        A, B = step.pair.A.double(), step.scaling * step.pair.B.double()
        M, sums, handed = A, A.abs(), torch.zeros_like(A)
        if step.kind == MULTIPLICATIVE:
            M, norms, errors = _projected(change, A, before, terms, piece_items)
            row_norms = torch.linalg.norm(A, dim=1)[:, None]
            sums, handed = row_norms * norms, row_norms * errors
            for term in terms:
                column_norms = torch.linalg.norm(term.B, dim=0)
                sums = sums + row_norms * (column_norms @ term.sums)
                handed = handed + row_norms * (column_norms @ term.handed)
            lengths = max(lengths, A.shape[1])
        terms.append(_Term(B, M, sums, handed))
    n_terms = lengths + sum(term.B.shape[1] for term in terms)

    def add(rows: Rows, numbers: Numbers) -> Rows:
        W, error = rows
        spread = torch.zeros_like(W)
        for term in terms:
            W = W + term.B[numbers] @ term.M
            spread = spread + term.B[numbers].abs() @ term.sums
            error = error + term.B[numbers].abs() @ term.handed
        error = error + len(terms) * LAMBDA * math.sqrt(n_terms) * UNIT_FP32 * spread
        return W, error + 2 * UNIT_FP32 * (W.abs() + error)  # the final addition, and the rounding of ΔW itself

    return add


def _projected(
    change: Change, A: torch.Tensor, before: Sequence[RowPath], terms: Sequence[_Term], piece_items: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A·W [R, D_in], W as it stands; and the norms [D_in] of the columns of the weight before the sequence, and of its
    errors."""
    M = torch.zeros(A.shape[0], change.columns, dtype=torch.float64)
    squares, errors = torch.zeros(2, change.columns, dtype=torch.float64)
    for numbers, (current, error) in _streamed(change, before, piece_items):
        squares += current.square().sum(0)
        if before:
            errors += error.square().sum(0)
        for term in terms:
            current = current + term.B[numbers] @ term.M
        M += A[:, numbers] @ current
    return M, squares.sqrt(), errors.sqrt()


def _streamed(change: Change, paths: Sequence[RowPath], piece_items: int) -> Iterator[tuple[Numbers, Rows]]:
    """All rows of the weight after `paths`, a block at a time."""
    first = 0
    for block in change.rows(piece_items):
        numbers = slice(first, first + len(block))
        rows: Rows = block.double(), torch.zeros(1, 1, dtype=torch.float64).expand(block.shape)
        for path in paths:
            rows = path(rows, numbers)
        yield numbers, rows
        first += len(block)


def _mapped(one: RowMap) -> RowPath:
    """A map of `weight_maps` in fp64."""
    match one:
        case Added():
            return _added(one.A.double(), one.B.double() * one.scaling)
        case RowNorms():
            return _row_norms(one.lengths.double())
        case RowFactors():
            factors = one.factors.double()[:, None]
            return lambda rows, numbers: _multiplied(rows, factors[numbers])
        case ColumnFactors():
            columns = one.factors.double()
            return lambda rows, _: _multiplied(rows, columns)
        case Turned():
            return _turned(_rotations(one))
        case Reflected():
            return _reflected(one.vectors.double() / torch.linalg.norm(one.vectors.double(), dim=0))
        case Multiplied():
            return _multiplied_by_pair(one.A.double(), one.B.double() * one.scaling)
        case Replaced():
            return _replaced(one.values)


def _replaced(values: torch.Tensor) -> RowPath:
    """Exact, but for values in fp64, which go through fp32."""

    def take(rows: Rows, numbers: Numbers) -> Rows:
        W = values.reshape(-1, rows[0].shape[1])[numbers].double()
        return W, (W - W.float()).abs()

    return take


def _multiplied(rows: Rows, factors: torch.Tensor) -> Rows:
    """By factors that are rounded to fp32 first."""
    W, error = rows[0] * factors, rows[1] * factors.abs()
    return W, error + 2 * UNIT_FP32 * (W.abs() + error)


def _added(A: torch.Tensor, B: torch.Tensor) -> RowPath:
    def add(rows: Rows, numbers: Numbers) -> Rows:
        W = rows[0] + B[numbers] @ A
        spread = B[numbers].abs() @ A.abs()
        error = rows[1] + LAMBDA * math.sqrt(len(A) + 1) * UNIT_FP32 * spread
        return W, error + 2 * UNIT_FP32 * (W.abs() + error)

    return add


def _multiplied_by_pair(A: torch.Tensor, B: torch.Tensor) -> RowPath:
    """W + (W·Aᵀ)·Bᵀ: two sums, of D and of R terms, each rounded."""

    def multiply(rows: Rows, _: Numbers) -> Rows:
        W, error = rows
        spread = (W.abs() @ A.T.abs()) @ B.T.abs()
        handed = (error @ A.T.abs()) @ B.T.abs()
        W = W + (W @ A.T) @ B.T
        error = error + handed + LAMBDA * math.sqrt(sum(A.shape) + 1) * UNIT_FP32 * spread
        return W, error + 2 * UNIT_FP32 * (W.abs() + error)

    return multiply


def _row_norms(lengths: torch.Tensor) -> RowPath:
    """The norm's own error: that of the row, by the triangle inequality, and of a sum of D_in squares."""

    def scale(rows: Rows, numbers: Numbers) -> Rows:
        W, error = rows
        norms = W.square().sum(1, keepdim=True).sqrt()
        relative = error.square().sum(1, keepdim=True).sqrt() / norms
        relative = relative + LAMBDA * math.sqrt(W.shape[1] + 1) * UNIT_FP32
        factors = lengths[numbers, None] / norms
        return W * factors, factors.abs() * (error + (W.abs() + error) * relative)

    return scale


def _rotations(one: Turned) -> torch.Tensor:
    """What blocks of columns are multiplied by, Rᵀ or R⁻ᵀ, [N, K, K] fp64."""
    Q = skew_symmetric(one.skews, one.size)
    identity = torch.eye(one.size, dtype=torch.float64).expand_as(Q)
    if one.degree is None:  # Rᵀ = (I − Q)⁻¹·(I + Q), as Q is skew-symmetric; its inverse is its transpose
        R_T = torch.linalg.inv(identity - Q) @ (identity + Q)
        return R_T.mT if one.inverted else R_T
    series = identity  # by Horner, of Rᵀ, which is the series of −Q
    for coefficient in [*[2] * (one.degree - 1), 1]:
        series = coefficient * identity - Q @ series
    return torch.linalg.solve(series, identity) if one.inverted else series


def _turned(blocks: torch.Tensor) -> RowPath:
    size = blocks.shape[-1]

    def product(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        parts = values.view(len(values), -1, size)
        return torch.einsum("nbk,bkj->nbj", parts, factors.expand(parts.shape[1], size, size)).reshape(values.shape)

    def turn(rows: Rows, _: Numbers) -> Rows:
        W, spread = product(rows[0], blocks), product(rows[0].abs(), blocks.abs())
        error = product(rows[1], blocks.abs())
        return W, error + LAMBDA * math.sqrt(size + 2) * UNIT_FP32 * spread

    return turn


def _reflected(units: torch.Tensor) -> RowPath:
    """W·(I − V·Uᵀ) in fp32, columns of V of length 2: what is summed is at most 2·‖row of W‖·Σ|U|."""
    reach = 2 * units.abs().sum(1)  # [D_in]

    def reflect(rows: Rows, _: Numbers) -> Rows:
        W, error = rows
        lengths, errors = (t.square().sum(1, keepdim=True).sqrt() for t in (W, error))
        for u in units.T:
            W = W - 2 * torch.outer(W @ u, u)
        grown = error + errors * reach + LAMBDA * math.sqrt(sum(units.shape) + 4) * UNIT_FP32 * lengths * reach
        return W, grown + 2 * UNIT_FP32 * (W.abs() + grown)

    return reflect
