"""The export as a command: what it refuses, what it leaves behind, what it reads and how much memory it takes."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import export_lora
from pipeline import files as files_module
from pipeline.console import UserError, run_command
from pipeline.files import atomic_file
from tests.helpers.artifacts import edit_json, files_of, make_base, multiplicative, random_tensors
from tests.helpers.paths import ROOT

FORMATS = ("peft", "gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base and a multiplicative adapter that export without complaint."""
    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base", dtype="bfloat16", shard="10KB")
    multiplicative(folder / "adapter")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the command in `work`: its exit code, and what it said or why not."""

    def command(format: str, *flags: str, output: str = "out") -> tuple[int, str]:
        names = ["--input", str(work / "base"), "--lora", str(work / "adapter"), "--output", str(work / output)]
        monkeypatch.setattr(sys, "argv", ["export_lora.py", *names, "--format", format, *flags])
        with pytest.raises(SystemExit) as ended:
            run_command(export_lora.main)
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return ended.value.code, text.out + text.err if ended.value.code == 0 else text.err

    return command


def refuses(
    work: Path, run: Callable, words: str, format: str, *flags: str, code: int = 2, output: str = "out"
) -> None:
    """The command ends with `code` and a message that matches `words`, and every file is as it was."""
    before = files_of(work)
    found, message = run(format, *flags, output=output)
    assert found == code, message
    assert re.search(words, message), message
    assert files_of(work) == before


@pytest.mark.parametrize("format", FORMATS)
def test_a_dry_run_says_everything_and_writes_nothing(work: Path, run: Callable, format: str) -> None:
    before = files_of(work)
    code, text = run(format, "--dry-run")
    assert code == 0
    assert files_of(work) == before
    for words in ("A' = A·W", "rank 4, s = 6 / 4 = 1.5", "3 of 30 tensors", "dry run: nothing was written"):
        assert words in text, text
    assert ("architecture llama" in text) == (format == "gguf")
    assert run(format)[0] == 0
    assert (work / "out").exists()


def test_an_adapter_of_another_base_is_exported_with_a_warning(work: Path, run: Callable) -> None:
    assert "warning" not in run("peft", "--dry-run")[1]
    shutil.rmtree(work / "adapter")
    multiplicative(work / "adapter", base_model="owner/other")
    code, text = run("peft")
    assert code == 0
    assert "was trained on owner/other" in text


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_output_is_replaced_only_when_asked(work: Path, run: Callable, format: str) -> None:
    assert run(format)[0] == 0
    refuses(work, run, "exists.*--force", format)
    whole = files_of(work)
    assert run(format, "--force")[0] == 0
    assert files_of(work) == whole
    refuses(work, run, "--input itself or lies inside it", format, "--force", output="base/out")
    if format == "gguf":
        (work / "folder").mkdir()
        refuses(work, run, "is a folder; give the name of a file", format, "--force", output="folder")


@pytest.mark.parametrize("format", FORMATS)
def test_adapters_that_do_not_fit_are_refused(work: Path, run: Callable, format: str) -> None:
    file = work / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(dict(list(whole.items())[1:]), file, metadata=_metadata(file))
    refuses(work, run, "The adapter is incomplete", format)
    elsewhere = {name.replace("layers.2", "layers.7"): tensor for name, tensor in whole.items()}
    save_file(elsewhere, file, metadata=_metadata(file))
    refuses(work, run, "1 of the adapter's 3 modules are not in", format)
    save_file({**whole, "extra.weight": torch.zeros(2)}, file, metadata=_metadata(file))
    refuses(work, run, "1 tensors are no peanut_A or peanut_B", format)
    narrow = {name: t[:, :16].contiguous() if name.endswith("A.weight") else t for name, t in whole.items()}
    save_file(narrow, file, metadata=_metadata(file))
    refuses(work, run, "the shapes do not fit", format)


def _metadata(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_strength_of_zero_is_refused(work: Path, run: Callable, format: str) -> None:
    """llama.cpp takes an alpha of 0 for "no scaling", and would apply the adapter at strength 1."""
    shutil.rmtree(work / "adapter")
    multiplicative(work / "adapter", alpha=0.0)
    refuses(work, run, "the scaling of .* is 0 .*does nothing", format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_base_with_infinite_values_is_refused(work: Path, run: Callable, format: str) -> None:
    file = next(f for f in (work / "base").glob("*.safetensors") if any("down" in name for name in load_file(f)))
    tensors = load_file(file)
    name = next(name for name in tensors if "down" in name)
    tensors[name][3, 5] = torch.inf
    save_file(tensors, file, metadata={"format": "pt"})
    refuses(work, run, "A' of .*down_proj holds NaN or infinite values", format)


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_bases_and_ambiguous_adapters_are_refused(work: Path, run: Callable, format: str) -> None:
    edit_json(work / "base" / "config.json", quantization_config={"quant_method": "gptq"})
    refuses(work, run, r"quantised \(gptq\)", format)
    edit_json(work / "base" / "config.json", quantization_config=None)
    square = random_tensors({"model.layers.0.self_attn.o_proj": (32, 32)}, 4, multiplicative=True)
    named = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": tensor for n, tensor in square.items()}
    save_file(named, work / "adapter" / "adapter_model.safetensors")
    (work / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    refuses(work, run, "Say which it is: --kind", format)
    assert run(format, "--kind", "multiplicative_lora")[0] == 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_exit_code_28_and_leaves_nothing(work: Path, run: Callable, format: str, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(files_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
        refuses(work, run, "not enough disk space", format, code=28)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    refuses(work, run, "the disk is full: more than", format, code=28)


def test_a_file_appears_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    for text, replace in (("new", False), ("newer", True)):
        with atomic_file(output, replace=replace) as file:
            file.write_text(text)
            assert not output.exists() or output.read_text() == "new"
        assert files_of(tmp_path) == {"deep/out": text.encode()}
    with pytest.raises(UserError, match=r"exists.*--force"), atomic_file(output):
        pass
    with pytest.raises(RuntimeError), atomic_file(output, replace=True) as file:
        file.write_text("half")
        raise RuntimeError
    (tmp_path / "deep" / ".out.partial").write_text("a longer text that a killed process left")
    assert output.read_text() == "newer"
    with atomic_file(output, replace=True) as file:
        assert file.read_bytes() == b""
    assert files_of(tmp_path) == {"deep/out": b""}


def _hold(output: Path, entered: Callable, leave: Callable) -> None:
    with atomic_file(output) as file:
        file.write_text("theirs")
        entered.set()  # type: ignore[attr-defined]
        leave.wait(30)  # type: ignore[attr-defined]


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", entered, leave))
    other.start()
    assert entered.wait(30)
    with pytest.raises(UserError, match="another process is writing"), atomic_file(tmp_path / "out"):
        pass
    leave.set()
    other.join(30)
    assert files_of(tmp_path) == {"out": b"theirs"}


GROWTH = """
import contextlib, io, re, sys
from pathlib import Path
from pipeline.artifacts.export.export import export
folder = Path(sys.argv[1])

