"""Every reason for which a fold does not happen: one message, exit code 2 (or 3, 28), and nothing written."""

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
from pipeline import files as files_module
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold import merge as merge_module
from pipeline.console import UserError, run_command
from pipeline.formats.safetensors import read_header
from tests.helpers.artifacts import FACTS, down_proj, edit_json, files_of, make_base, random_tensors

SQUARE = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.self_attn.o_proj": (32, 32)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded base and a multiplicative adapter that fold without complaint."""
    folder = tmp_path_factory.mktemp("made")
    make_base(folder / "base", dtype="bfloat16", shard="10KB")
    tensors = random_tensors(down_proj(), 4, multiplicative=True)
    save_adapter(folder / "adapter", tensors, kind="multiplicative_lora", rank=4, alpha=6, **FACTS)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


class Refused(Exception):
    """The command's exit code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@pytest.fixture
def fold(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run the command on base, adapter and out in `work`; what it printed, or Refused."""

    def run(*flags: str, base: str = "base", adapter: str = "adapter", output: str = "out") -> str:
        names = ["--input", str(work / base), "--lora", str(work / adapter), "--output", str(work / output)]
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *names, *flags])
        with pytest.raises(SystemExit) as ended:
            run_command(merge_lora.main)
        text = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        if ended.value.code != 0:
            assert "Traceback" not in text.err
            raise Refused(ended.value.code, text.err)
        return text.out

    return run


def refuses(work: Path, fold: Callable[..., str], words: str, *flags: str, code: int = 2, **names: str) -> None:
    """The command ends with `code` and a message that matches `words`, and every file is as it was."""
    before = files_of(work)
    with pytest.raises(Refused, match=words) as refused:
        fold(*flags, **names)
    assert refused.value.code == code
    assert files_of(work) == before
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def lora(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """A LORA adapter that names no author: PEFT's, or the hacked PEFT's."""
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": tensor for n, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    stored = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(stored))


def test_the_good_case_folds(work: Path, fold: Callable[..., str]) -> None:
    assert "written:" in fold()
    assert sorted(p.name for p in work.iterdir()) == ["adapter", "base", "out"]


def test_places_that_would_overwrite_what_is_read(work: Path, fold: Callable[..., str]) -> None:
    refuses(work, fold, "--input itself or lies inside it", output="base")
    refuses(work, fold, "--input itself or lies inside it", "--force", output="base/out")
    refuses(work, fold, "--lora itself or lies inside it", output="adapter/../adapter")
    refuses(work, fold, "contains --input", "--force", output=".")
    (work / "link").symlink_to(work / "base")
    with pytest.raises(Refused, match="--input itself"):
        fold("--force", output="link")


def test_an_output_with_something_in_it(work: Path, fold: Callable[..., str]) -> None:
    (work / "out").mkdir()
    (work / "out" / "precious").write_text("x")
    refuses(work, fold, "exists and is not empty.*--force")
    refuses(work, fold, "exists and is not empty.*--force", "--dry-run")
    fold("--force")
    assert not (work / "out" / "precious").exists()
    assert (work / "out" / "config.json").exists()
    (work / "file").write_text("x")
    refuses(work, fold, "is a file", "--force", output="file")


def test_force_keeps_the_old_output_when_the_fold_fails(work: Path, fold: Callable[..., str], monkeypatch) -> None:
    fold()
    monkeypatch.setattr(merge_module, "check_written", lambda *_: 1 / 0)
    before = files_of(work)
    with pytest.raises(ZeroDivisionError):
        fold("--force")
    assert files_of(work) == before


def test_folders_that_are_no_model_or_no_adapter(work: Path, fold: Callable[..., str]) -> None:
    (work / "empty").mkdir()
    refuses(work, fold, "--input: there is no folder", base="nowhere")
    refuses(work, fold, "--lora: there is no folder", adapter="nowhere")
    refuses(work, fold, "config.json is missing", base="empty")
    refuses(work, fold, "adapter_config.json is missing", adapter="empty")
    shutil.copy(work / "base" / "config.json", work / "empty")
    refuses(work, fold, "neither model.safetensors nor", base="empty")
    (work / "empty" / "pytorch_model.bin").write_text("x")
    refuses(work, fold, "a pickle, which can run code", base="empty")
    (work / "empty" / "config.json").write_text("[]")
    refuses(work, fold, "does not hold a JSON object", base="empty")


def test_a_quantised_base(work: Path, fold: Callable[..., str]) -> None:
    edit_json(work / "base" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refuses(work, fold, r"is quantised \(bitsandbytes\).*original 16-bit")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_target_in_a_dtype_that_cannot_be_folded(work: Path, fold: Callable[..., str], dtype: torch.dtype) -> None:
    name, file = "model.layers.1.mlp.down_proj.weight", None
    for file in (work / "base").glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: tensors[name].to(dtype)}, file)
    refuses(work, fold, f"{name} is stored as (U8|I8|F8_E4M3).*original 16-bit")


