"""PEFT's types through real runs of two processes: gone on with from a checkpoint, to the bit, and folded.

Oracles: the run's own steps, and stock PEFT's merge_and_unload of what it saves.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pipeline.foreign import read_object
from tests.helpers import builders
from tests.helpers.artifacts import load_model

pytestmark = pytest.mark.slow  # two launches each

NO_PAIR: dict[str, Any] = {
    "adapter_type": "peft",
    "lora_rank": None,
    "lora_alpha": None,
    "lora_weight_dtype": "float32",
}
BUDGET = {"type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 6, "lora_alpha": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lokr": ("llama", {**NO_PAIR, "peft": {"type": "LOKR", "r": 2, "alpha": 4}}),
    "adalora": ("llama", {**NO_PAIR, "peft": BUDGET}),
    "vblora": (
        "llama",
        {**NO_PAIR, "peft": {"type": "VBLORA", "r": 2, "num_vectors": 12, "vector_length": 8, "topk": 3}},
    ),
    "target_parameters": (
        "mixtral",
        {
            "adapter_type": "lora",
            "target_modules": ["q_proj"],
            "target_parameters": ["gate_up_proj", "experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gone_on_with_and_folded(tmp_path: Path, case: str) -> None:
    kind, changes = CASES[case]
    base, toml = tmp_path / "base", tmp_path / "c.toml"
    builders.save_model(base, kind, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    builders.write_config(
        toml,
        model=str(base),
        output_dir=str(tmp_path / "runs"),
        optimizer={"type": "adamw_kahan", "lr": 1e-2, "eps": 1e-6},
        save_steps=3,
        checkpoint_on_save=True,
        max_steps=6,
        after_training=["merge"],
        **changes,
    )
    builders.train(2, "--config", str(toml))
    run = builders.only_run(tmp_path / "runs")
    adapter = run / "step6"
    first_time, facts = (
        load_file(adapter / "adapter_model.safetensors"),
        read_object(adapter / "adapter_config.json", ""),
    )
    builders.train(2, "--config", str(toml), "--resume_from_checkpoint", str(run / "global_step3"))
    second_time = load_file(adapter / "adapter_model.safetensors")
    assert first_time.keys() == second_time.keys()
    assert all(torch.equal(tensor, second_time[name]) for name, tensor in first_time.items())
    assert facts == read_object(adapter / "adapter_config.json", "")
    if case == "adalora":
        kept = [sum(mask) for mask in facts["rank_pattern"].values()]
        assert sum(kept) == 2 * len(kept)

    merged = PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload().state_dict()
    folded, plain = load_model(run / "merged").state_dict(), load_model(base).state_dict()
    changed = [name for name, tensor in folded.items() if not torch.equal(tensor, plain[name])]
    assert changed
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6, msg=name)
