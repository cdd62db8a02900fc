"""What should have been kept on the host and found no room there is said, with what to set, and is in plan.json."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.model.memory.host_arena import HostArena
from pipeline.training.start import plan as planned
from tests.helpers.builders import BOOKS, only_run, train, write_config

ROWS, TOKENS, HIDDEN = 16, 256, 32
LAYER = ROWS * TOKENS * HIDDEN * 4  # bytes of the input of a layer, which is what 'unsloth' keeps


def test_the_most_that_stayed_on_the_device_at_once() -> None:
    arena = HostArena(1024, torch.device("cpu"))
    first, second = arena.ticket(), arena.ticket()
    kept = [ticket.put(torch.zeros(1024, dtype=torch.uint8)) for ticket in (first, second)]
    third = arena.ticket()
    third.put(torch.zeros(512, dtype=torch.uint8))
    assert (arena.overflowed_bytes, arena.short_bytes) == (1536, 1536)
    del third
    second.get(kept[1])
    fourth = arena.ticket()
    fourth.put(torch.zeros(512, dtype=torch.uint8))
    assert (arena.overflowed_bytes, arena.short_bytes) == (2048, 1536)


@pytest.mark.parametrize(("value", "said"), [(1.0, "1"), (12.341, "12.4"), (0.0020004, "0.00201"), (99.96, "100")])
def test_what_to_set_is_rounded_up(value: float, said: str) -> None:
    assert planned._rounded_up(value) == said


@pytest.mark.slow
def test_a_run_with_too_little_host_memory_says_what_would_do(tmp_path: Path, base: Path) -> None:
    """Four layers keep 2 MiB, and half a MiB is allowed: with the arena's reserve of 1 MiB there is room for three."""
    datasets = [
        {
            "name": "book",
            "dataset_type": "textfile",
            "dataset_path": str(BOOKS / "the_salt_ledger.md"),
            "sequence_len": TOKENS,
        }
    ]
    toml = write_config(
        tmp_path / "c.toml",
        model=str(base),
        output_dir=str(tmp_path / "runs"),
        pipeline_stages=1,
        max_steps=2,
        layers_to_transform=None,
        micro_batch_size_per_gpu=ROWS,
        activation_checkpointing="unsloth",
        datasets=datasets,
        host_memory_gib=LAYER / 2**30,
    )
    said = train(1, "--config", str(toml))
    enough = planned._rounded_up(4 * LAYER / 2**30)
    warnings = [line for line in said.splitlines() if line.startswith("warning: host memory")]
    assert len(warnings) == 2  # after the first step, and at the end
    assert "1 MiB of what layers keep" in warnings[0]
    assert f"set host_memory_gib = {enough}" in warnings[0]
    plan = json.loads((only_run(tmp_path / "runs") / "plan.json").read_text())
    assert [stage["host_overflowed_bytes"] for stage in plan["stages"]] == [4 * LAYER]
    assert "host memory" not in train(1, "--config", str(toml), "--set", f"host_memory_gib={enough}")
