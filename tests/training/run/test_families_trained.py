"""Runs of the real command with other families than the plain ones: two stages against one, saving, resuming.

Oracle of the numbers: one stage against two through real processes; of what is saved: stock PEFT and the fold, which must
agree with each other on the end of the run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.artifacts.fold.merge import merge
from tests.helpers import builders, stage_runs
from tests.helpers.stage_runs import STEPS, Case, Result
from tests.helpers.stages import token_ids
from tests.helpers.unsplit import GRADIENT_TOLERANCE, LOSS_TOLERANCE, size

pytestmark = pytest.mark.slow  # minutes: real processes for every case

CONTROL: dict[str, Any] = {"adapter_type": "control_adapter", "lora_alpha": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "control": CONTROL,
    "dora": {"adapter_type": "lora", "use_dora": True},
    "moslora": {"adapter_type": "moslora", "use_rslora": True},
    "pissa": {"adapter_type": "lora", "init_lora_weights": "pissa"},
    "hra": {"adapter_type": "hra", "lora_alpha": None},
    "peft": {
        "adapter_type": "peft",
        "peft": {"type": "SHIRA", "r": 2, "random_seed": 3},  # its places are in no checkpoint
        "lora_rank": None,
        "lora_alpha": None,
        "lora_weight_dtype": "float32",
    },
}
# What recomputation and our kernels must leave as it is.
OVERRIDES = {"plain": [], "recompute": ["activation_checkpointing=true", 'kernels="all"']}


def config(folder: Path, llama: Path, name: str, **changes: Any) -> Path:
    settings = {
        "model": str(llama),
        "output_dir": str(folder / "runs"),
        "gradient_clipping": 0.1,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1},
    }
    return builders.write_config(folder / f"{name}.toml", **{**settings, **FAMILIES[name], **changes})


@pytest.fixture(scope="module")
def results(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Result]:
    """Every family over one stage and two, by name, overrides and stages."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for stages in (1, 2):
        cases = [
            Case(f"{name} {how}", config(folder, llama, name), [f"pipeline_stages={stages}", *overrides])
            for name in FAMILIES
            for how, overrides in (OVERRIDES if stages == 2 else {"plain": []}).items()
        ]
        done = stage_runs.run(stages, cases, folder / str(stages))
        found |= {(*case.split(" "), stages): result for case, result in done.items()}
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("how", OVERRIDES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_train_as_one(results: dict[tuple[str, str, int], Result], name: str, how: str) -> None:
    one, two = results[name, "plain", 1], results[name, how, 2]
    assert two.losses == pytest.approx(one.losses, rel=0, abs=LOSS_TOLERANCE)
    assert two.weights.keys() == one.weights.keys()
    for step in range(1, STEPS + 1):
        for parameter, gradient in one.gradients(step).items():
            # As in test_stages.py; S of a control adapter and the like begin with gradients of one another's rounding.
            assert size(two.gradients(step)[parameter] - gradient) <= step * 10 * GRADIENT_TOLERANCE * size(gradient)
    assert all(size(one.weights[n] - one.initial[n]) > 0 for n in one.weights)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(token_ids()).logits


@pytest.mark.slow
def test_control_adapter_from_training_to_the_fold(llama: Path, tmp_path: Path) -> None:
    """Two stages, a checkpoint, on with one stage; what is saved is orthonormal, loads in PEFT, and folds."""
    path = config(tmp_path, llama, "control", max_steps=6, save_checkpoint_on_epoch_end=True)
    builders.train(2, "--config", str(path), "--set", "max_steps=3")
    run = builders.only_run(tmp_path / "runs")
    builders.train(1, "--config", str(path), "--set", "pipeline_stages=1", "--set", f'resume_from_checkpoint="{run}"')
    lines = [line for line in builders.metrics(run) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert any(key.startswith("adapter_norm/") for line in builders.metrics(run) for key in line)
    adapter = max(run.rglob("adapter_model.safetensors"), key=lambda p: p.stat().st_mtime).parent
    for name, A in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith("peanut_A.weight"):  # Qᵀ, after Newton's steps
            assert (A @ A.T - torch.eye(4)).norm() < 5e-3
    merge(llama, adapter, tmp_path / "merged")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # Logits of about 10 in fp32.
    torch.testing.assert_close(logits(folded), logits(theirs), rtol=0, atol=1e-4)
    assert (logits(folded) - logits(AutoModelForCausalLM.from_pretrained(llama))).abs().max() > 1e-2


@pytest.mark.slow
def test_dora_is_saved_as_pefts(llama: Path, tmp_path: Path) -> None:
    """Two stages to the end of a run; stock PEFT loads it as DoRA."""
    path = config(tmp_path, llama, "dora", max_steps=4)
    builders.train(2, "--config", str(path))
    run = builders.only_run(tmp_path / "runs")
    adapter = max(run.rglob("adapter_model.safetensors"), key=lambda p: p.stat().st_mtime).parent
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    assert theirs.peft_config["default"].use_dora
    stored = load_file(adapter / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in stored) == 3
    assert (logits(theirs) - logits(AutoModelForCausalLM.from_pretrained(llama))).abs().max() > 1e-2
