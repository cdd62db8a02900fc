"""Models whose layers need the token ids, in real runs: two processes train, say and score what one does, and go on to the bit.

Keys and values of the last two layers are those of the two before, on the second stage. Oracle: the run of one process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import builders
from tests.helpers.artifacts import tensors_of

pytestmark = pytest.mark.slow  # three launches each

SHARED: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": builders.VOCABULARY,
    "sliding_window": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "gemma4_text": {**SHARED, "global_head_dim": 8},
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0], "laurel_rank": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    builders.save_model(base, kind, layers=5, **KINDS[kind])

    def config(stages: int, **changes: Any) -> list[str]:
        toml = tmp_path / f"{stages}.toml"
        builders.write_config(
            toml,
            model=str(base),
            output_dir=str(tmp_path / f"runs{stages}"),
            layers_to_transform=None,
            target_modules=["o_proj", "down_proj"],
            pipeline_stages=stages,
            layers_per_stage=[1, 4] if stages == 2 else None,
            gradient_clipping=0.0,
            max_steps=6,
            save_steps=3,
            checkpoint_on_save=True,
            eval_steps=3,
            samples={"prompts": ["The salt"], "max_new_tokens": 5, "every_steps": 3},
            after_training=["merge"],
            **changes,
        )
        return ["--config", str(toml)]

    builders.train(1, *config(1))
    builders.train(2, *config(2))
    one, two = (builders.only_run(tmp_path / f"runs{stages}") for stages in (1, 2))
    right, found = (load_file(run / "step6" / "adapter_model.safetensors") for run in (one, two))
    assert found.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in found.items())
    said = [(run / "samples.jsonl").read_text() for run in (one, two)]
    assert said[0].count("\n") == 3  # before the first step, after the third and the last
    assert said[0] == said[1]
    builders.train(2, *config(2), "--resume_from_checkpoint", str(two / "global_step3"))
    again = load_file(two / "step6" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, right[name]) for name, tensor in again.items())
    merged, other, plain = (tensors_of(folder) for folder in (one / "merged", two / "merged", base))
    assert merged.keys() == plain.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in merged.items())
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, plain[name])]
    assert len(changed) == 10
    assert all("o_proj" in name or "down_proj" in name for name in changed)
