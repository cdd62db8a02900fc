"""Adapters of known structure, for the tests of pipeline/inspection: planted singular vectors, planted eigenvalues."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts.adapter.write import save_adapter
from tests.helpers.artifacts import FACTS

UNIT = 2.0**-24  # rounding to fp32 moves a value by this share of it at most


def orthonormal(rows: int, width: int, seed: int) -> Tensor:
    """[rows, width] fp64, orthonormal rows."""
    draw = torch.randn(width, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draw).Q.T.contiguous()


def with_singular(
    gains: Tensor, detectors: Tensor, responses: Tensor, scaling: float, seed: int = 9
) -> dict[str, Tensor]:
    """A and B fp64 with s·B·A = Σ gain · response · detectorᵀ, in a random basis of the R dimensions between them."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(len(gains), len(gains), generator=generator, dtype=torch.float64) + 3 * torch.eye(len(gains))
    return {"A": G @ detectors, "B": responses.T @ torch.diag(gains) @ torch.linalg.inv(G) / scaling}


def with_eigenvalues(
    values: Sequence[complex], width: int, scaling: float, seed: int = 4
) -> tuple[dict[str, Tensor], float]:
    """A and B fp64 whose s·A·B has these eigenvalues (of a pair, name the one above the axis); and the condition number of
    the eigenvectors' basis. A also looks outside of what B writes, which changes no eigenvalue."""
    blocks = [
        torch.tensor([[v.real, -v.imag], [v.imag, v.real]]) if v.imag else torch.tensor([[v.real]])
        for v in map(complex, values)
    ]
    core = torch.block_diag(*blocks).double()
    rank = len(core)
    P = orthonormal(rank, rank, seed) @ torch.diag(torch.linspace(1, 2, rank, dtype=torch.float64))
    both = orthonormal(2 * rank, width, seed + 1)
    B = both[:rank].T
    outside = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ both[rank:]
    return {"A": (P @ core @ torch.linalg.inv(P) @ B.T + outside) / scaling, "B": B.contiguous()}, float(
        torch.linalg.cond(P)
    )


def save(
    folder: Path, modules: dict[str, dict[str, Tensor]], scaling: float, kind: str = "multiplicative_lora"
) -> Path:
    """Write {module: {"A", "B"}} as an adapter in fp32."""
    tensors = {f"{module}.{letter}": t.float() for module, pair in modules.items() for letter, t in pair.items()}
    rank = next(iter(modules.values()))["A"].shape[0]
    save_adapter(folder, tensors, kind=kind, rank=rank, alpha=scaling * rank, **FACTS)
    return folder


def rounding(pair: dict[str, Tensor], scaling: float) -> float:
    """What rounding A and B to fp32 can move s·B·A, and s·A·B, by in the 2-norm: s·(‖δB‖‖A‖ + ‖B‖‖δA‖ + ‖δB‖‖δA‖)."""
    return scaling * float(pair["A"].norm() * pair["B"].norm()) * (2 * UNIT + UNIT**2)
