"""The inverse of an adapter, where it has one that rounding survives.

Takes a `Pair` and its scaling s; gives the pair that undoes it, and how much of a rounding error the undoing amplifies. For
a whole `Part` of a fold, with the maps of other families (their inverses are in `weight_maps`), it refuses what cannot be
undone.

Woodbury's identity:  (I + s·B·A)⁻¹ = I − s·B·(I + s·A·B)⁻¹·A  =  I + s·B̃·A  with  B̃ = −B·(I + s·A·B)⁻¹:
the inverse is a multiplicative pair of the same A and rank, computed in fp64 from an R × R system. The eigenvalues of
s·A·B tell what the adapter does to its R directions; at −1 it erases one, and nothing brings that back.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from pipeline.artifacts.adapter.adapter import Pair
from pipeline.artifacts.adapter.maps import ColumnFactors, RowFactors
from pipeline.artifacts.fold.match import Part
from pipeline.console import UserError
from pipeline.families import FAMILIES, MULTIPLICATIVE
from pipeline.formats.dtypes import unit_roundoff

# The merged weights were rounded, by up to u of their size (u = 2⁻⁸ in bf16). The inverse multiplies that error by up
# to the condition number κ in the worst direction. Above κ·u = 1/16 the way back is refused: bf16 16, fp16 128.
MOST_LOST = 1 / 16


def inverse(pair: Pair, scaling: float) -> Pair:
    """The pair (A, B̃) with (I + s·B̃·A)·(I + s·B·A) = I; B̃ [D_out, R] in fp32. B̃ is not finite where there is none."""
    A, B = pair.A.double(), pair.B.double()
    inner = torch.eye(A.shape[0], dtype=torch.float64) + scaling * (A @ B)
    solved, failed = torch.linalg.solve_ex(inner, B, left=False)
    return replace(pair, B=torch.full_like(B, math.inf).float() if failed else -solved.float())


def condition_number(pair: Pair, scaling: float) -> float:
    """κ = ‖I + s·B·A‖₂ · ‖(I + s·B·A)⁻¹‖₂, infinite where the map is singular; without a D × D matrix, in fp64.

    The map is the identity on everything orthogonal to the columns of B and Aᵀ, and maps their span (of at most 2·R
    dimensions) into itself: its singular values are those of the map within the span, and 1.
    """
    A, B = pair.A.double(), pair.B.double()
    basis = torch.linalg.qr(torch.cat([B, A.T], dim=1)).Q
    within = torch.eye(basis.shape[1], dtype=torch.float64) + scaling * (basis.T @ B) @ (A @ basis)
    values = torch.linalg.svdvals(within)
    largest, least = float(values.max()), float(values.min())
    if basis.shape[1] < len(basis):
        largest, least = max(largest, 1.0), min(least, 1.0)
    return largest / least if least > largest * 2.0**-50 else math.inf


def check_invertible(part: Part, dtypes: Mapping[str, str], before: Mapping[str, float]) -> dict[str, float]:
    """κ of every module of `part`. `dtypes`: what each module's merged weight is stored as.

    `before`: by how much the adapters undone before this one amplify already. Raises UserError for what has no inverse,
    and, naming the worst module, where the product of all κ and u is above MOST_LOST.
    """
    _check_kept(part)
    conditions = {module: _condition(part, module) for module in part.modules}
    lost = {m: conditions[m] * before.get(m, 1.0) * unit_roundoff(dtypes[m]) for m in part.modules}
    refused = [module for module in part.modules if lost[module] > MOST_LOST]
    if refused:
        worst = max(refused, key=lost.__getitem__)
        others = f" (and {before[worst]:.3g} of the adapters undone before it)" if before.get(worst, 1.0) > 1 else ""
        what = "I + s·B·A" if worst in part.pairs else f"the {part.kind} adapter's map"
        raise UserError(
            f"--unmerge: {part.adapter.folder} cannot be taken out of {len(refused)} of {len(part.modules)} modules. "
            f"Worst is {worst}: {what} has the condition number {conditions[worst]:.3g}{others}{_cause(part, worst)}. "
            f"What rounding to {dtypes[worst]} changed in the merged "
            f"weights would come back as up to {lost[worst]:.2g} of their size; more than {MOST_LOST:g} is refused. "
            "Go back to the original base model instead."
        )
    return conditions if part.adapter.family or part.kind == MULTIPLICATIVE else {}


def _check_kept(part: Part) -> None:
    """Raise UserError where what the fold overwrote is nowhere: the base's row norms, or the tensor before."""
    if part.full:
        raise UserError(
            f"--unmerge: {part.adapter.folder} has {next(iter(part.full))}, which was trained in full and took the place "
            "of the base's: what was there before is not in the adapter. Go back to the original base model instead."
        )
    if reason := FAMILIES[part.kind].not_undone:
        raise UserError(
            f"--unmerge: {part.adapter.folder} is a {part.kind} adapter, which {reason}. Go back to the original base model "
            "instead."
        )


def _condition(part: Part, module: str) -> float:
    """κ of what the adapter does to the module's weight; 1 for an additive pair."""
    if module in part.adapter.maps:
        return math.prod(one.condition() for one in part.adapter.maps[module])
    return condition_number(part.pairs[module], part.scaling(module)) if part.kind == MULTIPLICATIVE else 1.0


def _cause(part: Part, module: str) -> str:
    """What makes a map hard to invert, in words."""
    if module in part.pairs:
        return _nearest_to_erasing(part.pairs[module], part.scale)
    factors = [one.factors.abs() for one in part.adapter.maps[module] if isinstance(one, RowFactors | ColumnFactors)]
    if not factors:
        return ""
    least, most = min(float(f.min()) for f in factors), max(float(f.max()) for f in factors)
    return f", as its factors are between {least:.3g} and {most:.3g} in size"


def _nearest_to_erasing(pair: Pair, scale: float) -> str:
    """What the eigenvalue of s·A·B next to −1 says, where it is what makes the map hard to invert."""
    values = torch.linalg.eigvals(pair.scaling * scale * (pair.A.double() @ pair.B.double()))
    nearest = complex(values[(values + 1).abs().argmin()])
    shown = f"{nearest.real:.6g}" if abs(nearest.imag) < 1e-9 else f"{nearest.real:.4g} ± {abs(nearest.imag):.4g}i"
    if abs(nearest + 1) > 0.5:
        return f" (the eigenvalue of s·A·B nearest to -1 is {shown})"
    return f", as s·A·B has an eigenvalue of {shown}: near -1 the adapter erases a direction of the output"
