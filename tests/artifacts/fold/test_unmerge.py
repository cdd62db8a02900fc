"""Taking adapters out again: dense inverses by numpy as the oracle, and how much rounding the way back may cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.artifacts.adapter.adapter import Pair
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.inverse import MOST_LOST, condition_number, inverse
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from tests.helpers.artifacts import FACTS, bytes_of, down_proj, make_base, random_tensors, tensors_of

UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 500)
    monkeypatch.setattr(fold_check, "BLOCK_ITEMS", 700)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base a dtype, with biases on the MLP."""
    folder = tmp_path_factory.mktemp("models")
    for dtype in UNIT:
        make_base(folder / dtype / "base", dtype=dtype, mlp_bias=True)
    return folder


def adapter(
    folder: Path, seed: int = 0, kind: str = "multiplicative_lora", size: float = 0.3
) -> dict[str, torch.Tensor]:
    """Save an adapter of all down_proj, rank 4, s = 1.5; its tensors."""
    tensors = random_tensors(down_proj(), 4, multiplicative=kind == "multiplicative_lora", seed=seed, size=size)
    save_adapter(folder, tensors, kind=kind, rank=4, alpha=6, **FACTS)  # type: ignore[arg-type]
    return tensors


def rank_one(folder: Path, factor: float) -> torch.Tensor:
    """Save I + factor·v·vᵀ on every down_proj, v a unit vector: -1 erases v, -2 reflects it."""
    v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(3)), dim=0)
    tensors = {
        f"{module}.{letter}": value
        for module in down_proj()
        for letter, value in (("A", v[None].clone()), ("B", factor * v[:, None]))
    }
    save_adapter(folder, tensors, kind="multiplicative_lora", rank=1, alpha=1, **FACTS)
    return v


def dense(A: torch.Tensor, B: torch.Tensor, scaling: float) -> np.ndarray:
    return np.eye(len(B)) + scaling * B.double().numpy() @ A.double().numpy()


@pytest.mark.parametrize(
    "hidden, rank, size", [(32, 4, 0.3), (32, 4, 3.0), (24, 12, 1.0), (16, 16, 0.5), (8, 11, 0.4), (50, 1, 9.0)]
)
def test_inverse_and_condition_number_against_dense_matrices(hidden: int, rank: int, size: float) -> None:
    tensors = random_tensors({"m": (hidden, hidden)}, rank, multiplicative=True, size=size, seed=hidden)
    pair = Pair(tensors["m.A"], tensors["m.B"], 1.0, "")
    full = dense(pair.A, pair.B, 0.7)
    kappa = np.linalg.cond(full)
    assert condition_number(pair, 0.7) == pytest.approx(kappa, rel=1e-9)
    back = dense(pair.A, inverse(pair, 0.7).B, 0.7)
    # B̃ is rounded to fp32: an error of 2⁻²⁴ of its values, which A sums up (R terms) and the map amplifies by κ at most.
    assert np.abs(back @ full - np.eye(hidden)).max() < 2.0**-24 * rank * kappa * np.abs(np.linalg.inv(full)).max() * 4


def test_condition_number_of_maps_that_have_none() -> None:
    v = torch.nn.functional.normalize(torch.randn(40, dtype=torch.float64), dim=0)
    assert condition_number(Pair(v[None], -v[:, None], 1.0, ""), 1.0) == float("inf")
    assert condition_number(Pair(v[None], -2 * v[:, None], 1.0, ""), 1.0) == pytest.approx(1.0)  # a reflection
    assert condition_number(Pair(v[None], 3 * v[:, None], 1.0, ""), 1.0) == pytest.approx(4.0)
    assert condition_number(Pair(v[None], 0 * v[:, None], 1.0, ""), 1.0) == pytest.approx(1.0)


