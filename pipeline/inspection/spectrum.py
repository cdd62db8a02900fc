"""What the product s·B·A of an adapter does, from its two factors.

Takes A [R, D_in], B [D_out, R] and s; gives the singular values of M = s·B·A with their vectors, and where D_in = D_out
the eigenvalues of M. Rows of A and columns of B are defined only up to a change of basis of R dimensions (B·G⁻¹ and G·A
are the same adapter); singular values and eigenvalues of M are not. All in fp64, on matrices of R × R: M is never made.

    M = Σ gain_k · response_k · detector_kᵀ       the output changes by gain · (detector · h) along the response
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

NEAR = 0.05  # |1 + λ| up to which a direction counts as erased, |2 + λ| up to which as reflected
REAL = 0.01  # |Im λ| / |λ| up to which an eigenvalue counts as real
NOTHING = 1e-3  # |λ| / ‖M‖₂ up to which a direction counts as kept


class Effect(StrEnum):
    """What I + M does to the direction of an eigenvalue λ of M, which it multiplies by 1 + λ."""

    ERASES = "erases"  # λ = −1: nothing is left
    REFLECTS = "reflects"  # λ = −2: its sign changes
    REVERSES = "reverses"  # λ < −1 elsewhere: its sign and its length change
    DAMPS = "damps"  # −1 < λ < 0
    KEEPS = "keeps"  # λ = 0, though M may read it or write it: a detector and its response at a right angle
    AMPLIFIES = "amplifies"  # λ > 0
    ROTATES = "rotates"  # a complex pair: turns a plane by arg(1 + λ) and stretches it by |1 + λ|


@dataclass(frozen=True)
class Spectrum:
    """M = s·B·A of one module, with K = min(R, D_in, D_out); fp64 on the CPU.

    gains_K: singular values, the largest first. detectors_KD [K, D_in], responses_KD [K, D_out]: rows of length 1. A pair's
    common sign is free; it is chosen so that the response's largest component is positive. eigenvalues_R: of s·A·B, complex,
    the largest modulus first, and determinant: det(I + M) = det(I + s·A·B); both None unless D_in = D_out.
    """

    gains_K: Tensor
    detectors_KD: Tensor
    responses_KD: Tensor
    eigenvalues_R: Tensor | None
    determinant: float | None

    @property
    def norm(self) -> float:
        """‖s·B·A‖₂: the most that M can make of a vector of length 1."""
        return float(self.gains_K[0])

    @property
    def overlaps_K(self) -> Tensor | None:
        """cos of each detector with its own response [K]; None unless D_in = D_out. ±1: it scales what it finds."""
        if self.eigenvalues_R is None:
            return None
        return (self.detectors_KD * self.responses_KD).sum(1)

    @property
    def subspace_overlap(self) -> float | None:
        """Mean cos² of the principal angles between all detectors and all responses of a gain; None unless D_in = D_out.

        1: what it writes is what it reads; about K / D for random subspaces; nan where there is no gain.
        """
        if self.eigenvalues_R is None:
            return None
        used = self.gains_K > NOTHING * self.gains_K[0]
        if not used.any():
            return math.nan
        return float((self.detectors_KD[used] @ self.responses_KD[used].T).square().sum() / used.sum())


def spectrum(A: Tensor, B: Tensor, scaling: float) -> Spectrum:
    """The spectrum of s·B·A for A [R, D_in] and B [D_out, R] of any floating dtype, s = `scaling`.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, the SVD U·Σ·Vᵀ of the core s·R_B·R_Aᵀ gives M = (Q_B·U)·Σ·(Q_A·V)ᵀ. The nonzero
    eigenvalues of s·B·A are those of s·A·B, and det(I + s·B·A) = det(I + s·A·B) (Sylvester).
    """
    A64, B64 = A.detach().to("cpu", torch.float64), B.detach().to("cpu", torch.float64)
    Q_B, R_B = torch.linalg.qr(B64)
    Q_A, R_A = torch.linalg.qr(A64.T)
    U, gains_K, Vh = torch.linalg.svd(scaling * R_B @ R_A.T, full_matrices=False)
    responses_KD, detectors_KD = (Q_B @ U).T, Vh @ Q_A.T
    largest = responses_KD.abs().argmax(1, keepdim=True)
    sign = responses_KD.gather(1, largest).sign()
    eigenvalues_R, determinant = None, None
    if A.shape[1] == B.shape[0]:
        core_RR = scaling * A64 @ B64
        found = torch.linalg.eigvals(core_RR)
        eigenvalues_R = found[found.abs().argsort(descending=True, stable=True)]
        determinant = float(torch.linalg.det(torch.eye(len(core_RR), dtype=torch.float64) + core_RR))
    return Spectrum(gains_K, detectors_KD * sign, responses_KD * sign, eigenvalues_R, determinant)


def effective_rank(gains_K: Tensor) -> float:
    """exp(−Σ p·ln p) with p = gains / their sum: how many directions share the work; 0 where there is no gain.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1.
    """
    total = gains_K.sum()
    if total <= 0:
        return 0.0
    p = gains_K / total
    return math.exp(float(torch.special.entr(p).sum()))


def effect(eigenvalue: complex, norm: float) -> Effect:
    """What I + M does to the direction of an eigenvalue of M, `norm` being ‖M‖₂. The bounds are NEAR, REAL and NOTHING."""
    if abs(eigenvalue) <= NOTHING * norm:
        return Effect.KEEPS
    if abs(1 + eigenvalue) <= NEAR:
        return Effect.ERASES
    if abs(2 + eigenvalue) <= NEAR:
        return Effect.REFLECTS
    if abs(eigenvalue.imag) > REAL * abs(eigenvalue):
        return Effect.ROTATES
    if eigenvalue.real > 0:
        return Effect.AMPLIFIES
    return Effect.DAMPS if eigenvalue.real > -1 else Effect.REVERSES


def turn_degrees(eigenvalue: complex) -> float:
    """By how much a complex pair turns its plane: |arg(1 + λ)| in degrees, 0 to 180."""
    factor = 1 + eigenvalue
    return abs(math.degrees(math.atan2(factor.imag, factor.real)))


def effects(spectrum: Spectrum) -> list[tuple[complex, Effect]]:
    """Every eigenvalue with its effect, the largest modulus first; empty unless D_in = D_out."""
    if spectrum.eigenvalues_R is None:
        return []
    return [(value, effect(value, spectrum.norm)) for value in spectrum.eigenvalues_R.tolist()]


def hand_overs(spectra: Sequence[Spectrum], layers: Sequence[int | None]) -> Tensor:
    """How far a module's first response is what the first detector of a module in a later layer looks for: |cos| [N, N].

    Entry (i, j) is |response_i · detector_j| where layers[i] < layers[j], both do something and are of one width; nan
    elsewhere. Two random directions of D dimensions have 0.8/√D in the mean.
    """
    table = torch.full((len(spectra), len(spectra)), math.nan, dtype=torch.float64)
    for i, writer in enumerate(spectra):
        for j, reader in enumerate(spectra):
            before, after = layers[i], layers[j]
            if before is None or after is None or before >= after or not (writer.norm and reader.norm):
                continue
            response, detector = writer.responses_KD[0], reader.detectors_KD[0]
            if response.shape == detector.shape:
                table[i, j] = (response @ detector).abs()
    return table
