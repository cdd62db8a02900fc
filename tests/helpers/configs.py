"""A small valid configuration to change, and what is said about it when it is wrong."""

import copy
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.console import UserError


def small(**changes: Any) -> dict[str, Any]:
    """A valid configuration as a dictionary, with top-level keys changed; None removes one."""
    raw: dict[str, Any] = {
        "model": "m",
        "output_dir": "o",
        "lora_rank": 4,
        "lora_alpha": 8,
        "epochs": 1,
        "pipeline_stages": 2,
        "optimizer": {"type": "AdamW", "lr": 1e-5},
        "datasets": [{"name": "a", "dataset_type": "textfile", "dataset_path": "a.txt", "sequence_len": 64}],
    }
    raw.update(copy.deepcopy(changes))
    return {key: value for key, value in raw.items() if value is not None}


def problems(raw: dict[str, Any]) -> list[str]:
    """What is said about `raw`, a line per problem."""
    with pytest.raises(UserError) as caught:
        loading.validate(raw, "x.toml")
    head, *lines = str(caught.value).split("\n")
    lines = [line for line in lines if not line.startswith("  Valid keys ")]
    assert head == f"x.toml has {len(lines)} problem(s):"
    assert caught.value.exit_code == 2
    return [line.strip() for line in lines]


def with_key(raw: dict[str, Any], table: str, key: str, value: Any) -> dict[str, Any]:
    """`raw` with a key set in one of its tables, and with what contradicts full_fine_tune taken out."""
    raw["eval_datasets"] = [{"dataset_type": "textfile", "dataset_path": "b.txt", "sequence_len": 64}]
    if table.startswith("quantization"):
        raw["quantization"] = {"bnb": {"load_in_4bit": True}}
    where: Any = raw
    for part in table.split(".") if table else ():
        where = where[part]
    (where[0] if isinstance(where, list) else where)[key] = value
    if "sampling" in key:
        pairs = {"dataset_type": "preference", "dataset_path": "a.jsonl", "sequence_len": 64, "rejected": "generate"}
        raw |= {"datasets": [pairs], "rl": {"method": "dpo"}}
    if key == "use_dora":
        raw["adapter_type"] = "lora"
    if key == "lr_min":
        raw["lr_scheduler"] = "cosine"
    return raw