def check_restored(base: Path, back: Path, inverses: dict[str, np.ndarray], dtype: str, merged: Path) -> None:
    """Each column of the restored weight is the base's to what rounding allows.

    The merged weight was rounded: its columns w' are off by u·‖w'‖, which the inverse T⁻¹ makes ‖T⁻¹‖₂·u·‖w'‖; the
    restored ones are rounded once more, u·‖w‖. fp32 sums of some 40 products on the way add the same for fp32 alone:
    a factor of 8 covers them there. Values below fp16's normal range round by up to 2⁻²⁵ each.
    """
    before, after, between = tensors_of(base), tensors_of(back), tensors_of(merged)
    unit, tiny = UNIT[dtype], 2.0**-25 if dtype == "float16" else 0.0
    for module, T_inverse in inverses.items():
        for name in (f"{module}.weight", f"{module}.bias"):
            W, found = (t[name].double().numpy().reshape(32, -1) for t in (before, after))
            mixed = between[name].double().numpy().reshape(32, -1)
            norm = np.linalg.norm(T_inverse, 2)
            sums = 8 if dtype == "float32" else 1.01
            bound = sums * unit * (norm * np.linalg.norm(mixed, axis=0) + np.linalg.norm(found, axis=0))
            bound += tiny * 32**0.5 * (norm + 1)
            assert (np.linalg.norm(found - W, axis=0) <= bound).all(), name
            assert np.linalg.norm(mixed - W) > 10 * np.linalg.norm(found - W) or dtype == "bfloat16"
    others = {name for name in before if not any(name.startswith(f"{module}.") for module in inverses)}
    stored, written = bytes_of(base), bytes_of(back)
    assert others
    assert all(stored[name] == written[name] for name in others)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_unmerge_gives_the_base_back(bases: Path, tmp_path: Path, dtype: str, scale: float) -> None:
    base = bases / dtype / "base"
    tensors = adapter(tmp_path / "one")
    merge(base, tmp_path / "one", tmp_path / "merged", scale=scale)
    merge(tmp_path / "merged", tmp_path / "one", tmp_path / "back", scale=scale, unmerge=True)
    inverses = {m: np.linalg.inv(dense(tensors[f"{m}.A"], tensors[f"{m}.B"], 1.5 * scale)) for m in down_proj()}
    check_restored(base, tmp_path / "back", inverses, dtype, tmp_path / "merged")
    if scale == 1.0:  # folding with -s undoes the first order only
        merge(tmp_path / "merged", tmp_path / "one", tmp_path / "minus", scale=-1.0)
        with pytest.raises(AssertionError):
            check_restored(base, tmp_path / "minus", inverses, dtype, tmp_path / "merged")


