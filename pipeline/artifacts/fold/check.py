"""The written result, read again from the disk and checked against base and adapter.

Takes the plan, the folder written and the digests taken while writing; gives the largest deviation found, or refuses.
Every tensor's bytes must be those that were computed, and some rows of every changed tensor are recomputed in fp64 by a
path of their own (`fold_reference`), which also says how far fp32 may be from it.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.artifacts.fold.plan import Change, FoldPlan
from pipeline.artifacts.fold.reference import recomputed
from pipeline.artifacts.fold.rows import BLOCK_ITEMS
from pipeline.console import EXIT_CHECKPOINT, UserError
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor, forget_cached, pick_rows, read_header, read_pieces

ROWS = 16  # of each changed tensor: the first, the last, and others drawn evenly


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
    rng = np.random.default_rng(0)
    sample = rng.choice(change.n_rows, size=min(change.n_rows, ROWS), replace=False).tolist()
    rows = sorted({0, change.n_rows - 1, *sample})
    expected, fp32 = recomputed(change, _base_rows(change, rows), rows, BLOCK_ITEMS // 2)
    bound = fp32 + half_spacing(expected.abs() + fp32, FLOATS[written.dtype])
    found = torch.cat(list(pick_rows(written, change.columns, rows))).double()
    ratio = float(((found - expected).abs() / bound).max())
    if not ratio <= 1.0:
        raise _refusal(f"{written.name} deviates from the fold in fp64 by {ratio:.3g} times what rounding allows")
    return ratio


def _base_rows(change: Change, rows: list[int]) -> torch.Tensor:
    """The chosen rows of the weight before the fold, fp64."""
    if change.base_quant is None:
        return torch.cat(list(pick_rows(change.tensor, change.columns, rows))).double()
    taken, first = [], 0
    for block in change.rows(BLOCK_ITEMS):
        taken += [block[row - first][None] for row in rows if first <= row < first + len(block)]
        first += len(block)
    return torch.cat(taken).double()


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
