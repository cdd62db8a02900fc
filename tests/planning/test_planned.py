"""The plan and what becomes of it: --plan in full, 'auto' in a real run, planned memory against measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.builders import (
    BOOKS,
    ROOT,
    VOCABULARY,
    environment,
    model_config,
    only_run,
    save_model,
    train,
    write_config,
)

# Large enough that tensors, not the interpreter, make the memory: some hundred MiB a stage.
BIG = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
# Freed memory goes back to the system at once, so that the resident size is what is alive.
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_and_compare(
    tmp_path: Path, stages: int, vocabulary: int = VOCABULARY, **changes: Any
) -> tuple[str, dict[str, Any]]:
    """A real run of three steps; what it said and its plan.json. The tokenizer has no more tokens than it ever has."""
    save_model(tmp_path / "base", "cohere", 4, vocab_size=vocabulary, **BIG)
    datasets = [
        {
            "name": "book",
            "dataset_type": "textfile",
            "dataset_path": str(BOOKS / "the_salt_ledger.md"),
            "sequence_len": 1024,
        }
    ]
    config = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "out"),
        pipeline_stages=stages,
        max_steps=3,
        gradient_accumulation_steps=3,
        micro_batch_size_per_gpu=2,
        datasets=datasets,
        **changes,
    )
    said = train(stages, "--config", str(config), **EXACT)
    return said, json.loads((only_run(tmp_path / "out") / "plan.json").read_text())


SLOW = pytest.mark.slow
NF4 = {"bnb": {"load_in_4bit": True}}
FULL = {"full_fine_tune": True, "lora_rank": None, "lora_alpha": None, "target_modules": None}


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        pytest.param(2, {}, id="everything kept", marks=SLOW),
        pytest.param(2, {"activation_checkpointing": True}, id="recomputed", marks=SLOW),
        pytest.param(2, {"activation_checkpointing": "auto", "kernels": "all"}, id="auto, kernels", marks=SLOW),
        pytest.param(2, {"kernels": "all", "lora_weight_dtype": "bfloat16"}, id="kernels", marks=SLOW),
        pytest.param(1, {}, id="one stage", marks=SLOW),
        pytest.param(2, FULL, id="everything trained", marks=SLOW),
        pytest.param(2, {**FULL, "activation_checkpointing": True}, id="everything trained, recomputed", marks=SLOW),
        pytest.param(2, {"quantization": NF4}, id="4 bits", marks=SLOW),
        pytest.param(2, {"quantization": NF4, "activation_checkpointing": True}, id="4 bits, recomputed", marks=SLOW),
    ],
)
def test_planned_memory_is_within_a_tenth_of_measured(tmp_path: Path, stages: int, changes: dict[str, Any]) -> None:
    """All layers are adapted: a plan adds the largest pass of any layer to all that is kept, and here that is the last's."""
    said, outcome = run_and_compare(tmp_path, stages, layers_to_transform=None, **changes)
    assert len(outcome["stages"]) == stages
    for stage in outcome["stages"]:
        assert stage["measured_bytes"] == pytest.approx(stage["planned_bytes"], rel=0.10), said
    assert "stage 0, memory" in said
    assert "measured / planned" in said


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 2])
def test_a_tied_embedding_trained_in_full_is_in_the_plan_of_its_stages(tmp_path: Path, stages: int) -> None:
    """On two stages each has a copy; on one the head's gradient waits for the embedding's."""
    names = ["embed_tokens", "input_layernorm"]
    said, outcome = run_and_compare(tmp_path, stages, 12000, layers_to_transform=None, trainable_modules=names)
    gradient = 12000 * BIG["hidden_size"] * 4
    for stage in outcome["stages"]:
        assert stage["trained_bytes"] >= 5 * gradient  # itself, its sum, three of the optimizer
        assert stage["update_bytes"] >= 3 * gradient
        assert stage["measured_bytes"] == pytest.approx(stage["planned_bytes"], rel=0.10), said


def plan_of(tmp_path: Path, *arguments: str, **changes: Any) -> str:
    """What `train.py --plan` prints for a tiny model without weights or tokenizer."""
    model_config("cohere", 4).save_pretrained(tmp_path / "base")
    config = write_config(
        tmp_path / "c.toml", model=str(tmp_path / "base"), output_dir=str(tmp_path / "out"), **changes
    )
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--plan", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_plan_needs_neither_weights_nor_gpus(tmp_path: Path) -> None:
    said = plan_of(tmp_path, "--devices", "2x48GiB", activation_checkpointing="auto", kernels="all")
    assert said.startswith("0\n"), said
    for words in (
        "stage",
        "free",
        "everything kept",
        "tokens per second",
        "bubble",
        "GFLOP per token",
        "exact minimum",
        "the run's length is not known",
        "A6000",
    ):
        assert words in said, words
    assert not list((tmp_path / "base").glob("*.safetensors"))


@pytest.mark.slow
def test_plan_for_this_machine_measures_its_rates(tmp_path: Path) -> None:
    said = plan_of(tmp_path)
    assert said.startswith("0\n")
    assert "measured here, on the CPU" in said
    assert "main memory" in said


@pytest.mark.parametrize("devices", [pytest.param(d, marks=SLOW) for d in ("two", "0x48GiB", "2x1MiB", "2x48GiB,")])
def test_devices_that_are_none(tmp_path: Path, devices: str) -> None:
    said = plan_of(tmp_path, "--devices", devices)
    assert said.startswith("2\n")
    assert f"--devices '{devices}'" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_plans_in_the_docs_are_not_stale() -> None:
    done = subprocess.run([sys.executable, "-m", "docs.plans", "--check"], cwd=ROOT, env=environment(), timeout=900)
    assert done.returncode == 0