def test_modules_that_are_not_in_the_base(work: Path, fold: Callable[..., str]) -> None:
    """The whole name counts: `layers.1` is no part of `layers.11`, and a tied head has no tensor."""
    for index, (module, words) in enumerate(
        [
            ("model.layers.11.mlp.down_proj", "1 of the adapter's 4 modules .*layers.11.mlp.down_proj.*nearest"),
            (
                "model.layers.1.mlp.down",
                "model.layers.1.mlp.down.*nearest tensor there is model.layers.1.mlp.down_proj",
            ),
            ("layers.1.mlp.down_proj", "layers.1.mlp.down_proj"),
            ("odel.layers.1.mlp.down_proj", "odel.layers.1"),
        ]
    ):
        tensors = random_tensors({**down_proj(), module: (32, 48)}, 4, multiplicative=True)
        save_adapter(work / f"a{index}", tensors, kind="multiplicative_lora", rank=4, alpha=6, **FACTS)
        refuses(work, fold, words, adapter=f"a{index}")


def test_shapes_that_do_not_fit(work: Path, fold: Callable[..., str]) -> None:
    tensors = random_tensors(down_proj(3, 40, 48), 4, multiplicative=True)
    save_adapter(work / "wide", tensors, kind="multiplicative_lora", rank=4, alpha=6, **FACTS)
    refuses(work, fold, "A 4 × 40, B 40 × 4 on .*whose weight is 32 × 48.*another model", adapter="wide")
    lora(work / "foreign", tensors)
    refuses(work, fold, "the shapes do not fit", adapter="foreign")
    save_adapter(
        work / "norm",
        random_tensors({"model.norm": (32, 32)}, 4, multiplicative=True),
        kind="multiplicative_lora",
        rank=4,
        alpha=6,
        **FACTS,
    )
    refuses(work, fold, "model.norm.weight has shape .*needs a matrix", adapter="norm")


def test_square_weights_leave_the_kind_open(work: Path, fold: Callable[..., str]) -> None:
    lora(work / "square", random_tensors(SQUARE, 4, multiplicative=True))
    refuses(
        work, fold, r"A is 4 × 32 on .*square \(32 × 32\).*--kind lora or --kind multiplicative_lora", adapter="square"
    )
    one = fold("--kind", "lora", adapter="square", output="as_lora")
    other = fold("--kind", "multiplicative_lora", adapter="square", output="as_multiplicative")
    assert "W + s·B·A in" in one
    assert "W + s·B·(A·W) in" in other
    assert files_of(work / "as_lora") != files_of(work / "as_multiplicative")


def test_one_module_that_is_not_square_decides_for_all(work: Path, fold: Callable[..., str]) -> None:
    lora(work / "hacked", random_tensors({**SQUARE, **down_proj(1)}, 4, multiplicative=True))
    assert "W + s·B·(A·W) in" in fold("--dry-run", adapter="hacked")
    lora(work / "plain", random_tensors({**SQUARE, **down_proj(1)}, 4, multiplicative=False))
    assert "W + s·B·A in" in fold("--dry-run", adapter="plain")


def test_modules_of_two_kinds(work: Path, fold: Callable[..., str]) -> None:
    first = random_tensors({"model.layers.0.mlp.down_proj": (32, 48)}, 4, multiplicative=False)
    second = random_tensors({"model.layers.1.mlp.down_proj": (32, 48)}, 4, multiplicative=True)
    lora(work / "mixed", {**first, **second})
    refuses(work, fold, "All modules must be of one kind", adapter="mixed")


def test_a_kind_that_contradicts_the_files(work: Path, fold: Callable[..., str]) -> None:
    refuses(work, fold, "--kind lora: .*is a multiplicative_lora by its files and shapes", "--kind", "lora")
    lora(work / "plain", random_tensors(down_proj(), 4, multiplicative=False))
    refuses(work, fold, "is a lora by its", "--kind", "multiplicative_lora", adapter="plain")


