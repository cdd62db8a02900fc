"""The plan and what becomes of it: --plan in full, 'auto' in a real run, planned memory against measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import BOOKS, only_run, save_model, train, write_config

# Large enough that tensors, not the interpreter, make the memory: some hundred MiB a stage.
BIG = {
    "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
# Freed memory goes back to the system at once, so that the resident size is what is alive.
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run_and_compare(tmp_path: Path, stages: int, **changes: Any) -> tuple[str, dict[str, Any]]:
    """A real run of three steps; what it said and its plan.json."""
    save_model(tmp_path / "base", "cohere", 4, **BIG)
    datasets = [{"name": "book", "dataset_type": "textfile", "dataset_path": str(BOOKS / "the_salt_ledger.md"),
                 "sequence_len": 1024}]  # fmt: skip
    config = write_config(
        tmp_path / "c.toml", model=str(tmp_path / "base"), output_dir=str(tmp_path / "out"), pipeline_stages=stages,
        max_steps=3, gradient_accumulation_steps=3, micro_batch_size_per_gpu=2, datasets=datasets, **changes,
    )  # fmt: skip
    said = train(stages, "--config", str(config), **EXACT)
    return said, json.loads((only_run(tmp_path / "out") / "plan.json").read_text())


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        (2, {}), (2, {"kernels": "all"}), (2, {"activation_checkpointing": True}),
        (2, {"activation_checkpointing": "auto", "kernels": "all"}), (1, {"layers_to_transform": "2:3"}),
    ],
    ids=["plain", "kernels", "recomputed", "auto", "one stage"],
)  # fmt: skip
def test_planned_memory_is_within_a_tenth_of_measured(tmp_path: Path, stages: int, changes: dict[str, Any]) -> None:
    said, outcome = run_and_compare(tmp_path, stages, **changes)
    assert len(outcome["stages"]) == stages
    for stage in outcome["stages"]:
        assert stage["measured_bytes"] == pytest.approx(stage["planned_bytes"], rel=0.10), said
    assert "stage 0, memory" in said and "measured / planned" in said
