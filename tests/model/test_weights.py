"""Weights from safetensors into a stage: its own, bit for bit, in memory of about its own size; or a clear refusal."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from tests.helpers import builders
from tests.helpers.stages import build, chain, hidden, token_ids

CUTS = [0, 1, 3, 4]


def sharded(folder: Path, kind: str, **changes: Any) -> Any:
    """A tiny model in many files; returns it."""
    model = builders.save_model(folder, kind, **changes)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return model


@pytest.mark.parametrize("save", [builders.save_model, sharded], ids=["one file", "sharded"])
@pytest.mark.parametrize("kind", ["llama", "cohere", "mixtral", "qwen3_moe"])
def test_each_stage_has_its_own_parameters_bit_for_bit(tmp_path: Path, kind: str, save: Callable[..., Any]) -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    whole = dict(save(tmp_path, kind, **experts).named_parameters())
    stages = chain(tmp_path, CUTS)
    for number, stage in enumerate(stages):
        layers = tuple(f"model.layers.{i}." for i in range(CUTS[number], CUTS[number + 1]))
        expected = {name for name in whole if name.startswith(layers)}
        expected |= {"model.embed_tokens.weight"} if number == 0 else set()
        expected |= {"model.norm.weight", "lm_head.weight"} if number == 2 else set()
        found = dict(stage.model.named_parameters())
        assert found.keys() == expected
        for name, parameter in found.items():
            source = whole.get(name, whole["model.embed_tokens.weight"])  # a tied head is not named on its own
            assert torch.equal(parameter, source), name
            assert not parameter.requires_grad


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_weights_take_the_dtype_asked_for(tmp_path: Path, kind: str) -> None:
    builders.save_model(tmp_path, kind)
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in build(tmp_path, 0, 4, torch.bfloat16).model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, right.get_parameter(name)), name


def test_tied_head_is_one_tensor_on_one_stage_and_two_on_two(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "cohere")
    assert "lm_head.weight" not in read_base(tmp_path).tensors, "the checkpoint stores it once"
    alone = build(tmp_path, 0, 4)
    assert alone.head.weight is alone.model.get_input_embeddings().weight
    first, last = chain(tmp_path, [0, 2, 4])
    assert torch.equal(last.head.weight, first.model.get_input_embeddings().weight)
    names = dict(last.model.named_parameters())
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names


def test_head_that_is_not_tied_is_its_own(tmp_path: Path) -> None:
    whole = builders.save_model(tmp_path, "cohere", tie_word_embeddings=False)
    assert not torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight)
    for stages in (chain(tmp_path, [0, 4]), chain(tmp_path, [0, 2, 4])):
        assert torch.equal(stages[-1].head.weight, whole.lm_head.weight)


@torch.no_grad()
def test_checkpoint_of_the_base_model_alone(tmp_path: Path) -> None:
    """Saved from AutoModel, names lack the prefix 'model.'; the tied head is the embedding."""
    whole = builders.save_model(tmp_path, "cohere")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k.removeprefix("model."): t for k, t in tensors.items()}, tmp_path / "model.safetensors")
    assert torch.equal(hidden(chain(tmp_path, [0, 4]), token_ids()), whole.base_model(token_ids())[0])


def test_changing_a_weight_does_not_change_the_file(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    before = (tmp_path / "model.safetensors").read_bytes()
    stage = build(tmp_path, 0, 4)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# What is missing or wrong


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("cohere", "model.norm.weight"),
        ("mixtral", "model.layers.1.self_attn.o_proj.weight"),
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, kind: str, name: str) -> None:
    builders.save_model(tmp_path, kind)
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"no tensor for .*{name}"):
        build(tmp_path, 0, 4)


def test_missing_expert_is_noticed(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "mixtral")
    names = [name for name in read_base(tmp_path).tensors if "layers.1." in name and ".experts." in name]
    assert len(names) > 3, "experts are stored one by one"
    rewrite(tmp_path, lambda tensors: tensors.pop(names[-1]))
    with pytest.raises(UserError, match=r"layers\.1\..*experts"):
        build(tmp_path, 0, 4)


def test_missing_tensor_of_another_stage_is_its_own_affair(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    assert build(tmp_path, 0, 2)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_wrong_shape_is_named_with_both(tmp_path: Path, kind: str) -> None:
    builders.save_model(tmp_path, kind)
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(32, 24)}))
    with pytest.raises(UserError, match=rf"{name}.*\[32, 24\].*\[32, 32\]"):
        build(tmp_path, 0, 4)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, "llama")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"{lost.name}.*incomplete"):
        read_base(tmp_path)


def test_shard_without_a_tensor_the_index_promises(tmp_path: Path) -> None:
    sharded(tmp_path, "llama")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.3.mlp.up_proj.weight"
    path = tmp_path / index[name]
    save_file({k: t for k, t in load_file(path).items() if k != name}, path)
    with pytest.raises(UserError, match=name):
        build(tmp_path, 0, 4)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "neither model.safetensors .*There are no weights"),
        ({"pytorch_model.bin": b"\x80"}, "neither model.safetensors .*has pytorch_model.bin, a pickle"),
        (
            {"pytorch_model-00001-of-00002.bin": b"", "pytorch_model-00002-of-00002.bin": b""},
            "has pytorch_model-00001",
        ),
        ({"model.safetensors": b""}, "model.safetensors"),
        ({"model.safetensors": b"\x10\0\0\0\0\0\0\0{}"}, "model.safetensors"),
        ({"model.safetensors.index.json": b"{"}, "model.safetensors.index.json"),
        ({"model.safetensors.index.json": b"{}"}, "model.safetensors.index.json"),
    ],
    ids=["nothing", "pickle", "pickles", "empty", "truncated", "broken index", "empty index"],
)
def test_folders_without_readable_safetensors(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    for name, content in {"config.json": b"{}", **files}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_base(tmp_path)


def test_truncated_file_is_a_user_error(tmp_path: Path) -> None:
    builders.save_model(tmp_path, "llama")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        build(tmp_path, 0, 4)


# Memory

MEASURE = """
import os, sys, threading, time, torch
from pathlib import Path
import transformers.core_model_loading, transformers.conversion_mapping  # what is imported is not what is measured
from pipeline.model import weights
from pipeline.model.stage import Stage, empty_model, read_model_config

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024, int(lines["RssFile"].split()[0]) * 1024

