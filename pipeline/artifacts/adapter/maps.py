"""What an adapter does to a weight W [D_out, D_in], row by row: the maps of which the families are made.

Takes a module's tensors; gives maps. Each changes a block of rows in fp32 without knowing the others, says whether it fits
a weight, and gives what undoes it with its condition number κ.

    Added          W + s·B·A
    RowNorms       diag(m/‖Wᵢ‖)·W: every row gets the length m
    RowFactors     diag(l)·W
    ColumnFactors  W·diag(l)
    Turned         W·Rᵀ, R of blocks that are orthogonal, or nearly so
    Reflected      W·H₁·…·H_R, Hᵢ = I − 2·uᵢ·uᵢᵀ
    Multiplied     W·(I + s·B·A)ᵀ
    Replaced       another tensor in the place of W

(A change on the output, W + s·B·(A·W), mixes rows and is not among them: see `fold_rows.compose`. Nor is `WholeWeight`, what
PEFT's own layer makes of all rows at once.)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# A block of rows [N, D_in] in fp32 and the number of its first row → the changed block.
RowChange = Callable[[torch.Tensor, int], torch.Tensor]
CHUNK_ITEMS = 2**20  # of the blocks of a rotation, worked on together in fp64


@dataclass(frozen=True)
class Added:
    """W + s·B·A;  A [R, D_in], B [D_out, R]."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    origin: str = ""  # where s comes from, in words

    def misfit(self, rows: int, columns: int) -> str | None:
        fits = self.B.shape[0] == rows and self.A.shape[1] == columns
        return None if fits else f"A {shape_of(self.A)}, B {shape_of(self.B)}"

    def on(self, device: torch.device) -> RowChange:
        A, B = self.A.to(device, torch.float32), self.B.to(device, torch.float32) * self.scaling
        return lambda W, first: W + B[first : first + len(W)] @ A

    def undone(self) -> "Added":
        return replace(self, scaling=-self.scaling)

    def condition(self) -> float:
        return 1.0


@dataclass(frozen=True)
class RowNorms:
    """diag(m/‖Wᵢ‖)·W;  m [D_out]. What the lengths were before is lost."""

    lengths: torch.Tensor

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if self.lengths.shape == (rows,) else f"magnitudes {shape_of(self.lengths)}"

    def on(self, device: torch.device) -> RowChange:
        m = self.lengths.to(device, torch.float32)
        return lambda W, first: W * (m[first : first + len(W)] / torch.linalg.norm(W, dim=1))[:, None]

    def undone(self) -> None:
        return None

    def condition(self) -> float:
        return math.inf


@dataclass(frozen=True)
class RowFactors:
    """diag(l)·W;  l [D_out]. Of a bias too, which is a weight with one column."""

    factors: torch.Tensor

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if self.factors.shape == (rows,) else f"factors {shape_of(self.factors)}"

    def on(self, device: torch.device) -> RowChange:
        factors = self.factors.to(device, torch.float32)
        return lambda W, first: W * factors[first : first + len(W), None]

    def undone(self) -> "RowFactors":
        return RowFactors(1 / self.factors.double())

    def condition(self) -> float:
        return _spread(self.factors)


@dataclass(frozen=True)
class ColumnFactors:
    """W·diag(l);  l [D_in]."""

    factors: torch.Tensor

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if self.factors.shape == (columns,) else f"factors {shape_of(self.factors)}"

    def on(self, device: torch.device) -> RowChange:
        factors = self.factors.to(device, torch.float32)
        return lambda W, _: W * factors

    def undone(self) -> "ColumnFactors":
        return ColumnFactors(1 / self.factors.double())

    def condition(self) -> float:
        return _spread(self.factors)


