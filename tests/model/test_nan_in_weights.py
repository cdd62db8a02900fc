"""A weight that is not finite is found while it is read, and named with its file: the learning rate is not to blame."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.console import UserError
from tests.helpers import builders
from tests.helpers.stages import build


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "model.norm.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w2.weight"),
    ],
)
def test_it_is_named(tmp_path: Path, kind: str, name: str, value: float) -> None:
    builders.save_model(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        build(tmp_path, 0, 4)
    assert name in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_another_stages_weights_are_not_looked_at(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    build(tmp_path, 0, 2)
