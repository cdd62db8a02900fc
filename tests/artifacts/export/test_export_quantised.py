"""The export for serving beside a base in 4 bits: A' of the weights as they are there.

Oracles: bitsandbytes' own nf4 and back; and the adapter on the outputs of transformers' quantised model, by hooks.
"""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.artifacts.export.export import export
from pipeline.console import UserError
from tests.helpers.artifacts import down_proj, hooked, logits, make_base, multiplicative, tensors_of

pytestmark = pytest.mark.usefixtures("small_blocks")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
}  # rows of whole blocks of 64, which bitsandbytes' CPU kernel wants
RELATIVE = 1e-5  # of logits in fp32 after three layers; a wrong W is at 1e-2


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four_bits")
    make_base(folder / "base", **SIZES)
    multiplicative(folder / "adapter", down_proj(hidden=64, feed_forward=128))
    return folder


def test_A_is_that_of_the_weights_after_4_bits(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(work / "base", work / "adapter", tmp_path / "out", format="peft", base_quant="nf4", base_dtype="bfloat16")
    base, adapter, out = tensors_of(work / "base"), tensors_of(work / "adapter"), tensors_of(tmp_path / "out")
    for module in down_proj():
        packed, state = bnb.functional.quantize_4bit(
            base[f"{module}.weight"].bfloat16(), blocksize=64, quant_type="nf4"
        )
        W = bnb.functional.dequantize_4bit(packed, state).double()
        A = adapter[f"base_model.model.{module}.peanut_A.weight"].double()
        found = out[f"base_model.model.{module}.lora_A.weight"].double()
        # Sums of 64 products in fp32, of values of about 0.1 and 0.02.
        assert (found - A @ W).abs().max() < 64 * 2**-24 * (A.abs() @ W.abs()).max()
        assert torch.equal(
            out[f"base_model.model.{module}.lora_B.weight"], adapter[f"base_model.model.{module}.peanut_B.weight"]
        )
    assert "W is rounded to nf4 and back first" in capsys.readouterr().out


def test_beside_a_base_in_4_bits_it_computes_what_was_trained(work: Path, tmp_path: Path) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base() -> AutoModelForCausalLM:
        loaded = AutoModelForCausalLM.from_pretrained(
            work / "base", dtype=torch.float32, quantization_config=nf4, device_map="cpu"
        )
        return loaded.train()  # in eval mode bitsandbytes' CPU path repacks to bf16 on some processors; no dropout here

    tensors = tensors_of(work / "adapter")
    pairs = {
        f"{module}.{letter}": tensors[f"base_model.model.{module}.peanut_{letter}.weight"]
        for module in down_proj()
        for letter in "AB"
    }
    model = base()
    before = logits(model)
    with hooked(model, pairs, 1.5, multiplicative=True):
        expected = logits(model)
    change, found = (expected - before).norm(), {}
    for name, quant in (("right", "nf4"), ("of the original weights", None)):
        export(work / "base", work / "adapter", tmp_path / name, format="peft", base_quant=quant)
        found[name] = (logits(PeftModel.from_pretrained(base(), tmp_path / name).train()) - expected).norm() / change
    assert found["right"] < RELATIVE * expected.norm() / change
    assert found["of the original weights"] > 1e-2


def test_a_dtype_without_bits_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--base-dtype is of the weights that --base-quant rounds"):
        export(work / "base", work / "adapter", tmp_path / "out", format="peft", base_dtype="bfloat16")
    assert not (tmp_path / "out").exists()