def peak():  # in bytes; getrusage would give the peak of the process that started this one where that was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

def grown(format):
    export(folder / "small", folder / "adapter_small", folder / f"small_{format}", format=format)
    before = peak()
    export(folder / "large", folder / "adapter_large", folder / f"large_{format}", format=format)
    return peak() - before

with contextlib.redirect_stdout(io.StringIO()):
    growths = [grown("peft"), grown("gguf")]
heavy = {"transformers", "deepspeed", "peft", "accelerate", "datasets", "bitsandbytes"} & set(sys.modules)
print(*growths, *heavy)
"""


def base_of_zeros(folder: Path, layers: int, rows: int, columns: int) -> Path:
    """Two matrices a layer, bf16 zeros that take no disk: only how much is read matters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    names = [f"model.layers.{i}.mlp.{name}.weight" for i in range(layers) for name in ("down_proj", "up_proj")]
    size, header = 2 * rows * columns, {}
    for number, name in enumerate(names):
        shape = [rows, columns] if "down" in name else [columns, rows]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [number * size, (number + 1) * size]}
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + len(names) * size)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_blocks_and_not_of_the_model(tmp_path: Path) -> None:
    """1 GiB in 16 matrices of 64 MiB: blocks and the adapter, together less than one. No heavy package is imported."""
    for name, shape in (("small", (1, 64, 96)), ("large", (8, 4096, 8192))):
        base_of_zeros(tmp_path / name, *shape)
        modules = {f"model.layers.{i}.mlp.down_proj": shape[1:] for i in range(shape[0])}
        multiplicative(tmp_path / f"adapter_{name}", modules, rank=8)  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    peft, gguf, *heavy = done.stdout.split()
    assert not heavy
    assert max(int(peft), int(gguf)) < 64 * 2**20, done.stdout
