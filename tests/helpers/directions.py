"""Small bases with tokenizers, direction vectors, and make_adapter.py run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import make_adapter
from tests.helpers.builders import save_model

LAYERS, D = 4, 32
Make = Callable[..., Path]


def save_base(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model of LAYERS layers and hidden size D with its tokenizer; biases, where it has them, are not zero."""
    model = save_model(folder, kind, LAYERS, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def maker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A function that runs the command with an output below `folder`, and gives the adapter's folder."""

    def run(base: Path, *arguments: object, kind: str = "abliteration", output: str = "adapter") -> Path:
        command = ["--input", base, "--output", folder / output, "--kind", kind, *arguments]
        monkeypatch.setattr(sys, "argv", ["make_adapter.py", *map(str, command)])
        assert make_adapter.main() == 0
        return folder / output

    return run


def directions(*shape: int, seed: int = 0) -> np.ndarray:
    """Random vectors [*shape, D] fp64, not of unit length."""
    return np.random.default_rng(seed).normal(size=(*shape, D)) * 7


def stored(folder: Path, content: np.ndarray | dict[str, Tensor]) -> Path:
    """An array as .npy, tensors as .safetensors."""
    if isinstance(content, np.ndarray):
        np.save(folder / "v.npy", content)
        return folder / "v.npy"
    save_file(content, folder / "v.safetensors")
    return folder / "v.safetensors"


def unit(v: np.ndarray) -> Tensor:
    return torch.from_numpy(v / np.linalg.norm(v))
