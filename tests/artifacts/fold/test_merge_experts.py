"""Adapters of a layer's experts, folded: one by one, as one tensor, transposed, with biases. Oracle: the live model.

The adapter is written by what a run writes with, and the live model is transformers' own with a hook, no code of ours.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter.adapter import OWN_TYPE
from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from pipeline.formats.experts import ExpertWeights
from pipeline.model.adapters import experts
from pipeline.publishing import after_training
from tests.helpers.artifacts import (
    FACTS,
    bytes_of,
    files_of,
    hooked,
    load_model,
    logits,
    make_base,
    random_tensors,
    tensors_of,
)
from tests.helpers.mixtures import LAYERS, MIXTURES, SIZES, save_mixture
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("small_blocks")
S, RANK, WIDTH = 1.5, 4, SIZES["hidden_size"]
FORMS = {"gpt_oss": ExpertWeights("down_proj", "down_proj_bias", True)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's model, made once."""

    @cache
    def get(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("bases") / kind
        save_mixture(folder, kind)
        return folder

    return get


def adapted(folder: Path, kind: str, layers: range, **facts: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of the experts of these layers; its tensors."""
    modules = {f"model.layers.{i}.{MIXTURES[kind][1]}": (WIDTH, WIDTH) for i in layers}
    tensors = random_tensors(modules, RANK, multiplicative=True)
    form = FORMS.get(kind, ExpertWeights("down_proj", None, False))
    written = {**FACTS, "biased_targets": form.bias is not None, "experts": dict.fromkeys(modules, form), **facts}
    save_adapter(folder, tensors, kind="multiplicative_lora", rank=RANK, alpha=S * RANK, **written)
    return tensors


def mixture_layers(kind: str) -> range:
    return range(1 if kind == "deepseek_v3" else 0, LAYERS)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_fold_is_the_live_model(saved: Any, tmp_path: Path, kind: str) -> None:
    base = saved(kind)
    tensors = adapted(tmp_path / "adapter", kind, mixture_layers(kind))
    model = load_model(base)
    before = logits(model)
    with hooked(model, tensors, S, multiplicative=True):
        live = logits(model)
    figures = merge(base, tmp_path / "adapter", tmp_path / "out")
    result = logits(load_model(tmp_path / "out"))
    assert (live - before).abs().max() > 1e-2
    assert (result - live).abs().max() < 3e-5 * live.abs().max()
    stored, found = bytes_of(base), bytes_of(tmp_path / "out")
    changed = {name for name in stored if stored[name] != found[name]}
    assert changed == {figure.name for figure in figures}
    assert f"model.layers.{LAYERS - 1}.{MIXTURES[kind][2]}" in changed
    of_layer = {"mixtral": 4, "qwen3_moe": 4, "deepseek_v3": 4, "granitemoe": 1, "gpt_oss": 2}[kind]
    assert len(changed) == of_layer * len(mixture_layers(kind))
    assert all(0.999 < figure.gain < 1.001 for figure in figures)
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    first = tensors_of(base)
    assert all((tensor - first[name]).abs().max() < 1e-4 for name, tensor in tensors_of(tmp_path / "back").items())


def test_square_experts_lie_as_the_model_runs_them(tmp_path: Path) -> None:
    """With as many inner numbers as outer ones the shapes do not say which way round the tensors lie."""
    for kind in ("granitemoe", "gpt_oss"):
        folder = tmp_path / kind
        save_mixture(folder / "base", kind, intermediate_size=WIDTH)
        tensors = adapted(folder / "adapter", kind, range(LAYERS))
        model = load_model(folder / "base")
        with hooked(model, tensors, S, multiplicative=True):
            live = logits(model)
        merge(folder / "base", folder / "adapter", folder / "out")
        assert (logits(load_model(folder / "out")) - live).abs().max() < 3e-5 * live.abs().max()


def test_several_adapters_on_the_same_experts(saved: Any, tmp_path: Path) -> None:
    base = saved("gpt_oss")
    model = load_model(base)
    one = adapted(tmp_path / "one", "gpt_oss", range(2))
    other = {name: tensor.flip(0) for name, tensor in adapted(tmp_path / "x", "gpt_oss", range(1, 3)).items()}
    modules = [name[:-2] for name in other if name.endswith(".A")]
    save_adapter(
        tmp_path / "other",
        other,
        kind="multiplicative_lora",
        rank=RANK,
        alpha=S * RANK,
        **{**FACTS, "biased_targets": True, "experts": dict.fromkeys(modules, FORMS["gpt_oss"])},
    )
    # Hooks run in the order in which they are put in, each on what the one before gave.
    with hooked(model, one, S, multiplicative=True), hooked(model, other, S, multiplicative=True):
        live = logits(model)
    merge(base, [tmp_path / "one", tmp_path / "other"], tmp_path / "out", scale=[1.0, 1.0])
    assert (logits(load_model(tmp_path / "out")) - live).abs().max() < 3e-5 * live.abs().max()
    merge(base, tmp_path / "one", tmp_path / "part", layers="1", scale=0.5)
    with hooked(model, {n: t for n, t in one.items() if ".layers.1." in n}, S / 2, multiplicative=True):
        live = logits(model)
    assert (logits(load_model(tmp_path / "part")) - live).abs().max() < 3e-5 * live.abs().max()


def test_what_the_files_say(saved: Any, tmp_path: Path) -> None:
    adapted(tmp_path / "adapter", "gpt_oss", range(2))
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.kind == "multiplicative_lora"
    assert adapter.moves_bias
    assert adapter.experts == dict.fromkeys([f"model.layers.{i}.mlp.experts" for i in (0, 1)], FORMS["gpt_oss"])
    assert f'"{OWN_TYPE}"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.experts.peanut_A.weight" in names


def test_what_is_refused(saved: Any, tmp_path: Path) -> None:
    base = saved("mixtral")
    adapted(tmp_path / "adapter", "mixtral", range(LAYERS))
    for form in ("peft", "gguf"):
        with pytest.raises(UserError, match=r"changes the experts of 3 layers .* Fold it"):
            export(base, tmp_path / "adapter", tmp_path / "exported", format=form)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lacks tensors of the experts in model.layers.0.mlp.experts.down_proj"):
        adapted(tmp_path / "dense", "mixtral", range(1))
        merge(_dense(tmp_path), tmp_path / "dense", tmp_path / "out")
    with pytest.raises(UserError, match="write 16 numbers"):
        narrow = random_tensors({"model.layers.0.mlp.experts": (16, 16)}, RANK, multiplicative=True)
        form = {"model.layers.0.mlp.experts": ExpertWeights("down_proj", None, False)}
        facts = {**FACTS, "experts": form}
        save_adapter(tmp_path / "narrow", narrow, kind="multiplicative_lora", rank=RANK, alpha=4, **facts)
        merge(base, tmp_path / "narrow", tmp_path / "out")
    before = files_of(tmp_path)
    weights = load_file(base / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    weights.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensors of the experts in model.layers.1.mlp.experts.down_proj, or"):
        merge(broken, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert before.items() <= files_of(tmp_path).items()


def test_the_end_of_a_run_is_foreseen(saved: Any, tmp_path: Path) -> None:
    module = "model.layers.2.mlp.experts"
    asked: dict[str, Any] = {
        "output_dir": tmp_path,
        "kind": "multiplicative_lora",
        "targets": [module],
        "biased_targets": True,
        "experts": {module: FORMS["gpt_oss"]},
        "width": WIDTH,
    }
    after_training.check(["merge"], base=saved("gpt_oss"), **asked)
    with pytest.raises(UserError, match=r"'export:gguf' cannot be done: .* is a layer's experts"):
        after_training.check(["export:gguf"], base=saved("gpt_oss"), **asked)
    with pytest.raises(UserError, match=r"'merge' cannot be done: .* lacks tensors of the experts"):
        after_training.check(["merge"], base=_dense(tmp_path), **asked)


def _dense(folder: Path) -> Path:
    return make_base(folder / "llama") if not (folder / "llama").is_dir() else folder / "llama"


GROWTH = """
import contextlib, io, re, sys
from pathlib import Path
from pipeline.artifacts.fold.merge import merge
folder = Path(sys.argv[1])

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

with contextlib.redirect_stdout(io.StringIO()):
    merge(folder / "small", folder / "small_adapter", folder / "small_out")
    before = peak()
    merge(folder / "large", folder / "large_adapter", folder / "large_out")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_a_part_of_the_tensor_of_all_experts(tmp_path: Path, transposed: bool) -> None:
    """256 MiB of experts in one tensor; a matrix at a time, or rows of it, are in memory."""
    module, name = "model.layers.0.mlp.experts", "model.layers.0.mlp.experts.down_proj"
    for size, (count, outer, inner) in {"small": (2, 64, 32), "large": (64, 2048, 1024)}.items():
        (tmp_path / size).mkdir()
        (tmp_path / size / "config.json").write_text('{"model_type": "gpt_oss"}')
        shape = (count, inner, outer) if transposed else (count, outer, inner)
        tensors = {name: torch.ones(shape, dtype=torch.bfloat16)}
        save_file(tensors, tmp_path / size / "model.safetensors", metadata={"format": "pt"})
        pairs = random_tensors({module: (outer, outer)}, RANK, multiplicative=True)
        facts = {**FACTS, "experts": {module: ExpertWeights("down_proj", None, transposed)}}
        save_adapter(tmp_path / f"{size}_adapter", pairs, kind="multiplicative_lora", rank=RANK, alpha=4, **facts)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 2**20:.0f} MiB more")
    assert int(done.stdout) < 64 * 2**20


def test_experts_that_are_given_sorted_rows(tmp_path: Path) -> None:
    """llama4: its experts multiply [E, T, D] at once and know no router, and transformers does not say how they lie."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **sizes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path / "base")
    calls = experts._calls(model, {"experts": model.get_submodule("model.layers.1.feed_forward.experts")})
    with torch.no_grad():
        form = experts._written_with(model.get_submodule("model.layers.1.feed_forward.experts"), *calls["experts"])
    assert form == ExpertWeights("down_proj", None, True)
    modules = {f"model.layers.{i}.feed_forward.experts": (WIDTH, WIDTH) for i in range(LAYERS)}
    tensors = random_tensors(modules, RANK, multiplicative=True)
    facts = {**FACTS, "experts": dict.fromkeys(modules, form)}
    save_adapter(tmp_path / "adapter", tensors, kind="multiplicative_lora", rank=RANK, alpha=S * RANK, **facts)
    before = logits(model)
    with hooked(model, tensors, S, multiplicative=True):
        live = logits(model)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    result = logits(load_model(tmp_path / "out"))
    assert (live - before).abs().max() > 1e-2
    assert (result - live).abs().max() < 3e-5 * live.abs().max()
