"""evaluate_lora.py over a base in 4 bits: log-probabilities are those of transformers' quantised model, with PEFT's adapter."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.console import UserError
from tests.commands.test_evaluate import Place, oracle, rows_of, run
from tests.helpers.families import by_peft
from tests.helpers.quantization import NF4, save_model, theirs

PAIRS = [(f"Say {n}:", f" the number {n * 7}", f" a river {n % 5}") for n in range(12)]
BITS = {"bnb": {"load_in_4bit": True}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("packed")
    base = save_model(root / "base", "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tests.helpers.families.load_model",
            lambda _: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        )
        for case in ("lora", "ia3"):
            by_peft(base, root / case, case, size=0.3)
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets = [
        {"name": "pairs", "dataset_type": "preference", "dataset_path": str(root / "pairs.jsonl"), "sequence_len": 96}
    ]
    config: dict[str, Any] = {
        "model": str(base),
        "output_dir": str(root / "out"),
        "model_weight_dtype": "float32",
        "bootstrap_resamples": 200,
        "datasets": datasets,
    }
    return Place(root, None, None, config)


@pytest.mark.slow
def test_records_over_four_bits_are_those_of_the_quantised_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = rows_of(run(place, monkeypatch, "--adapters", place.root / "lora", quantization=BITS))
    plain = rows_of(run(place, monkeypatch, "--adapters", place.root / "lora"))
    tokenizer = AutoTokenizer.from_pretrained(place.root / "base")
    model = theirs(place.root / "base", NF4)
    of_base = [oracle(model, tokenizer, prompt, chosen, eos=True) for prompt, chosen, _ in PAIRS]
    adapted = PeftModel.from_pretrained(model, str(place.root / "lora")).train()
    of_lora = [oracle(adapted, tokenizer, prompt, chosen, eos=True) for prompt, chosen, _ in PAIRS]
    found = [row["lp_w"] for row in packed]
    assert found == pytest.approx(of_base + of_lora, rel=1e-5)
    assert any(abs(one - other["lp_w"]) > 1e-2 for one, other in zip(found, plain, strict=True)), "4 bits are not 32"


def test_an_adapter_that_changes_a_weight_itself_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"quantization: adapter 'ia3' changes the weight of .* in 4 bits"):
        run(place, monkeypatch, "--adapters", place.root / "ia3", quantization=BITS)
    with pytest.raises(UserError, match=r"quantization.bnb: needs one of load_in_4bit = true and load_in_8bit = true"):
        run(place, monkeypatch, quantization={"bnb": {}})
