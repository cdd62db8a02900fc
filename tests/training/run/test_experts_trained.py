"""A mixture of experts with an adapter on its experts, from a run that is killed to the fold. Oracle: the run that was not."""

import contextlib
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts.adapter.read import load_adapter
from tests.helpers import builders
from tests.helpers.artifacts import hooked, load_model, logits, tensors_of

pytestmark = pytest.mark.slow  # three launches


def test_killed_resumed_and_folded(tmp_path: Path) -> None:
    """Two processes; SIGKILL to both after a checkpoint; on from there with the same numbers; the fold is the live model."""
    base = tmp_path / "base"
    builders.save_model(base, "mixtral", num_local_experts=4)

    def config(name: str, **changes: object) -> str:
        path = builders.write_config(
            tmp_path / f"{name}.toml",
            model=str(base),
            output_dir=str(tmp_path / name),
            target_modules=["experts"],
            layers_to_transform="0:3",
            save_steps=2,
            checkpoint_on_save=True,
            **changes,
        )
        return str(path)

    killed = builders.start(2, "--config", config("killed", max_steps=400), "--deepspeed")
    until = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*/global_step*/manifest.json")):
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.05)
    for process in psutil.Process(killed.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate(timeout=60)
    run = builders.only_run(tmp_path / "killed")
    step = max(int(m.parent.name.removeprefix("global_step")) for m in run.glob("global_step*/manifest.json"))
    steps = step + 3
    config("killed", max_steps=steps, after_training=["merge"])
    builders.train(2, "--config", str(tmp_path / "killed.toml"), "--deepspeed", "--resume_from_checkpoint")
    builders.train(2, "--config", config("whole", max_steps=steps), "--deepspeed")
    whole = builders.only_run(tmp_path / "whole") / f"step{steps}"
    mine, other = (load_file(folder / "adapter_model.safetensors") for folder in (run / f"step{steps}", whole))
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    adapter = load_adapter(run / f"step{steps}")
    assert list(adapter.experts) == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    model = load_model(base)
    pairs = {f"{m}.{k}": getattr(p, k) for m, p in adapter.pairs.items() for k in "AB"}
    before = logits(model)
    with hooked(model, pairs, 2.0, multiplicative=True):
        live = logits(model)
    assert (live - before).abs().max() > 1e-4
    assert (logits(load_model(run / "merged")) - live).abs().max() < 1e-5 * live.abs().max()
    assert tensors_of(run / "merged").keys() == tensors_of(base).keys()
