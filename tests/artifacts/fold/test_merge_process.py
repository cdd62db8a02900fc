"""The fold as a process: killed at any moment, stopped, measured, and imported without heavy packages."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold.merge import merge
from tests.helpers.artifacts import FACTS, bytes_of, files_of, random_tensors
from tests.helpers.paths import ROOT


def big_base(folder: Path, layers: int, rows: int, columns: int, files: int) -> Path:
    """A base of nothing but down_proj and one other weight a layer, bf16, in `files` files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    weight_map: dict[str, str] = {}
    for number in range(files):
        tensors = {}
        for layer in range(number, layers, files):
            values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(layer)).bfloat16()
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = values
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = values.T.contiguous()
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def adapter_for(folder: Path, layers: int, rows: int, columns: int) -> Path:
    modules = {f"model.layers.{i}.mlp.down_proj": (rows, columns) for i in range(layers)}
    tensors = random_tensors(modules, 8, multiplicative=True)
    save_adapter(folder, tensors, kind="multiplicative_lora", rank=8, alpha=8, **FACTS)
    return folder


def start(base: Path, adapter: Path, output: Path, force: bool) -> multiprocessing.process.BaseProcess:
    """The fold in a process of its own. A fork server has imported it already, so that kills fall into the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.artifacts.fold.merge"])
    process = context.Process(target=merge, args=(base, adapter, output), kwargs={"force": force})
    process.start()
    return process


def wait_until_written(place: Path, n_bytes: float, process: multiprocessing.process.BaseProcess) -> None:
    """Return when the unfinished output in `place` has grown to `n_bytes`, or the process has ended."""
    while process.is_alive():
        try:
            partial = [path for path in place.iterdir() if ".partial-" in path.name]
            if partial and sum(path.stat().st_size for path in partial[-1].iterdir()) >= n_bytes:
                return
        except FileNotFoundError:  # renamed or removed while we looked
            pass
        time.sleep(0.0005)


@pytest.mark.parametrize("force", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_no_output_or_the_old_one(tmp_path: Path, force: bool) -> None:
    """From the first byte to the renames: by the bytes written, and some milliseconds after the last of them."""
    base, adapter = big_base(tmp_path / "base", 8, 512, 1024, 3), adapter_for(tmp_path / "adapter", 8, 512, 1024)
    place = tmp_path / "place"
    whole = start(base, adapter, place / "out", False)
    whole.join(60)
    assert whole.exitcode == 0
    complete = files_of(place / "out")
    total, old = sum(map(len, complete.values())), {"precious": b"old"}
    killed_inside = 0
    moments = [
        (0, 0),
        (1, 0),
        (0.3 * total, 0),
        (0.6 * total, 0),
        (0.9 * total, 0),
        *((total, ms) for ms in range(0, 25, 4)),
    ]
    for n_bytes, ms in moments:
        shutil.rmtree(place / "out", ignore_errors=True)
        for aside in place.glob(".out.replaced-*"):
            shutil.rmtree(aside)
        if force:
            (place / "out").mkdir()
            (place / "out" / "precious").write_bytes(b"old")
        process = start(base, adapter, place / "out", force)
        wait_until_written(place, n_bytes, process)
        time.sleep(ms / 1000)
        process.kill()
        process.join(30)
        partial = [path for path in place.iterdir() if ".partial-" in path.name]
        killed_inside += bool(partial)
        assert len(partial) <= 1  # what an earlier kill left was cleared by the next start
        put_aside = [path for path in place.iterdir() if ".replaced-" in path.name]
        found = place / "out" if (place / "out").exists() else put_aside[0] if put_aside else None
        assert (files_of(found) if found else {}) in ([old, complete] if force else [{}, complete])
    assert killed_inside >= 5
    last = start(base, adapter, place / "out", True)
    last.join(60)
    assert files_of(place / "out") == complete
    assert sorted(path.name for path in place.iterdir()) == ["out"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "merge_lora.py"), *map(str, arguments)]


def test_a_stop_signal_removes_what_was_begun(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base", 24, 512, 1024, 1), adapter_for(tmp_path / "adapter", 24, 512, 1024)
    place = tmp_path / "place"
    place.mkdir()
    asked = command("--input", base, "--lora", adapter, "--output", place / "out")
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(place.glob(".out.partial-*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(place.iterdir())


WITHOUT = """
import runpy, sys
sys.argv = ["merge_lora.py", *sys.argv[1:]]
try:
    runpy.run_path("merge_lora.py", run_name="__main__")
except SystemExit as end:
    heavy = {"transformers", "deepspeed", "peft", "accelerate", "datasets", "bitsandbytes"} & set(sys.modules)
    sys.exit(f"imported: {heavy}" if heavy else end.code)
"""


def test_the_command_needs_neither_deepspeed_nor_transformers(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base", 2, 64, 96, 2), adapter_for(tmp_path / "adapter", 2, 64, 96)
    names = ["--input", str(base), "--lora", str(adapter), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *names], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out").keys() == bytes_of(base).keys()
    again = subprocess.run(command(*names), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr


GROWTH = """
import contextlib, io, re, sys
from pathlib import Path
from pipeline.artifacts.fold.merge import merge
folder = Path(sys.argv[1])

def peak():  # in bytes; getrusage would give the peak of the process that started this one where that was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

with contextlib.redirect_stdout(io.StringIO()):
    merge(folder / "small", folder / "adapter_small", folder / "out_small")
    before = peak()
    merge(folder / "large", folder / "adapter_large", folder / "out_large")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_about_one_tensor(tmp_path: Path) -> None:
    """256 MiB in one file of 4 tensors of 64 MiB; the libraries and one small fold are in the figure before."""
    big_base(tmp_path / "small", 1, 64, 96, 1), adapter_for(tmp_path / "adapter_small", 1, 64, 96)
    big_base(tmp_path / "large", 2, 4096, 8192, 1), adapter_for(tmp_path / "adapter_large", 2, 4096, 8192)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * 2 * 4096 * 8192, f"{int(done.stdout) / 2**20:.0f} MiB more"
