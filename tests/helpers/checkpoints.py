"""What every checkpoint says besides its tensors, for tests that make checkpoints without a run."""

from typing import Any


def facts(world: int, **changes: Any) -> dict[str, Any]:
    """As a run of `world` stages says them: its progress (state.Progress) and itself (begin.facts)."""
    said = {
        "epoch": 0,
        "rows": 3,
        "order": "0f",
        "best_loss": 2.5,
        "settled": True,
        "trained": ["m.A", "m.B"],
        "config": {
            "optimizer": {"type": "adamw", "lr": 1e-4, "groups": [{"names": ["B"], "type": None}]},
            "seed": 7,
            "dataset": "Kü\u0301che ✓",
            "lora_dropout": 0.1,
        },
        "layout": [world, 1],
        "versions": {"torch": "2.13.0+cpu"},
    }
    return {**said, **changes}
