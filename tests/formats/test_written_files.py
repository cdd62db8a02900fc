"""What a run and the commands write has the modes that the umask says: 0666 and, of folders, 0777, less its bits."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.artifacts.adapter.directions import write_directions
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.files import write_text
from pipeline.formats.safetensors import write_tensors
from pipeline.training.checkpoint import commit as checkpoint
from tests.helpers.artifacts import make_base, multiplicative
from tests.helpers.builders import save_model, train, write_config
from tests.helpers.checkpoints import facts
from tests.helpers.data import build, prose, shelve


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: Path, umask: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            allowed = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == allowed & ~umask, (path, oct(path.stat().st_mode))


def test_files_of_every_writer(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "written"
    base, shelf = make_base(tmp_path / "base"), shelve(tmp_path / "shelf", prose(500))
    checkpoint.save(folder, "launch", 0, 1, 4, {"w": torch.zeros(3)}, facts(1))
    multiplicative(folder / "adapter")
    write_directions(folder / "directions.safetensors", {0: torch.zeros(3)})
    write_directions(folder / "directions.safetensors", {0: torch.ones(3)}, replace=True)
    write_tensors(folder / "model.safetensors", {"w": torch.zeros(3, dtype=torch.int64)})
    write_text(folder / "config.toml", "")
    build(shelf, cache_dir=folder / "cache")
    merge(base, folder / "adapter", folder / "merged")
    export(base, folder / "adapter", folder / "peft", format="peft")
    export(base, folder / "adapter", folder / "gguf" / "adapter.gguf", format="gguf")
    assert len(list(folder.rglob("*"))) > 20
    assert_modes(folder, umask)


@pytest.mark.slow
def test_files_of_a_run(tmp_path: Path) -> None:
    """With the whole model, whose shards were 0644 whatever it said, TensorBoard's events and what follows a training."""
    save_model(tmp_path / "base")
    full = {"full_fine_tune": True, "lora_rank": None, "lora_alpha": None, "target_modules": None}
    toml = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        max_steps=1,
        layers_to_transform=None,
        pipeline_stages=1,
        after_training=["card"],
        **full,
    )
    before = os.umask(0o027)
    try:
        train(1, "--config", str(toml))
    finally:
        os.umask(before)
    names = {path.name.split(".")[0] for path in (tmp_path / "runs").rglob("*")}
    assert names >= {
        "model-00001-of-00001",
        "rank-0",
        "manifest",
        "metrics",
        "events",
        "plan",
        "run",
        "README",
        "chunks",
    }
    assert_modes(tmp_path / "runs", 0o027)