def test_several_are_taken_out_in_the_opposite_order(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A multiplicative, an additive and a multiplicative adapter; a wrong order leaves something behind."""
    base = bases / "float32" / "base"
    kinds = ["multiplicative_lora", "lora", "multiplicative_lora"]
    made = [adapter(tmp_path / f"{n}", n, kind) for n, kind in enumerate(kinds)]
    folders = [tmp_path / f"{n}" for n in range(3)]
    merge(base, folders, tmp_path / "merged", scale=[1.0, 0.5, 0.7])
    merge(tmp_path / "merged", folders, tmp_path / "back", scale=[1.0, 0.5, 0.7], unmerge=True)
    inverses = {}
    for module in down_proj():
        first, last = (dense(made[n][f"{module}.A"], made[n][f"{module}.B"], s) for n, s in ((0, 1.5), (2, 1.05)))
        # A bound for the norm of the whole way back: of both inverses, whatever lies between them.
        inverses[module] = np.eye(32) * np.linalg.norm(np.linalg.inv(first), 2) * np.linalg.norm(np.linalg.inv(last), 2)
    check_restored(base, tmp_path / "back", inverses, "float32", tmp_path / "merged")
    said = capsys.readouterr().out
    assert "W₁ = W + s₃·B̃₃·(A₃·W); W₂ = W₁ - s₂·B₂·A₂; W' = W₂ + s₁·B̃₁·(A₁·W₂)" in said
    assert "inverse  condition number at most" in said
    merge(tmp_path / "merged", folders[::-1], tmp_path / "wrong", scale=[0.7, 0.5, 1.0], unmerge=True)
    with pytest.raises(AssertionError):
        check_restored(base, tmp_path / "wrong", inverses, "float32", tmp_path / "merged")


@pytest.mark.parametrize("dtype", UNIT)
def test_an_erased_direction_does_not_come_back(bases: Path, tmp_path: Path, dtype: str) -> None:
    rank_one(tmp_path / "abliteration", -1.0)
    merge(bases / dtype / "base", tmp_path / "abliteration", tmp_path / "merged")
    words = r"cannot be taken out of 3 of 3 modules.*model\.layers\..*condition number.*eigenvalue of -1:.*erases a direction"
    with pytest.raises(UserError, match=words) as refused:
        merge(tmp_path / "merged", tmp_path / "abliteration", tmp_path / "back", unmerge=True)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "factor, refused",
    [
        (-0.9, {"bfloat16": False}),
        (-0.95, {"bfloat16": True, "float16": False}),
        (-0.995, {"float16": True, "float32": False}),
    ],
)
def test_the_bound_is_kappa_times_the_unit_of_the_dtype(
    bases: Path, tmp_path: Path, factor: float, refused: dict
) -> None:
    """κ = 1 / (1 + factor) = 10, 20, 200 against 1/16 of 2⁸ = 16, 2¹¹ → 128, 2²⁴."""
    v = rank_one(tmp_path / "partial", factor)
    for dtype, expected in refused.items():
        assert (UNIT[dtype] / (1 + factor) > MOST_LOST) == expected
        base, place = bases / dtype / "base", tmp_path / dtype
        merge(base, tmp_path / "partial", place / "merged")
        if expected:
            with pytest.raises(UserError, match=r"condition number (20|200)[ ,]"):
                merge(place / "merged", tmp_path / "partial", place / "back", unmerge=True)
        else:
            merge(place / "merged", tmp_path / "partial", place / "back", unmerge=True)
            inverse_map = np.linalg.inv(np.eye(32) + factor * np.outer(v.double(), v.double()))
            check_restored(base, place / "back", dict.fromkeys(down_proj(), inverse_map), dtype, place / "merged")


def test_condition_numbers_of_several_multiply(bases: Path, tmp_path: Path) -> None:
    """κ = 10 twice, in the same direction: 100 in all, above the 16 of bf16, where each alone is below."""
    rank_one(tmp_path / "partial", -0.9)
    base, both = bases / "bfloat16" / "base", [tmp_path / "partial"] * 2
    merge(base, both, tmp_path / "merged")
    words = r"condition number 10 \(and 10 of the adapters undone before it\).*up to 0\.39 of their size"
    with pytest.raises(UserError, match=words):
        merge(tmp_path / "merged", both, tmp_path / "back", unmerge=True)


def test_a_reflection_is_its_own_inverse(bases: Path, tmp_path: Path) -> None:
    rank_one(tmp_path / "householder", -2.0)
    base = bases / "float32" / "base"
    merge(base, tmp_path / "householder", tmp_path / "merged")
    merge(tmp_path / "merged", tmp_path / "householder", tmp_path / "back", unmerge=True)
    merge(base, [tmp_path / "householder"] * 2, tmp_path / "twice")
    for name, tensor in tensors_of(base).items():
        # Values below 1 after sums of 32 products, twice: 2·33·2⁻²⁴ = 4e-6.
        assert (tensors_of(tmp_path / "back")[name] - tensor).abs().max() < 4e-6
        assert (tensors_of(tmp_path / "twice")[name] - tensor).abs().max() < 4e-6


def test_other_adapters_than_were_folded_are_pointed_out(bases: Path, tmp_path: Path, capsys) -> None:
    base = bases / "float32" / "base"
    adapter(tmp_path / "one"), adapter(tmp_path / "two", seed=1)
    merge(base, tmp_path / "one", tmp_path / "merged", scale=0.5)
    capsys.readouterr()
    merge(tmp_path / "merged", tmp_path / "one", tmp_path / "right", scale=0.5, unmerge=True)
    assert "warning" not in capsys.readouterr().err
    merge(tmp_path / "merged", tmp_path / "two", tmp_path / "wrong", unmerge=True)
    assert "is by its fold_report.json a fold of one × 0.5; what is taken out is two × 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "right" / "fold_report.json").read_text())["unmerge"] is True
