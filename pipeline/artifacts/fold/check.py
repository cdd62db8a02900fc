"""What is written, checked: some rows of every changed tensor against fp64, and every byte against the disk.

Takes the blocks of a fold as they go by; gives the largest deviation of some of their rows, recomputed in fp64 by a path of
their own (`reference`), which also says how far fp32 may be from it. The blocks that it looks at are the memory that is
hashed and written. Takes the folder written and the digests taken while writing; every tensor must read back with them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.artifacts.fold.plan import Change, FoldPlan
from pipeline.artifacts.fold.reference import recomputed
from pipeline.artifacts.fold.rows import BLOCK_ITEMS
from pipeline.console import EXIT_CHECKPOINT, UserError
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import digests_of, forget_cached, read_header

ROWS = 16  # of each changed tensor: the first, the last, and others drawn evenly


class RowCheck:
    """Some rows of one tensor while it is folded, before and after; in the end they are compared with those of fp64."""

    def __init__(self, change: Change, dtype: str) -> None:
        """`dtype`: the safetensors dtype of what is written."""
        rng = np.random.default_rng(0)
        sample = rng.choice(change.n_rows, size=min(change.n_rows, ROWS), replace=False).tolist()
        self.change, self.dtype = change, dtype
        self.rows = sorted({0, change.n_rows - 1, *sample})
        # Filled in place: small tensors kept from every block would leave gaps between the freed ones.
        self.before, self.after = torch.empty(2, len(self.rows), change.columns, dtype=torch.float64)
        self.first = self.taken = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Take the rows that lie in the next block: W as stored, and W' as it is written."""
        here = [row - self.first for row in self.rows if self.first <= row < self.first + len(before)]
        place = slice(self.taken, self.taken + len(here))
        self.before[place], self.after[place] = before[here], after[here]
        self.first, self.taken = self.first + len(before), self.taken + len(here)

    def deviation(self) -> float:
        """The largest |W' − W'₆₄| / bound over the rows. Raises UserError (exit code 3) where it is above 1."""
        expected, fp32 = recomputed(self.change, self.before, self.rows, BLOCK_ITEMS // 2)
        bound = fp32 + half_spacing(expected.abs() + fp32, FLOATS[self.dtype])
        ratio = float(((self.after - expected).abs() / bound).max())
        if not ratio <= 1.0:
            name = self.change.tensor.name
            raise _refusal(f"{name} deviates from the fold in fp64 by {ratio:.3g} times what rounding allows")
        return ratio


def check_written(
    plan: FoldPlan, folder: Path, digests: Mapping[str, Mapping[str, str]], advance: Callable[[int], None]
) -> None:
    """Read every file of `plan` in `folder` back; `digests` by file and tensor. `advance(bytes)` moves the progress bar.

    Raises UserError (exit code 3) where the disk does not hold what was computed.
    """
    for name, specs in plan.files.items():
        forget_cached(folder / name)
        header = read_header(folder / name)
        if {(t.name, t.dtype, t.shape) for t in header.tensors} != {(s.name, s.dtype, s.shape) for s in specs}:
            raise _refusal(f"{name} does not hold the tensors that were to be written")
        for tensor, digest in digests_of(header, advance).items():
            if digest != digests[name][tensor]:
                raise _refusal(f"{tensor} in {name} reads back with other bytes than were written")


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
