"""4-bit weights in plain torch against bitsandbytes itself, and the fold into them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats import nf4
from pipeline.formats.safetensors import read_header
from tests.helpers.artifacts import bytes_of, down_proj, fold64, make_base, multiplicative, tensors_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def stored(folder: Path, values: torch.Tensor) -> Any:
    save_file({"w": values}, folder / "w.safetensors")
    return read_header(folder / "w.safetensors").tensors[0]


def through(folder: Path, values: torch.Tensor, *, double_quant: bool, piece_items: int = 1000) -> torch.Tensor:
    """Our nf4 and back, streamed in pieces from a file."""
    blocks = nf4.read_nf4(stored(folder, values), values.shape[1], piece_items, double_quant=double_quant)
    return torch.cat(list(blocks))


def by_bitsandbytes(values: torch.Tensor, double_quant: bool) -> torch.Tensor:
    """bitsandbytes' nf4 and back. Of double quantisation the 8-bit code of each absmax is searched by brute force, as
    its CPU kernel is not exact (see test_double_quantisation)."""
    packed, state = bnb.quantize_4bit(values.clone(), blocksize=64, quant_type="nf4")
    if double_quant:
        code, mean = bnb.create_dynamic_map(), state.absmax.mean()
        parts = []
        for part in (state.absmax - mean).split(256):
            nearest = (part[:, None].double() / part.abs().max().double() - code.double()).abs().argmin(1)
            parts.append(code[nearest] * part.abs().max())
        state.absmax = torch.cat(parts) + mean
    return bnb.dequantize_4bit(packed, state)


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Gaussian, with what is awkward: blocks of zeros, one large value, values on the code's own points, subnormals."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    values[0] = 0
    values[1, 3] = 5.0
    values[2, :16] = nf4.CODE
    values[3] *= 1e-30
    return values.to(dtype)


def test_the_tables_are_bitsandbytes_own() -> None:
    assert torch.equal(nf4.CODE, bnb.get_4bit_type("nf4", device="cpu")[:16])
    assert torch.equal(nf4.DYNAMIC_CODE, bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(48, 64), (33, 192), (200, 128)])
def test_nf4_is_bitsandbytes_bit_for_bit(tmp_path: Path, dtype: torch.dtype, rows: int, columns: int) -> None:
    values = weights(rows, columns, dtype)
    expected = by_bitsandbytes(values, double_quant=False)
    for piece_items in (1, 1000, 10**6):  # the size of the pieces must not be seen in the result
        found = through(tmp_path, values, double_quant=False, piece_items=piece_items)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows, columns", [(40, 48), (21, 10), (7, 33), (64, 96)])
def test_rows_that_are_no_whole_number_of_blocks(tmp_path: Path, rows: int, columns: int) -> None:
    """Blocks run on over the ends of rows. bitsandbytes' CPU kernel is wrong here (traps: multiples of 64), its portable
    dequantisation, which follows the CUDA kernel, is not."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    values = weights(rows, columns, torch.float32) if columns > 16 else torch.randn(rows, columns)
    packed, state = bnb.quantize_4bit(values.clone(), blocksize=64, quant_type="nf4")
    eager = _dequantize_4bit_compute.__wrapped__  # as it is, without torch.compile
    expected = eager(packed.reshape(-1), state.absmax, state.code, 64, values.shape, torch.float32)
    for piece_items in (1, 1000):
        assert torch.equal(through(tmp_path, values, double_quant=False, piece_items=piece_items), expected)