def test_a_base_that_is_not_whole(work: Path, fold: Callable[..., str]) -> None:
    base = work / "base"
    shards = sorted(base.glob("*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-10])
    refuses(work, fold, f"{shards[1].name} has .* bytes where its header describes .*cut short")
    shards[1].unlink()
    refuses(work, fold, f"1 of {len(shards)} files of weights are missing, {shards[1].name}")
    shards[1].write_bytes(shards[0].read_bytes())
    refuses(work, fold, "model.safetensors.index.json disagree on")
    shards[1].write_bytes(content)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(work, fold, "disagree on 1 tensors: 'model.norm.weight' is not in the index")
    edit_json(base / "model.safetensors.index.json", weight_map={"x": "../base/" + shards[0].name})
    refuses(work, fold, r"index.json places .x. in .\.\./base/.*not the name of a file in this folder")


def test_strengths_and_devices_that_are_none(work: Path, fold: Callable[..., str]) -> None:
    for scale in ("0", "nan", "inf"):
        refuses(work, fold, "give a finite factor other than 0", "--scale", scale)
    refuses(work, fold, "--device nonsense: ", "--device", "nonsense")
    refuses(work, fold, "--device meta: ", "--device", "meta")
    if not torch.cuda.is_available():
        refuses(work, fold, "--device cuda: ", "--device", "cuda")
    refuses(work, fold, "invalid choice: 'int8'", "--dtype", "int8")


def test_a_logit_scale_that_the_config_cannot_hold(work: Path, fold: Callable[..., str]) -> None:
    tensors = random_tensors(down_proj(), 4, multiplicative=True)
    save_adapter(
        work / "loud", tensors, kind="multiplicative_lora", rank=4, alpha=6, **{**FACTS, "train_logit_scale": 1.1}
    )
    refuses(
        work, fold, "'llama' config has no key that scales the logits.*factor 1.1", "--keep-logit-scale", adapter="loud"
    )
    assert "logits times 1.1; dropped" in fold(adapter="loud")
    assert "nothing to keep" in fold("--keep-logit-scale", "--force")


def spoil(base: Path, name: str, value: float) -> None:
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][0, 0] = value
            save_file(tensors, file, metadata=read_header(file).metadata)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_too_large_for_float16(work: Path, fold: Callable[..., str], name: str) -> None:
    spoil(work / "base", name, 1e5)
    refuses(
        work, fold, f"{name}: .*e\\+0[45] does not fit: F16 ends at 6.55e\\+04.*--dtype bfloat16", "--dtype", "float16"
    )
    fold("--dtype", "float32")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_changed_weight_that_is_not_finite(work: Path, fold: Callable[..., str], value: float) -> None:
    spoil(work / "base", "model.layers.1.mlp.down_proj.weight", value)
    refuses(work, fold, "model.layers.1.mlp.down_proj.weight: the fold gives NaN or infinite")


def test_too_little_disk_space(work: Path, fold: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for flags in ([], ["--dry-run"]):
        refuses(work, fold, "not enough disk space .*KiB needed, 1000 B free", *flags, code=28)


@pytest.mark.parametrize("moment", [0, 1, 3])
def test_a_disk_that_fills_up_on_the_way(work: Path, fold: Callable[..., str], monkeypatch, moment: int) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > moment:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refuses(work, fold, "the disk is full: more than", code=28)


def test_a_dry_run_checks_prints_and_writes_nothing(work: Path, fold: Callable[..., str]) -> None:
    before = files_of(work)
    said = fold("--dry-run", "--dtype", "float32", "--scale", "0.5", output="deep/out")
    assert files_of(work) == before
    assert not (work / "deep").exists()
    assert "BF16 → F32" in said
    assert "6 / 4 × 0.5 (--scale) = 0.75" in said
    assert "dry run: nothing was written" in said


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_byte_that_changes_on_the_disk_is_found(work: Path, fold: Callable[..., str], monkeypatch, name: str) -> None:
    """Between writing and checking one bit of one tensor flips; safetensors itself would not notice."""
    check = merge_module.check_written

    def after_damage(plan: Any, folder: Path, *rest: Any) -> float:
        file = next(f for f in folder.glob("*.safetensors") if name in {t.name for t in read_header(f).tensors})
        tensor = next(t for t in read_header(file).tensors if t.name == name)
        content = bytearray(file.read_bytes())
        content[tensor.start + tensor.n_bytes // 2] ^= 1
        file.write_bytes(content)
        return check(plan, folder, *rest)

    monkeypatch.setattr(merge_module, "check_written", after_damage)
    refuses(work, fold, f"{name} in .* reads back with other bytes", code=3)


@pytest.mark.parametrize("fault", [lambda t: t.mul_(1.02), lambda t: t.zero_(), lambda t: t.copy_(t.roll(1, 0))])
def test_a_fold_that_computes_something_else_is_found(work: Path, fold: Callable[..., str], monkeypatch, fault) -> None:
    """The arithmetic is spoiled: 2% more change, none, or rows exchanged. fp64 sees it, bytes alone would not."""
    from pipeline.artifacts.fold import rows as fold_rows

    real = torch.mm
    monkeypatch.setattr(fold_rows, "torch", SimpleNamespace(**{**vars(torch), "mm": lambda a, b: fault(real(a, b))}))
    refuses(work, fold, "deviates from the fold in fp64 by", code=3)


def test_an_output_where_nothing_can_be_written(work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "below" / "out"
    with pytest.raises(UserError, match="cannot write to"), files_module.atomic_folder(output):
        pass
