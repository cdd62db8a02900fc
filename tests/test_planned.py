"""The plan and what becomes of it: --plan in full, 'auto' in a real run, planned memory against measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import environment, metrics, only_run, save_model, train, write_config

# Large enough that tensors, not the interpreter, make the memory: some hundred MiB a stage.
BIG = {
    "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
# Freed memory goes back to the system at once, so that the resident size is what is alive.
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