def test_each_value_gets_the_nearest_code(tmp_path: Path) -> None:
    """By brute force in fp64: no code times absmax is nearer. A tie within rounding may fall either way."""
    values = weights(100, 64, torch.float32)
    found = through(tmp_path, values, double_quant=False).double()
    absmax = values.double().abs().amax(1, keepdim=True)
    distances = (values.double()[..., None] - absmax[..., None] * nf4.CODE.double()).abs().amin(-1)
    assert ((found - values.double()).abs() <= distances + absmax * 2.0**-22).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantisation(tmp_path: Path, dtype: torch.dtype) -> None:
    """The absmax in 8 bits: the nearest of the 256 codes, by brute force.

    bitsandbytes' CPU kernel looks codes up in a table, and takes the neighbour where a value lies within 2⁻¹⁵ of the
    middle between two: there alone may it differ.
    """
    values = weights(300, 192, dtype)
    absmax = values.float().view(-1, 64).abs().amax(1)
    indices, scales = nf4.quantise(absmax - absmax.mean(), nf4.DYNAMIC_CODE, 256)
    scaled = (absmax - absmax.mean()).double() / scales.double().repeat_interleave(256)[: len(absmax)]
    code = nf4.DYNAMIC_CODE.double()
    nearest = (scaled[:, None] - code).abs()
    assert ((nearest.gather(1, indices.long()[:, None])[:, 0] - nearest.amin(1)) < 2.0**-22).all()
    _, state = bnb.quantize_4bit(values.clone(), blocksize=64, compress_statistics=True, quant_type="nf4")
    differing = state.absmax.view(-1).int() != indices
    assert torch.equal(state.state2.absmax, scales)
    assert float(state.offset) == float(absmax.mean())
    middles = (code[1:] + code[:-1]) / 2
    assert ((scaled[differing][:, None] - middles).abs().amin(1) < 2.0**-15).all()
    assert differing.float().mean() < 0.02
    same = ~differing.repeat_interleave(64).view(300, 192)
    packed, state = bnb.quantize_4bit(values.clone(), blocksize=64, compress_statistics=True, quant_type="nf4")
    found, expected = through(tmp_path, values, double_quant=True), bnb.dequantize_4bit(packed, state)
    assert torch.equal(found[same], expected[same])
    assert torch.equal(found, by_bitsandbytes(values, double_quant=True))
    assert not torch.equal(found, through(tmp_path, values, double_quant=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_without_a_4_bit_form(tmp_path: Path, value: float) -> None:
    values = weights(4, 64, torch.float32)
    values[2, 5] = value
    with pytest.raises(UserError, match="w holds NaN or infinite values"):
        through(tmp_path, values, double_quant=False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 5000)
    monkeypatch.setattr(fold_check, "BLOCK_ITEMS", 3000)
    yield


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("quant, dtype", [("nf4", "float32"), ("nf4-double", "bfloat16")])
def test_the_fold_into_a_4_bit_base(tmp_path: Path, small_blocks: None, quant: Any, dtype: str, capsys) -> None:
    """Every linear weight of the layers is bitsandbytes' dequantised one, plus the adapter's change of that, by hand."""
    base = make_base(tmp_path / "base", dtype=dtype, mlp_bias=True, **SIZES)
    tensors = multiplicative(tmp_path / "adapter", down_proj(3, 64, 128))
    figures = merge(base, tmp_path / "adapter", tmp_path / "out", base_quant=quant, dtype="float32", layers="0:1")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    linear = {name for name in before if ".layers." in name and before[name].dim() == 2}
    assert len(linear) == 3 * 7
    for name, W in before.items():
        module = name.removesuffix(".weight")
        expected = (by_bitsandbytes(W, quant == "nf4-double") if name in linear else W).float()
        if f"{module}.A" in tensors and ".layers.2." not in name:
            A, B = tensors[f"{module}.A"], tensors[f"{module}.B"]
            folded = fold64(expected.double().numpy(), A, B, 1.5, multiplicative=True)
            # Sums of 64 + 4 products of values below 1: 68·2⁻²⁴ = 4e-6.
            assert np.abs(after[name].double().numpy() - folded).max() < 4e-6
            figure = next(figure for figure in figures if figure.name == name)
            change = np.linalg.norm(folded - expected.double().numpy())
            assert figure.size == pytest.approx(change / np.linalg.norm(expected.double().numpy()), rel=1e-5)
            assert figure.gain == pytest.approx(
                1.0, abs=1e-5
            )  # of the change of the 4-bit weights, not of the originals
        elif name in linear or name.removesuffix(".bias") not in down_proj():
            assert torch.equal(after[name], expected), name
    assert f"4 bits   21 weights of the base are rounded to {quant} and back first" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_weights_go_through_the_dtype_in_which_the_run_held_them(
    tmp_path: Path, small_blocks: None, stored: str, capsys
) -> None:
    """A run reads a base in model_weight_dtype and rounds that to 4 bits: by bitsandbytes, from bf16."""
    base = make_base(tmp_path / "base", dtype=stored, **SIZES)
    tensors = multiplicative(tmp_path / "adapter", down_proj(3, 64, 128))
    asked: dict[str, Any] = {"base_quant": "nf4", "dtype": "float32"}
    merge(base, tmp_path / "adapter", tmp_path / "out", base_dtype="bfloat16", **asked)
    said = capsys.readouterr()
    assert "21 weights of the base are rounded to bfloat16, to nf4 and back first" in said.out
    assert "--base-dtype" not in said.err
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in (name for name in before if ".layers." in name and before[name].dim() == 2):
        expected = by_bitsandbytes(before[name].bfloat16(), False).double()
        module = name.removesuffix(".weight")
        if f"{module}.A" in tensors:
            A, B = tensors[f"{module}.A"], tensors[f"{module}.B"]
            expected = torch.from_numpy(fold64(expected.numpy(), A, B, 1.5, multiplicative=True))
        assert (after[name].double() - expected).abs().max() < 4e-6, name
    merge(base, tmp_path / "adapter", tmp_path / "stored", **asked)
    assert "give --base-dtype" in " ".join(capsys.readouterr().err.split())
    as_stored = tensors_of(tmp_path / "stored")
    assert any((as_stored[name] - after[name]).abs().max() > 1e-3 for name in after)
    with pytest.raises(UserError, match="--base-dtype is of the weights that --base-quant"):
        merge(base, tmp_path / "adapter", tmp_path / "no", base_dtype="bfloat16")


def test_what_is_not_quantised_is_copied(tmp_path: Path, small_blocks: None) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16", **SIZES)
    multiplicative(tmp_path / "adapter", down_proj(3, 64, 128))
    merge(base, tmp_path / "adapter", tmp_path / "out", base_quant="nf4")
    before, after = bytes_of(base), bytes_of(tmp_path / "out")
    same = {name for name in before if before[name] == after[name]}
    assert same == {name for name in before if "norm" in name or "embed" in name or "lm_head" in name}


def test_the_result_computes_what_was_trained(tmp_path: Path) -> None:
    """transformers loads the base in 4 bits by bitsandbytes, and hooks put the adapter on: the same logits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.helpers.artifacts import hooked, load_model, logits

    base = make_base(tmp_path / "base", **SIZES)
    tensors = multiplicative(tmp_path / "adapter", down_proj(3, 64, 128))
    merge(base, tmp_path / "adapter", tmp_path / "out", base_quant="nf4")
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=asked, device_map={"": "cpu"}
    ).train()  # in train mode: an eval-mode forward repacks the weights on some processors
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    with hooked(model, tensors, 1.5, multiplicative=True):
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < 1e-5
    plain = merge(base, tmp_path / "adapter", tmp_path / "plain")
    assert plain
    assert (logits(load_model(tmp_path / "plain")) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("over", "asked", "said"),
    [
        ({}, {"base_quant": "nf4"}, None),
        ({"double_quant": True}, {"base_quant": "nf4"}, "was trained over nf4-double: with --base-quant nf4"),
        ({"quant_type": "fp4"}, {"base_quant": "nf4"}, "was trained over fp4"),
        ({"bits": 8, "quant_type": None}, {"base_quant": "nf4"}, "was trained over 8 bits"),
        ({"dtype": "bfloat16"}, {"base_quant": "nf4"}, "from weights in bfloat16 (--base-dtype bfloat16)"),
        ({"dtype": "bfloat16"}, {"base_quant": "nf4", "base_dtype": "bfloat16"}, None),
        ({"skip": ["o_proj"]}, {"base_quant": "nf4"}, "with o_proj left alone"),
        ({"bits": 8, "quant_type": None}, {}, None),  # into the original weights: the default
    ],
)
def test_an_adapter_that_was_trained_over_other_bits_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], over: dict[str, Any], asked: dict[str, Any], said: str | None
) -> None:
    base = make_base(tmp_path / "base")
    says = {"bits": 4, "quant_type": "nf4", "double_quant": False, "skip": [], "dtype": "float32", **over}
    multiplicative(tmp_path / "adapter", trained_over=says)
    merge(base, tmp_path / "adapter", tmp_path / "out", dry_run=True, **asked)
    output = capsys.readouterr()
    warned = output.out + output.err
    assert said in warned if said else "was trained" not in warned.replace("was trained on", "")