def measure(folder, first, end):
    stage = Stage(empty_model(read_model_config(folder), torch.bfloat16, None), first, end)
    before, peak, done = resident(), [0, 0], threading.Event()

    def watch():
        while not done.is_set():
            peak[:] = map(max, peak, resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    weights.load(stage, folder, torch.bfloat16, torch.device("cpu"))
    time.sleep(0.005)
    done.set()
    thread.join()
    assert all(p.dtype == torch.bfloat16 for p in stage.parameters())
    own = sum(p.numel() * p.element_size() for p in stage.parameters())
    print(own, peak[0] - before[0], peak[1] - before[1], flush=True)

for folder in sys.argv[3:]:  # each in a process of its own, so that none finds memory which another has freed
    if not (child := os.fork()):
        measure(folder, int(sys.argv[1]), int(sys.argv[2]))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_loading_a_stage_needs_about_its_own_size(tmp_path: Path) -> None:
    """A quarter of the layers of a model of 170 MiB as stored in fp32, loaded in bf16, in a process of its own.

    Anonymous memory: the stage's own weights, and what is on its way: one tensor in fp32 and bf16, less than a layer's
    bf16 size; for experts, which transformers stacks, those of one layer in fp32, joined and cast: thrice that size.
    Pages of the files are not anonymous, but those touched should be the stage's own: twice its bf16 size.
    """
    size = {"hidden_size": 512, "head_dim": 128, "num_attention_heads": 4, "layers": 16}
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"intermediate_size": 1280},
        "mixtral": {"num_local_experts": 4, "intermediate_size": 320},
    }
    for kind, changes in kinds.items():
        model = AutoModelForCausalLM.from_config(builders.model_config(kind, **{**size, **changes}))
        stored = sum(p.numel() * 4 for p in model.parameters())
        assert 150 * MIB < stored < 200 * MIB
        model.save_pretrained(tmp_path / kind, max_shard_size="50MB")
        del model
    command = [sys.executable, "-c", MEASURE, "4", "8", *(str(tmp_path / kind) for kind in kinds)]
    environment = {**builders.environment(), "PYTHONPATH": str(builders.ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for kind, line in zip(kinds, result.stdout.splitlines()[-2:], strict=True):
        own, anonymous, of_files = map(int, line.split())
        assert own * 8 == pytest.approx(stored, rel=0.02), "a quarter, in half the bytes"
        on_its_way = own / 4 * (3 if kind == "mixtral" else 1)
        slack = 8 * MIB  # the interpreter's own: parsed headers, code that runs for the first time
        assert own * 0.9 <= anonymous <= own + on_its_way + slack, (kind, own, anonymous)
        assert of_files <= 2 * own + on_its_way + slack, (kind, own, of_files)
