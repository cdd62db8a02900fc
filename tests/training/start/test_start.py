"""A start on a plain shell: no compiler, no ninja, no PATH of ours, an empty home; DeepSpeed's extension stays out of it."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from pipeline import console
from pipeline.training.engine import engine
from pipeline.training.start import launch
from tests.helpers.builders import ROOT, environment, finish, save_model, write_config

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


def test_what_takes_long_is_said_and_what_does_not_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SLOW_S", 0.1)
    with console.log_if_slow("a trifle"):
        pass
    with console.log_if_slow("the work"):
        deadline = time.monotonic() + 30
        said = ""
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
            said = capsys.readouterr().out
    assert said == "the work …\n"


@pytest.mark.parametrize("found", [True, False], ids=["on PATH", "not on PATH"])
def test_the_command_to_type_is_one_that_this_shell_finds(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a link of that name is looked for, and none of another environment is taken."""
    ours, others = tmp_path / "venv/bin", tmp_path / "others"
    for folder in (ours, others):
        folder.mkdir(parents=True)
        (folder / "deepspeed").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    monkeypatch.setenv("PATH", str(ours if found else others))
    monkeypatch.chdir(tmp_path)
    typed = launch.command(2, ["train.py", "--local_rank=0", "--config", "my run.toml"])
    assert typed == f"{'' if found else 'venv/bin/'}deepspeed --quiet --num_gpus 2 train.py --config 'my run.toml'"


@pytest.mark.slow
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
        [*map(str, command), "--config", str(toml)],
        cwd=ROOT,
        env={**kept, "HOME": str(home), "PATH": str(nothing)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = finish(launcher, expect=0, timeout=240)
    assert "done: 1 steps" in output
    assert "Traceback" not in output
    assert not [path.name for path in SHARED_MEMORY.glob("*") if port in path.name]
    left = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    kept = {f".cache/mulora-pipe/file_hashes.{ending}" for ending in ("lock", "sqlite")}
    assert left == kept, "hashes of data are remembered, and nothing else is left"
