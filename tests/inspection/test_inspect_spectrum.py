"""The spectrum of s·B·A: planted singular vectors and eigenvalues come back, and dense fp64 matrices say the same."""

import math
import resource
from pathlib import Path

import pytest
import torch

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.inspection.spectrum import Effect, effect, effective_rank, effects, hand_overs, spectrum, turn_degrees
from pipeline.inspection.words import complex_number, effects_in_words
from tests.helpers.artifacts import random_tensors
from tests.helpers.inspection import orthonormal, rounding, save, with_eigenvalues, with_singular

WIDTH, SCALING = 48, 0.75
MODULE = "model.layers.1.mlp.down_proj"


def test_planted_gains_detectors_and_responses_come_back(tmp_path: Path) -> None:
    """Through a file in fp32 and a random basis between A and B. Weyl: no gain moves further than ‖δM‖₂. Wedin: a singular
    vector turns by no more than ‖δM‖₂ / (the gap to the next gain − ‖δM‖₂), in either space."""
    gains = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    detectors, responses = orthonormal(4, WIDTH, 1), orthonormal(4, WIDTH, 2)
    pair = with_singular(gains, detectors, responses, SCALING)
    stored = load_adapter(save(tmp_path / "adapter", {MODULE: pair}, SCALING)).pairs[MODULE]
    found = spectrum(stored.A, stored.B, stored.scaling)
    moved = rounding(pair, SCALING)
    assert moved < 1e-4
    assert (found.gains_K - gains).abs().max() <= moved + 1e-14
    gap = 0.1
    for vectors, planted in ((found.detectors_KD, detectors), (found.responses_KD, responses)):
        cosines = (vectors * planted).sum(1).abs()
        assert (1 - cosines**2).clamp(min=0).sqrt().max() <= 2 * moved / (gap - moved) + 1e-7
    signs = (found.detectors_KD * detectors).sum(1) * (found.responses_KD * responses).sum(1)
    assert (signs > 0).all(), "a detector and its response change their signs together"
    planted_overlap = (detectors * responses).sum(1)
    assert found.overlaps_K is not None
    assert (found.overlaps_K - planted_overlap).abs().max() < 1e-4
    assert found.subspace_overlap == pytest.approx(float((detectors @ responses.T).square().sum() / 4), abs=1e-4)


PLANTED = [-1.0, -2.0, 0.5, -0.3, -3.0, 0.2 + 0.4j, 0.0, -1.0]
EFFECTS = {
    Effect.ERASES: 2,
    Effect.REFLECTS: 1,
    Effect.AMPLIFIES: 1,
    Effect.DAMPS: 1,
    Effect.REVERSES: 1,
    Effect.ROTATES: 2,
    Effect.KEEPS: 1,
}


def test_planted_eigenvalues_come_back_and_are_named(tmp_path: Path) -> None:
    """Bauer–Fike: an eigenvalue moves by cond(P)·‖δ(s·A·B)‖ at most, P the eigenvectors' basis."""
    pair, condition = with_eigenvalues(PLANTED, WIDTH, SCALING)
    stored = load_adapter(save(tmp_path / "adapter", {MODULE: pair}, SCALING)).pairs[MODULE]
    found = spectrum(stored.A, stored.B, stored.scaling)
    moved = condition * rounding(pair, SCALING)
    assert moved < 1e-4
    planted = [*map(complex, PLANTED), 0.2 - 0.4j]
    assert found.eigenvalues_R is not None
    for value in planted:
        assert min(abs(v - value) for v in found.eigenvalues_R.tolist()) <= moved
    assert found.eigenvalues_R.abs().tolist() == sorted(found.eigenvalues_R.abs().tolist(), reverse=True)
    names = [what for _, what in effects(found)]
    assert {what: names.count(what) for what in set(names)} == EFFECTS
    assert abs(found.determinant or 1.0) < 1e-4, "two directions are erased"
    words = effects_in_words(found, "multiplicative_lora")
    turn = math.degrees(math.atan2(0.4, 1.2))
    assert words == (
        f"erases 2, reflects 1, reverses 1 (×−2), rotates 2 (≤ {turn:.3g}°), amplifies 1 (×1.5), damps 1 (×0.7), keeps 1"
    )
    assert effects_in_words(found, "lora") == "–"


