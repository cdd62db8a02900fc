"""What the last rounding leaves of a fold: fp64 by hand, and the measured table of the design's notes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import version
from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold import report
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.artifacts.fold.rows import Survival
from pipeline.formats.choices import OUTPUT_DTYPES
from tests.helpers.artifacts import bytes_of, down_proj, fold64, make_base, multiplicative, tensors_of


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows of 48: matrices of 32 rows fall into three and a rest, as real ones do at the real size."""
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 500)
    monkeypatch.setattr(fold_check, "BLOCK_ITEMS", 700)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "llama", mlp_bias=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_rounding_to_nearest_of_the_fp64_result(tmp_path: Path, dtype: str) -> None:
    """A value may differ from round(W'₆₄) only where W'₆₄ lies within fp32 error of the middle between two values.

    Sums of at most 36 products, none above 0.1, are off by less than 36·0.1·2⁻²⁴ = 2e-7 in fp32.
    """
    base = make_base(tmp_path / "base", dtype=dtype)
    tensors = multiplicative(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for module in down_proj():
        name = f"{module}.weight"
        exact = fold64(
            before[name].double().numpy(), tensors[f"{module}.A"], tensors[f"{module}.B"], 1.5, multiplicative=True
        )
        wide = torch.from_numpy(exact)
        low, high = (wide - 2e-7).to(after[name].dtype), (wide + 2e-7).to(after[name].dtype)
        assert ((after[name] >= low) & (after[name] <= high)).all()
        assert (low == high).float().mean() > 0.75  # so for most values one result alone is right


def test_figures_of_what_survived_against_fp64(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", hidden_size=64, intermediate_size=128)
    tensors = multiplicative(tmp_path / "adapter", down_proj(3, 64, 128), size=2e-3)
    figures = merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert [figure.name for figure in figures] == [f"{module}.weight" for module in down_proj()]
    for figure in figures:
        module = figure.name.removesuffix(".weight")
        W, written = before[figure.name].double().numpy(), after[figure.name].double().numpy()
        change = fold64(W, tensors[f"{module}.A"], tensors[f"{module}.B"], 1.5, multiplicative=True) - W
        survived = written - W
        # ΔW itself is right to 1e-6 in fp32, and the sums are kept in fp64.
        assert figure.gain == pytest.approx((survived * change).sum() / (change**2).sum(), rel=1e-5)
        assert figure.error == pytest.approx(np.linalg.norm(survived - change) / np.linalg.norm(change), rel=1e-5)
        assert figure.unchanged == (written == W).mean()
        assert figure.size == pytest.approx(np.linalg.norm(change) / np.linalg.norm(W), rel=1e-5)
    text = capsys.readouterr()
    assert min(figure.gain for figure in figures) < 0.95
    assert "--dtype float16 or --dtype float32" in text.err
    assert f"{100 * min(f.gain for f in figures):.0f}%" in text.err
    assert all(f"{figure.gain:7.4f}" in text.out for figure in figures)
    assert "\nVerdict: the adapter is in the weights in part: of " in text.out
    stored = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert stored["version"] == version.full()
    assert [entry["gain"] for entry in stored["tensors"]] == [figure.gain for figure in figures]
    assert str(tmp_path) not in json.dumps(stored)
    merge(base, tmp_path / "adapter", tmp_path / "wide", dtype="float32")
    said = capsys.readouterr().out
    assert "Verdict: the adapter is in the weights: of each of 3 tensors 100.0% of the change or more arrived." in said


def test_a_fold_that_changes_nothing_says_so() -> None:
    assert report.verdict([Survival("w")]).startswith("Verdict: the model is its base")


@pytest.mark.parametrize(
    "size, bf16_gain, bf16_error, bf16_unchanged, fp16_error",
    [(1e-2, 1.00, 0.17, 0.18, 0.02), (3e-3, 0.93, 0.49, 0.48, 0.07), (1e-3, 0.52, 0.80, 0.78, 0.21)],
)
def test_figures_against_the_measured_table(size, bf16_gain, bf16_error, bf16_unchanged, fp16_error) -> None:
    """The table of the design's notes, measured on Gaussian weights of 2048 × 5632; here a part of such a matrix."""
    torch.manual_seed(0)
    W = torch.randn(512, 1024).bfloat16().float()
    change = torch.randn(512, 1024) * size
    in_bf16, in_fp16 = Survival("bf16"), Survival("fp16")
    in_bf16.add(W, change, (W + change).bfloat16())
    in_fp16.add(W, change, (W + change).half())
    assert in_bf16.size == pytest.approx(size, rel=0.01)
    assert in_bf16.gain == pytest.approx(bf16_gain, abs=0.02)
    assert in_bf16.error == pytest.approx(bf16_error, abs=0.02)
    assert in_bf16.unchanged == pytest.approx(bf16_unchanged, abs=0.02)
    assert in_fp16.gain == pytest.approx(1.0, abs=0.01)
    assert in_fp16.error == pytest.approx(fp16_error, abs=0.02)


def test_float16_or_float32_output_keeps_what_bfloat16_loses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    multiplicative(tmp_path / "adapter", size=2e-3)
    gains = {
        dtype: [figure.gain for figure in merge(base, tmp_path / "adapter", tmp_path / dtype, dtype=dtype)]
        for dtype in OUTPUT_DTYPES[2:]
    }
    assert all(abs(gain - 1) < 0.01 for gain in gains["float16"])
    assert all(abs(gain - 1) < 1e-4 for gain in gains["float32"])
    assert not capsys.readouterr().err.count("warning")


def test_no_tf32_whatever_the_program_around_it_chose(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """TF32 has 10 bits of mantissa: on a GPU it would lose what the fp32 fold is for. It is off, and put back after."""
    multiplicative(tmp_path / "adapter")
    seen = set()
    real = fold_rows.round_to

    def spy(*arguments: Any) -> torch.Tensor:
        seen.add((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return real(*arguments)

    monkeypatch.setattr(fold_rows, "round_to", spy)
    merge(llama, tmp_path / "adapter", tmp_path / "exact")
    torch.set_float32_matmul_precision("medium")
    try:
        merge(llama, tmp_path / "adapter", tmp_path / "out")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {("highest", False)}
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "exact")


def test_an_untrained_adapter_is_reported(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    multiplicative(tmp_path / "adapter", size=0.0)
    figures = merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert all(math.isnan(figure.gain) for figure in figures)
    assert "changes nothing in 6 of 6 tensors" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "fold_report.json").read_text())["tensors"][0]["gain"] is None


def test_a_figure_that_overflows_is_null_in_the_report() -> None:
    """Finite weights, and a square that is not: JSON has no infinity."""
    assert [report._number(value) for value in (1.5, math.inf, math.nan)] == [1.5, None, None]
