"""The written result, read again from the disk and checked against base and adapter.

Takes the plan, the folder written and the digests taken while writing; gives the largest deviation found, or refuses.
Every tensor's bytes must be those that were computed, and some rows of every changed tensor are recomputed in fp64 by a
path of their own: adapter after adapter, with a pass over the weight as it stands for each multiplicative one.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.artifacts.fold_plan import Change, FoldPlan
from pipeline.artifacts.fold_rows import BLOCK_ITEMS
from pipeline.artifacts.safetensors_stream import (
    FLOATS,
    StoredTensor,
    forget_cached,
    read_floats,
    read_header,
    read_pieces,
)
from pipeline.console import EXIT_CHECKPOINT, UserError

ROWS = 16  # of each changed tensor: the first, the last, and others drawn evenly
UNIT_FP32 = 2.0**-24
# Rounding errors of a sum of n terms grow as √n·u with overwhelming probability, not as the worst case n·u
# (Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4): λ·√n·u fails with probability 2·exp(−λ²/2), 3e-14 for
# λ = 8, and the Cauchy-Schwarz bound it is used with below is far from reached.
LAMBDA = 8.0


def check_result(
    plan: FoldPlan, folder: Path, digests: Mapping[str, Mapping[str, str]], advance: Callable[[int], None]
) -> float:
    """Check every file of `plan` in `folder`; `digests` by file and tensor. `advance(bytes)` moves the progress bar.

    Gives the largest deviation of a checked value from fp64, in units of what rounding allows (at most 1).
    Raises UserError (exit code 3) where the disk does not hold what was computed.
    """
    worst = 0.0
    for name, specs in plan.files.items():
        forget_cached(folder / name)
        written = {tensor.name: tensor for tensor in read_header(folder / name).tensors}
        if {(t.name, t.dtype, t.shape) for t in written.values()} != {(s.name, s.dtype, s.shape) for s in specs}:
            raise _refusal(f"{name} does not hold the tensors that were to be written")
        for tensor in written.values():
            digest = hashlib.sha256()
            for piece in read_pieces(tensor):
                digest.update(piece)
                advance(len(piece))
            if digest.hexdigest() != digests[name][tensor.name]:
                raise _refusal(f"{tensor.name} in {name} reads back with other bytes than were written")
            if tensor.name in plan.changes:
                worst = max(worst, _deviation(plan.changes[tensor.name], tensor))
    return worst


def _deviation(change: Change, written: StoredTensor) -> float:
    """The largest |W' − W'₆₄| / bound over some rows of a tensor. Raises UserError where it is above 1."""
    n_rows = change.steps[0].pair.B.shape[0]
    rng = np.random.default_rng(0)
    rows = sorted({0, n_rows - 1, *rng.choice(n_rows, size=min(n_rows, ROWS), replace=False).tolist()})
    expected, fp32 = _recomputed(change, rows)
    fp32 = fp32 + 2 * UNIT_FP32 * (expected.abs() + fp32)  # the final addition, and the rounding of ΔW itself
    bound = fp32 + half_spacing(expected.abs() + fp32, FLOATS[written.dtype])
    found = torch.cat(_take_rows(written, change.columns, rows)).double()
    ratio = float(((found - expected).abs() / bound).max())
    if not ratio <= 1.0:
        raise _refusal(f"{written.name} deviates from the fold in fp64 by {ratio:.3g} times what rounding allows")
    return ratio


def _recomputed(change: Change, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, D_in] of W' in fp64, and how far fp32 may be from W + Σ s·B·M in them.

    The fp32 error of a step s·B·M grows with the sums of absolute values behind M: for M = A those of A; for
    M = A·(W + Σ s_j·B_j·M_j), by Cauchy-Schwarz, ‖row of A‖·‖column of W‖ + Σ |s_j|·‖row of A‖·‖column of B_j‖·(those
    of M_j). A factor for each step covers the errors that one hands on to the next.
    """
    done: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # s·B [D_out, R], M [R, D_in], sums behind M
    terms = 1
    for step in change.steps:
        A, B = step.pair.A.double(), step.scaling * step.pair.B.double()
        M, sums = A, A.abs()
        if step.kind == "multiplicative_lora":
            M, column_norms = _projected(change, A, done)
            row_norms = torch.linalg.norm(A, dim=1)[:, None]
            sums = row_norms * column_norms
            for earlier, _, behind in done:
                sums = sums + row_norms * (torch.linalg.norm(earlier, dim=0) @ behind)
            terms = max(terms, A.shape[1])
        done.append((B, M, sums))
    expected = _base_rows(change, rows)
    spread = torch.zeros_like(expected)
    for B, M, sums in done:
        expected = expected + B[rows] @ M
        spread = spread + B[rows].abs() @ sums
        terms += B.shape[1]
    return expected, len(done) * LAMBDA * math.sqrt(terms) * UNIT_FP32 * spread


def _projected(
    change: Change, A: torch.Tensor, done: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A·W [R, D_in] in fp64, W as the steps `done` have left it; and the norms [D_in] of the base weight's columns."""
    M = torch.zeros(A.shape[0], change.columns, dtype=torch.float64)
    squares = torch.zeros(change.columns, dtype=torch.float64)
    first = 0
    for block in change.rows(BLOCK_ITEMS // 2):
        current = block.double()
        squares += current.square().sum(0)
        for B, earlier, _ in done:
            current += B[first : first + len(block)] @ earlier
        M += A[:, first : first + len(block)] @ current
        first += len(block)
    return M, squares.sqrt()


def _base_rows(change: Change, rows: list[int]) -> torch.Tensor:
    """The chosen rows of the weight before the fold, fp64."""
    if change.base_quant is None:
        return torch.cat(_take_rows(change.tensor, change.columns, rows)).double()
    taken, first = [], 0
    for block in change.rows(BLOCK_ITEMS):
        taken += [block[row - first][None] for row in rows if first <= row < first + len(block)]
        first += len(block)
    return torch.cat(taken).double()


def _take_rows(tensor: StoredTensor, columns: int, rows: list[int]) -> list[torch.Tensor]:
    """The chosen rows of a stored matrix, each [1, columns], read from their places alone."""
    row_bytes = FLOATS[tensor.dtype].itemsize * columns
    taken = []
    for row in rows:
        one = StoredTensor(
            tensor.name, tensor.dtype, (1, columns), tensor.file, tensor.start + row * row_bytes, row_bytes
        )
        taken += list(read_floats(one, columns, columns))
    return taken


def half_spacing(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbouring values of `dtype` at `magnitude` (fp64, ≥ 0), subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(min=info.tiny)).exponent - 1
    return 0.5 * info.eps * torch.exp2(exponent.double())


def _refusal(what: str) -> UserError:
    return UserError(
        f"the check of the result failed: {what}. Disk or memory is at fault, or this program; the output was removed.",
        exit_code=EXIT_CHECKPOINT,
    )
