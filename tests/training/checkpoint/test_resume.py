"""Stop after any step and resume: bit-equal to the run that was not interrupted; and across numbers of stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.console import UserError
from pipeline.training.run.folder import check_continues
from tests.helpers.builders import BOOKS, launch, metrics, write_config
from tests.helpers.paths import WORKERS

STEPS = 6


def config(folder: Path, base: Path, **changes: Any) -> str:
    """Dropout (so that RNG matters), bf16 adapters with Kahan terms, an evaluation within, an epoch's end within."""
    settings = {
        "model": str(base),
        "output_dir": str(folder / "runs"),
        "max_steps": STEPS,
        "epochs": 3,
        "lora_dropout": 0.2,
        "lora_weight_dtype": "bfloat16",
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "eval_steps": 2,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-2, "weight_decay": 0.01},
        "datasets": [
            {
                "name": "book",
                "dataset_type": "textfile",
                "dataset_path": str(BOOKS / "the_salt_ledger.md"),
                "sequence_len": 64,
                "eval_size": 60,
                "subsample": 0.034,
            }
        ],
    }
    return str(write_config(folder / "config.toml", **{**settings, **changes}))


def run_plan(
    folder: Path, processes: int, plan: list[dict[str, Any]], expect: int = 0, name: str = "plan"
) -> dict[str, Any]:
    """Run tests/workers/resume_worker.py over `plan`; returns its codes and run folders."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(plan))
    said = launch(processes, WORKERS / "resume_worker.py", str(path), expect=expect, timeout=280)
    result = path.with_suffix(".runs.json")
    return json.loads(result.read_text()) if result.exists() else {"output": said}


def final_state(run: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of `step`: weights, moments, Kahan terms, RNG."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((Path(run) / f"global_step{step}").glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def numbers(run: str) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    timed = ("train/tokens_per_s", "seconds/", "memory_gib/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in metrics(Path(run))]


SAVED: dict[str, Any] = {"optimizer": {"type": "adamw"}, "load_optimizer_states": True, "seed": 1, "lora_alpha": 8}


def test_a_tied_embedding_that_was_trained_is_not_dropped() -> None:
    names, aliases = ["m.A", "embed", "head"], {"head": "embed"}
    for manifest in ({"config": SAVED, "trained": names}, {"config": SAVED, "trained": names[:2]}):
        check_continues(manifest, SAVED, {"m.A", "embed"}, aliases)  # one stage, or two
        check_continues(manifest, SAVED, {*names}, aliases)
        with pytest.raises(UserError, match=r"has trained embed.*, which this run would drop"):
            check_continues(manifest, SAVED, {"m.A"}, aliases)


@pytest.mark.parametrize(("start", "keys"), [("pissa_niter_4", {"seed": 2}), ("olora", {"lora_alpha": 4})])
def test_a_start_that_no_checkpoint_holds_has_to_be_the_same(start: str, keys: dict[str, Any]) -> None:
    """PiSSA's and OLoRA's first A and B are computed again, and taken off what was trained."""
    saved = {**SAVED, "init_lora_weights": start}
    check_continues({"config": saved, "trained": []}, saved, set(), {})
    with pytest.raises(UserError, match=rf"made with {next(iter(keys))} = .*resume with the former"):
        check_continues({"config": saved, "trained": []}, {**saved, **keys}, set(), {})
    plain = {**SAVED, "init_lora_weights": True}
    check_continues({"config": plain, "trained": []}, {**plain, **keys}, set(), {})
    exact = {**SAVED, "init_lora_weights": "pissa"}  # draws nothing
    check_continues({"config": exact, "trained": []}, {**exact, "seed": 2}, set(), {})


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


@pytest.mark.slow
def test_stopped_after_any_step_and_resumed_is_bit_equal(tmp_path: Path, base: Path) -> None:
    toml = config(tmp_path, base)
    plan: list[dict[str, Any]] = [{"config": toml}]
    for step in range(1, STEPS):
        plan += [{"config": toml, "stop_after": step}, {"config": toml, "resume": len(plan)}]
    result = run_plan(tmp_path, 2, plan)
    assert result["codes"] == [0] + [75, 0] * (STEPS - 1)
    whole = result["runs"][0]
    state = final_state(whole)
    assert {key.split("/")[0] for key in state} == {"weights", "optimizer", "rng"}
    assert any(key.endswith("/kahan") and tensor.abs().max() > 0 for key, tensor in state.items())
    for resumed in result["runs"][2::2]:
        assert_equal(final_state(resumed), state)
        assert numbers(resumed) == numbers(whole)
    manifest = json.loads((Path(whole) / f"global_step{STEPS}/manifest.json").read_text())
    assert manifest["best_loss"] == min(line["eval/book/loss"] for line in numbers(whole) if "eval/book/loss" in line)

    # The state is named by the whole model's parameters: two stages → one → three, to rounding.
    half = result["runs"][5]  # stopped after step 3 and resumed: it still has that checkpoint
    no_dropout = ["lora_dropout=0.0"]
    straight = run_plan(
        tmp_path, 2, [{"config": toml, "overrides": no_dropout, "resume": f"{half}/global_step3"}], name="two"
    )
    reference = final_state(straight["runs"][0])
    one = run_plan(
        tmp_path,
        1,
        [
            {
                "config": toml,
                "overrides": ["pipeline_stages=1", *no_dropout],
                "resume": f"{half}/global_step3",
                "stop_after": 5,
            },
        ],
        name="one",
    )
    three = run_plan(
        tmp_path,
        3,
        [
            {
                "config": toml,
                "overrides": ["pipeline_stages=3", *no_dropout],
                "resume": f"{one['runs'][0]}/global_step5",
            },
        ],
        name="three",
    )
    last = final_state(three["runs"][0])
    for key, tensor in reference.items():
        if key.startswith("weights/"):
            # Gradients differ by fp32 rounding, are rounded to bf16, and Adam turns a bf16 rounding (2⁻⁸) of a gradient
            # into at most that part of a step; three steps of lr ≤ 1e-2, and one rounding of the weight itself.
            tolerance = 3 * 1e-2 * 2**-7 + tensor.abs().max().item() * 2**-8
            assert (tensor.float() - last[key].float()).abs().max().item() <= tolerance, key


@pytest.mark.slow
def test_killed_half_way_through_a_save_resumes_from_the_checkpoint_before(tmp_path: Path, base: Path) -> None:
    toml = config(tmp_path, base, save_steps=2, checkpoint_on_save=True)
    killed = run_plan(tmp_path, 2, [{"config": toml, "fault": "die_in_save:4"}], expect=-9 & 0xFF, name="killed")
    assert "output" in killed
    (run,) = [p for p in (tmp_path / "runs").iterdir() if (p / "config.toml").exists()]
    assert sorted(p.name for p in run.glob("global_step*")) == ["global_step2"]
    assert list(run.glob(".staging-4-*"))
    both = run_plan(tmp_path, 2, [{"config": toml, "resume": str(run)}, {"config": toml}], name="resumed")
    assert not list(run.glob(".staging-*"))
    assert_equal(final_state(both["runs"][0]), final_state(both["runs"][1]))
    assert numbers(both["runs"][0]) == numbers(both["runs"][1])


@pytest.mark.slow
def test_a_step_that_hangs_is_left_with_the_last_completed_step_saved(tmp_path: Path, base: Path) -> None:
    toml = config(tmp_path, base)
    ended = run_plan(tmp_path, 2, [{"config": toml, "fault": "hang:4"}], expect=75, name="hung")
    assert "stopped after step 3; resume with" in ended["output"]
    (run,) = [p for p in (tmp_path / "runs").iterdir() if (p / "config.toml").exists()]
    assert (run / "global_step3/manifest.json").exists()
    both = run_plan(tmp_path, 2, [{"config": toml, "resume": str(run)}, {"config": toml}], name="resumed")
    assert_equal(final_state(both["runs"][0]), final_state(both["runs"][1]))