@dataclass(frozen=True)
class Turned:
    """W·Rᵀ (an input x becomes x·R), or W·R⁻ᵀ where `inverted`; R = diag(R₁ … R_N) of blocks [K, K].

    Rₙ is made of the skew-symmetric Q with the upper triangle `skews[n]` ([N, K·(K−1)/2], row by row):
    (I − Q)·(I + Q)⁻¹, Cayley's transform (exactly orthogonal), or, of degree d = `degree`, its Neumann series
    I + 2Q + … + 2Q^(d−1) + Q^d, which is orthogonal to that order. `shared`: one block for all places.
    """

    skews: torch.Tensor
    size: int
    degree: int | None
    shared: bool
    inverted: bool = False

    def misfit(self, rows: int, columns: int) -> str | None:
        fits = columns % self.size == 0 if self.shared else len(self.skews) * self.size == columns
        return None if fits else f"{len(self.skews)} blocks of {self.size} inputs"

    def matrices(self) -> torch.Tensor:
        """What each block of columns is multiplied by, [N, K, K], made in fp64 and rounded to fp32."""
        together = max(1, CHUNK_ITEMS // self.size**2)
        return torch.cat([self._blocks(chunk).float() for chunk in self.skews.split(together)])

    def on(self, device: torch.device) -> RowChange:
        blocks = self.matrices().to(device)

        def turn(W: torch.Tensor, _: int) -> torch.Tensor:
            parts = W.view(len(W), -1, self.size).transpose(0, 1)
            return (parts @ blocks).transpose(0, 1).reshape(W.shape)

        return turn

    def undone(self) -> "Turned":
        return replace(self, inverted=not self.inverted)

    def condition(self) -> float:
        together = max(1, CHUNK_ITEMS // self.size**2)
        values = [torch.linalg.svdvals(self._blocks(chunk)) for chunk in self.skews.split(together)]
        return float(max(v.max() for v in values) / min(v.min() for v in values))

    def _blocks(self, skews: torch.Tensor) -> torch.Tensor:
        Q = skew_symmetric(skews, self.size)
        identity = torch.eye(self.size, dtype=torch.float64).expand_as(Q)
        if self.degree is None:
            R = torch.linalg.solve(identity + Q, identity - Q, left=False)
        else:
            R, power = identity.clone(), identity
            for exponent in range(1, self.degree + 1):
                power = power @ Q
                R += power if exponent == self.degree else 2 * power
        return torch.linalg.inv(R.mT) if self.inverted else R.mT.contiguous()


@dataclass(frozen=True)
class Reflected:
    """W·H₁·…·H_R, Hᵢ = I − 2·uᵢ·uᵢᵀ/‖uᵢ‖²;  vectors [D_in, R], none of them zero. Exactly orthogonal."""

    vectors: torch.Tensor

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if self.vectors.shape[0] == columns else f"vectors {shape_of(self.vectors)}"

    def on(self, device: torch.device) -> RowChange:
        """H₁·…·H_R = I − V·Uᵀ: with each reflection V gets a column 2·H₁·…·Hⱼ₋₁·uⱼ, of length 2 exactly."""
        U = self.vectors.double() / torch.linalg.norm(self.vectors.double(), dim=0)
        V = torch.zeros_like(U)
        for j in range(U.shape[1]):
            V[:, j] = 2 * (U[:, j] - V[:, :j] @ (U[:, :j].T @ U[:, j]))
        U32, V32 = U.to(device, torch.float32), V.to(device, torch.float32)
        return lambda W, _: W - (W @ V32) @ U32.T

    def undone(self) -> "Reflected":
        return Reflected(self.vectors.flip(1))

    def condition(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Multiplied:
    """W·(I + s·B·A)ᵀ: of a weight that is stored transposed [.., D_in, D_out], or of biases [E, D_out], what a multiplicative
    pair does to the outputs. A [R, D_out], B [D_out, R]. A pair is undone before it is made one of these (fold/inverse.py)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    def misfit(self, rows: int, columns: int) -> str | None:
        fits = self.A.shape[1] == self.B.shape[0] == columns
        return None if fits else f"A {shape_of(self.A)}, B {shape_of(self.B)}"

    def on(self, device: torch.device) -> RowChange:
        A_T = self.A.to(device, torch.float32).T
        B_T = (self.B.to(device, torch.float32) * self.scaling).T
        return lambda W, _: W + (W @ A_T) @ B_T

    def undone(self) -> None:
        return None

    def condition(self) -> float:
        return math.inf


@dataclass(frozen=True)
class Replaced:
    """`values` for W. What was there before is lost."""

    values: torch.Tensor

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if self.values.numel() == rows * columns else f"values {shape_of(self.values)}"

    def on(self, device: torch.device) -> RowChange:
        def take(W: torch.Tensor, first: int) -> torch.Tensor:
            return self.values.reshape(-1, W.shape[1])[first : first + len(W)].to(device, torch.float32)

        return take

    def undone(self) -> None:
        return None

    def condition(self) -> float:
        return math.inf


@dataclass(frozen=True)
class WholeWeight:
    """W as PEFT's own layer of a type merges it (pipeline/peft/layers.py): of all rows at once, in fp32 or fp64.

    `settings`: PEFT's keys of this module; `tensors`: the module's, by their names in a file; `common`: those that modules
    share, frozen where the file has them, or trained; `shapes`: of all the adapter's modules, in the model's order, among which
    it is `module`; `biased`: whether the module has a bias, of which some types have trained numbers too.
    """

    peft_type: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    common: Mapping[str, torch.Tensor]
    module: str = ""
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    biased: bool = False

    def misfit(self, rows: int, columns: int) -> str | None:
        from pipeline.peft.layers import misfit

        return misfit((rows, columns), self.biased, self.peft_type, self.settings, self.tensors)

    def merged(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W' [D_out, D_in] and b' in the dtype of W, fp32 or fp64."""
        from pipeline.peft.layers import merged

        beside = weight.new_zeros(len(weight)) if bias is None and self.biased else bias
        W, b = merged(
            weight,
            beside,
            self.peft_type,
            self.settings,
            self.tensors,
            module=self.module,
            shapes=self.shapes,
            common=self.common,
        )
        return W, None if bias is None else b

    def condition(self) -> float:
        return math.inf


RowMap = Added | RowNorms | RowFactors | ColumnFactors | Turned | Reflected | Multiplied | Replaced
WeightMap = RowMap | WholeWeight


def skew_symmetric(upper: torch.Tensor, size: int) -> torch.Tensor:
    """Upper triangles [N, K·(K−1)/2], row by row, as skew-symmetric matrices [N, K, K] in fp64."""
    Q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = upper.double()
    return Q - Q.mT


def shape_of(tensor: torch.Tensor) -> str:
    return " × ".join(str(n) for n in tensor.shape)


def _spread(factors: torch.Tensor) -> float:
    sizes = factors.double().abs()
    return float(sizes.max() / sizes.min()) if bool(sizes.min() > 0) else math.inf
