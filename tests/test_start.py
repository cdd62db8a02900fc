"""A start on a plain shell: no compiler, no ninja, no PATH of ours, an empty home; DeepSpeed's extension stays out of it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT, environment, finish, save_model, write_config
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from pipeline.training import engine

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What DeepSpeed's backend compiles and loads on a CPU where that would work. Nothing is compiled here."""
    backend = importlib.import_module("deepspeed.comm.torch")
    accelerator, loaded = CPU_Accelerator(), []
    builder = type(accelerator.create_op_builder("ShareMemCommBuilder"))
    monkeypatch.setattr(backend, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr("deepspeed.ops.__compatible_ops__", {builder.NAME: True}, raising=False)
    monkeypatch.setattr(builder, "load", lambda self: loaded.append(self.NAME))
    monkeypatch.setattr(backend.TorchBackend, "init_process_group", lambda self, *a: None)
    return loaded


def test_deepspeed_loads_its_extension_unless_told_not_to(loads: list[str]) -> None:
    """Fails when DeepSpeed no longer loads it, or from another place: then the workaround can go, or must move."""
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.TorchBackend("gloo", None, None)
    assert loads == ["deepspeed_shm_comm"]
    loads.clear()
    with engine.without_shared_memory_extension():
        assert backend.TorchBackend("gloo", None, None).shm_comm_op is None
    assert not loads


def test_two_stages_train_from_a_plain_shell(tmp_path: Path) -> None:
    """`deepspeed` by its path, nothing on PATH, an empty home: nothing is compiled, and nothing left in either or in memory."""
    save_model(tmp_path / "base")
    toml = write_config(
        tmp_path / "c.toml", model=str(tmp_path / "base"), output_dir=str(tmp_path / "runs"), max_steps=1
    )
    home, nothing = tmp_path / "home", tmp_path / "nothing"
    home.mkdir()
    nothing.mkdir()
    # DeepSpeed names what it leaves by the port: another than any run that goes on beside this one.
    port = str(20000 + os.getpid() % 10000)
    command = [
        Path(sys.executable).parent / "deepspeed",
        "--quiet",
        "--num_gpus",
        "2",
        "--master_port",
        port,
        "train.py",
    ]
    kept = {key: value for key, value in environment().items() if key in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    launcher = subprocess.Popen(
        [*map(str, command), "--config", str(toml)], cwd=ROOT, env={**kept, "HOME": str(home), "PATH": str(nothing)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    output = finish(launcher, expect=0, timeout=240)
    assert "done: 1 steps" in output and "Traceback" not in output
    assert not [path.name for path in SHARED_MEMORY.glob("*") if port in path.name]
    assert not list(home.iterdir())
