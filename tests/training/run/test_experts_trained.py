"""A mixture of experts with an adapter on its experts, from a run that is killed to the fold. Oracle: its own steps."""

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts.adapter.read import load_adapter
from tests.helpers import builders
from tests.helpers.artifacts import hooked, load_model, logits, tensors_of

pytestmark = pytest.mark.slow  # two launches


@pytest.mark.parametrize("over", [{}, {"quantization": {"bnb": {"load_in_4bit": True}}}], ids=["16 bits", "4 bits"])
def test_killed_resumed_and_folded(tmp_path: Path, over: dict[str, Any]) -> None:
    """Two processes; SIGKILL to both; from the checkpoint before the last on again, with the same numbers; then the fold.

    That a fold with --base-quant is the live model over 4 bits is shown in tests/model/test_quantized_experts.py.
    """
    base, toml = tmp_path / "base", tmp_path / "c.toml"
    builders.save_model(base, "mixtral", num_local_experts=4)

    def config(**changes: object) -> list[str]:
        builders.write_config(
            toml,
            model=str(base),
            output_dir=str(tmp_path / "runs"),
            target_modules=["experts"],
            layers_to_transform="0:3",
            save_steps=2,
            checkpoint_on_save=True,
            **over,
            **changes,
        )
        return ["--config", str(toml)]

    killed = builders.start(2, *config(max_steps=400))
    until = time.monotonic() + 120
    while len(list((tmp_path / "runs").glob("*/global_step*/manifest.json"))) < 2:
        assert time.monotonic() < until, "no two checkpoints"
        time.sleep(0.05)
    for process in psutil.Process(killed.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate(timeout=60)
    run = builders.only_run(tmp_path / "runs")
    before, last = sorted(
        int(m.parent.name.removeprefix("global_step")) for m in run.glob("global_step*/manifest.json")
    )[-2:]
    first_time = load_file(run / f"step{last}" / "adapter_model.safetensors")
    again = config(max_steps=last, after_training=["merge"])
    builders.train(2, *again, "--resume_from_checkpoint", str(run / f"global_step{before}"))
    second_time = load_file(run / f"step{last}" / "adapter_model.safetensors")
    assert first_time.keys() == second_time.keys()
    assert all(torch.equal(tensor, second_time[name]) for name, tensor in first_time.items())
    adapter = load_adapter(run / f"step{last}")
    assert list(adapter.experts) == [f"model.layers.{i}.mlp.experts" for i in range(4)]
    assert tensors_of(run / "merged").keys() == tensors_of(base).keys()
    if over:
        assert "experts" in (run / "log.txt").read_text().split("base:")[1].split("\n")[0]
        return
    model = load_model(base)
    pairs = {f"{m}.{k}": getattr(p, k) for m, p in adapter.pairs.items() for k in "AB"}
    without = logits(model)
    with hooked(model, pairs, 2.0, multiplicative=True):
        live = logits(model)
    assert (live - without).abs().max() > 1e-4
    assert (logits(load_model(run / "merged")) - live).abs().max() < 1e-5 * live.abs().max()