def test_effects_on_a_direction_are_what_the_map_does_to_it() -> None:
    """Each eigenvalue's direction is sent through h + s·B·A·h: its length and sign change by 1 + λ."""
    pair, _ = with_eigenvalues([-1.0, -2.0, 0.5, -0.3], WIDTH, SCALING)
    M = SCALING * pair["B"] @ pair["A"]
    for value, what in effects(spectrum(pair["A"], pair["B"], SCALING)):
        values, vectors = torch.linalg.eig(M)
        h = vectors[:, (values - value).abs().argmin()].real
        after = h + M @ h
        assert (after - (1 + value.real) * h).norm() < 1e-12
        length = float(after.norm() / h.norm())
        assert {
            Effect.ERASES: length < 1e-12,
            Effect.REFLECTS: abs(length - 1) < 1e-12,
            Effect.AMPLIFIES: length > 1,
            Effect.DAMPS: length < 1,
        }[what]


@pytest.mark.parametrize(("rows", "columns", "rank"), [(48, 48, 6), (40, 56, 5), (8, 8, 12), (6, 9, 7)])
def test_against_dense_matrices(rows: int, columns: int, rank: int) -> None:
    """M made in full in fp64. D = 48 of fp64 rounding; a rank above the width too."""
    tensors = random_tensors({"m": (rows, columns)}, rank, multiplicative=False, dtype=torch.float64)
    A, B = tensors["m.A"], tensors["m.B"]
    M = SCALING * B @ A
    found = spectrum(A, B, SCALING)
    dense = torch.linalg.svdvals(M)
    count = min(rows, columns, rank)
    assert len(found.gains_K) == count
    assert (found.gains_K - dense[:count]).abs().max() < 1e-13
    assert ((found.responses_KD.T * found.gains_K) @ found.detectors_KD - M).abs().max() < 1e-13
    if rows != columns:
        assert (found.eigenvalues_R, found.determinant, found.overlaps_K, found.subspace_overlap) == (None,) * 4
        return
    assert found.eigenvalues_R is not None
    theirs = torch.linalg.eigvals(M)
    for value in found.eigenvalues_R[:count]:
        assert (theirs - value).abs().min() < 1e-10
    assert found.determinant == pytest.approx(float(torch.linalg.det(torch.eye(rows) + M)), rel=1e-10)


def test_a_change_of_basis_between_A_and_B_changes_nothing() -> None:
    tensors = random_tensors({"m": (WIDTH, WIDTH)}, 4, multiplicative=True, dtype=torch.float64)
    G = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one = spectrum(tensors["m.A"], tensors["m.B"], 1.0)
    other = spectrum(G @ tensors["m.A"], tensors["m.B"] @ torch.linalg.inv(G), 1.0)
    assert (one.gains_K - other.gains_K).abs().max() < 1e-12
    assert (one.detectors_KD - other.detectors_KD).abs().max() < 1e-10


def test_nothing_of_the_width_squared_is_made() -> None:
    """At a width of 24 000 one matrix of the width squared would be 4.6 GB; the factors are 0.4 MB each."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = random_tensors({"m": (24_000, 24_000)}, 2, multiplicative=True)
    found = spectrum(tensors["m.A"], tensors["m.B"], 1.0)
    assert found.detectors_KD.shape == (2, 24_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KiB"


def test_effective_rank() -> None:
    assert effective_rank(torch.full((5,), 3.0, dtype=torch.float64)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    by_hand = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.tensor([3.0, 1.0], dtype=torch.float64)) == pytest.approx(by_hand)


def test_a_shear_is_kept_and_an_adapter_of_zeros_does_nothing() -> None:
    """Detector ⟂ response: a gain, but no eigenvalue."""
    both = orthonormal(2, WIDTH, 5)
    found = spectrum(both[:1], both[1:].T, 1.0)
    assert found.norm == pytest.approx(1)
    assert [what for _, what in effects(found)] == [Effect.KEEPS]
    assert found.determinant == pytest.approx(1)
    idle = spectrum(both, torch.zeros(WIDTH, 2), 1.0)
    assert idle.norm == 0
    assert math.isnan(idle.subspace_overlap or 0)
    assert effects_in_words(idle, "multiplicative_lora") == "–"


def test_what_one_layer_writes_another_reads() -> None:
    both = orthonormal(3, WIDTH, 6)
    first = spectrum(both[:1], both[1:2].T, 1.0)
    second = spectrum(0.6 * both[1:2] + 0.8 * both[2:], both[:1].T, 1.0)
    table = hand_overs([first, second, second], [0, 1, 1])
    assert table[0, 1] == pytest.approx(0.6)
    assert table.isnan().sum() == 7, "within a layer and backwards there is nothing to hand over"


def test_turns_and_numbers() -> None:
    assert turn_degrees(-1 + 1j) == pytest.approx(90)
    assert turn_degrees(0.1) == 0
    assert effect(-2.04, 3.0) == Effect.REFLECTS
    assert effect(0.3 + 0.001j, 3.0) == Effect.AMPLIFIES
    assert complex_number(-0.5 + 0.25j) == "−0.5 + 0.25i"
    assert complex_number(1e-05 + 0j) == "1e−05"
