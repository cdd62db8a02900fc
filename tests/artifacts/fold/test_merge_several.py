"""Several adapters in one fold, and folds of some layers: forward hooks, PEFT and fp64 by hand as oracles."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import merge_lora
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError, run_command
from tests.helpers.artifacts import (
    FACTS,
    bytes_of,
    down_proj,
    edit_json,
    fold64,
    hooked,
    load_model,
    logits,
    make_base,
    random_tensors,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

# As in test_merge.py: logits of about 1 in fp32, and weights of about 1 changed by sums of some 50 products.
LOGIT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 5e-6
QUERIES = {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in range(3)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases on its MLP, which multiplicative adapters move and additive ones do not."""
    return make_base(tmp_path_factory.mktemp("models") / "base", mlp_bias=True)


def adapter(
    folder: Path, modules: dict[str, tuple[int, int]], kind: str, seed: int, rank: int = 4, **facts: Any
) -> tuple[dict[str, torch.Tensor], bool]:
    """Save an adapter of scaling 1.5; (its tensors, whether it is multiplicative)."""
    tensors = random_tensors(modules, rank, multiplicative=kind == "multiplicative_lora", seed=seed)
    save_adapter(folder, tensors, kind=kind, rank=rank, alpha=1.5 * rank, **{**FACTS, **facts})  # type: ignore[arg-type]
    return tensors, kind == "multiplicative_lora"


def by_hand(W: np.ndarray, module: str, made: list, scalings: list[float]) -> np.ndarray:
    """fp64, one adapter after the other; each as (s·B·A)·W, the other association than the fold's."""
    for (tensors, multiplicative), scaling in zip(made, scalings, strict=True):
        if f"{module}.A" in tensors:
            W = fold64(W, tensors[f"{module}.A"], tensors[f"{module}.B"], scaling, multiplicative=multiplicative)
    return W


KINDS = {
    "two multiplicative": ["multiplicative_lora", "multiplicative_lora"],
    "three multiplicative": ["multiplicative_lora"] * 3,
    "additive first": ["lora", "multiplicative_lora"],
    "additive last": ["multiplicative_lora", "lora"],
    "additive between": ["multiplicative_lora", "lora", "multiplicative_lora"],
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_in_order_against_hooks_and_fp64(llama: Path, tmp_path: Path, kinds: list[str]) -> None:
    """Hooks run in the order in which they are set: each sees the module's output as the ones before left it."""
    layers = [down_proj(), dict(list(down_proj().items())[1:]), down_proj()]  # the second leaves layer 0 alone
    made = [adapter(tmp_path / f"{n}", layers[n], kind, seed=n, rank=3 + n) for n, kind in enumerate(kinds)]
    scales = [1.0, 0.5, -0.7][: len(kinds)]
    merge(llama, [tmp_path / f"{n}" for n in range(len(kinds))], tmp_path / "out", scale=scales)
    model = load_model(llama)
    with ExitStack() as stack:
        for (tensors, multiplicative), scale in zip(made, scales, strict=True):
            stack.enter_context(hooked(model, tensors, 1.5 * scale, multiplicative=multiplicative))
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE
    before, after = tensors_of(llama), tensors_of(tmp_path / "out")
    for module in down_proj():
        wanted = by_hand(before[f"{module}.weight"].double().numpy(), module, made, [1.5 * s for s in scales])
        assert np.abs(after[f"{module}.weight"].double().numpy() - wanted).max() < WEIGHT_TOLERANCE
        other = by_hand(
            before[f"{module}.weight"].double().numpy(), module, made[::-1], [1.5 * s for s in scales[::-1]]
        )
        assert np.abs(wanted - other).max() > 1e-3 or module not in layers[1]  # the order is what is tested
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    moved = {
        module
        for (_, multiplicative), modules in zip(made, layers, strict=False)
        if multiplicative
        for module in modules
    }
    assert changed == {f"{module}.weight" for module in down_proj()} | {f"{module}.bias" for module in moved}


def test_two_of_pefts_adapters_against_its_own_merge(llama: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(llama), LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=3, target_modules=["down_proj", "v_proj"], use_rslora=True))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "saved"))
    merge(llama, [tmp_path / "saved" / "one", tmp_path / "saved" / "two"], tmp_path / "out")
    expected = model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - expected[name]).abs().max() < WEIGHT_TOLERANCE, name
        assert torch.equal(tensor, tensors_of(llama)[name]) != name.endswith(("down_proj.weight", "v_proj.weight"))


def test_several_are_rounded_once(tmp_path: Path) -> None:
    """A bf16 value may differ from round(W'₆₄) only where W'₆₄ is within fp32's error of a middle between two values.

    Three steps of sums of at most 40 products below 0.1: less than 3·40·0.1·2⁻²⁴ < 1e-6. One fold after the other
    rounds twice, and lands elsewhere for many.
    """
    base = make_base(tmp_path / "base", dtype="bfloat16")
    made = [adapter(tmp_path / f"{n}", down_proj(), "multiplicative_lora", seed=n) for n in range(2)]
    merge(base, [tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    merge(base, tmp_path / "0", tmp_path / "half")
    merge(tmp_path / "half", tmp_path / "1", tmp_path / "twice")
    before, after, twice = tensors_of(base), tensors_of(tmp_path / "out"), tensors_of(tmp_path / "twice")
    for module in down_proj():
        name = f"{module}.weight"
        exact = torch.from_numpy(by_hand(before[name].double().numpy(), module, made, [1.5, 1.5]))
        low, high = (exact - 1e-6).bfloat16(), (exact + 1e-6).bfloat16()
        assert ((after[name] >= low) & (after[name] <= high)).all()
        assert (low == high).float().mean() > 0.75
        assert ((twice[name] < low) | (twice[name] > high)).float().mean() > 0.1


def test_a_composition_in_the_wrong_order_is_found(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """The steps are exchanged before they are composed; the check, adapter after adapter in fp64, sees it."""
    for n in range(2):
        adapter(tmp_path / f"{n}", down_proj(), "multiplicative_lora", seed=n)
    real = fold_rows.compose
    monkeypatch.setattr(fold_rows, "compose", lambda steps, blocks, device: real(steps[::-1], blocks, device))
    with pytest.raises(UserError, match="deviates from the fold in fp64") as refused:
        merge(llama, [tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert refused.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_figures_and_report_of_each_adapter(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = [adapter(tmp_path / f"{n}", down_proj(), "multiplicative_lora", seed=n) for n in range(2)]
    merge(llama, [tmp_path / "0", tmp_path / "1"], tmp_path / "out", scale=[1.0, 0.5], layers="0:1")
    report = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert [(entry["adapter"], entry["scale"], entry["modules"]) for entry in report["adapters"]] == [
        ("0", 1.0, 2),
        ("1", 0.5, 2),
    ]
    assert [entry["left_out"] for entry in report["adapters"]] == [["model.layers.2.mlp.down_proj"]] * 2
    assert str(tmp_path) not in json.dumps(report)
    before = tensors_of(llama)
    for entry in report["tensors"]:
        if not entry["name"].endswith("weight"):
            continue
        module = entry["name"].removesuffix(".weight")
        W = first = before[entry["name"]].double().numpy()
        for step, made_by, scaling in zip(entry["steps"], made, (1.5, 0.75), strict=True):
            after = by_hand(W, module, [made_by], [scaling])
            assert step["scaling"] == scaling
            # The second adapter's own change is of the weight as the first left it.
            assert step["relative_change"] == pytest.approx(np.linalg.norm(after - W) / np.linalg.norm(first), rel=1e-5)
            W = after
    said = capsys.readouterr().out
    assert "W₁ = W + s₁·B₁·(A₁·W); W' = W₁ + s₂·B₂·(A₂·W₁) in fp32, rounded once at the end" in said
    assert "left out by --layers: 1 modules, model.layers.2.mlp.down_proj" in said
    assert "6 / 4 × 0.5 (--scale) = 0.75" in said
    assert "adapter 2 1: 4 tensors, alone" in said


def test_layers_restrict_every_adapter(llama: Path, tmp_path: Path) -> None:
    modules = {**down_proj(), **QUERIES}
    made = [adapter(tmp_path / f"{n}", modules, kind, seed=n) for n, kind in enumerate(["lora", "multiplicative_lora"])]
    merge(llama, [tmp_path / "0", tmp_path / "1"], tmp_path / "out", layers="0, 2")
    kept = [({n: t for n, t in tensors.items() if ".1." not in n}, multiplicative) for tensors, multiplicative in made]
    model = load_model(llama)
    with ExitStack() as stack:
        for tensors, multiplicative in kept:
            stack.enter_context(hooked(model, tensors, 1.5, multiplicative=multiplicative))
        expected = logits(model)
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < LOGIT_TOLERANCE
    before, after = bytes_of(llama), bytes_of(tmp_path / "out")
    assert all(before[name] == after[name] for name in before if ".layers.1." in name)
    assert len([name for name in before if before[name] != after[name]]) == 6  # 4 weights and 2 biases


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """Run merge_lora.py; (exit code, stdout, stderr)."""

    def run(base: Path, *flags: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["merge_lora.py", "--input", str(base), "--output", str(tmp_path / "out"), *flags]
        )
        with pytest.raises(SystemExit) as ended:
            run_command(merge_lora.main)
        text = capsys.readouterr()
        return ended.value.code, text.out, text.err

    return run


def test_the_command_takes_several_and_says_how_they_compose(llama: Path, tmp_path: Path, command) -> None:
    for n in range(2):
        adapter(tmp_path / f"{n}", down_proj(), "multiplicative_lora", seed=n)
    both = [str(tmp_path / "0"), str(tmp_path / "1")]
    code, said, _ = command(llama, "--lora", *both, "--scale", "0.5", "2", "--layers", "1:2")
    assert code == 0
    assert "× 0.5 (--scale)" in said
    assert "× 2 (--scale)" in said
    merge(llama, [tmp_path / "0", tmp_path / "1"], tmp_path / "same", scale=[0.5, 2.0], layers="1:2")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "same")
    assert "(I + s3·B3·A3)·(I + s2·B2·A2)·(I + s1·B1·A1)·W" in " ".join(
        merge_lora.parser().format_help().split()
    ).replace("· ", "·")


REFUSALS = [
    (["--scale", "1", "2", "3"], "--scale has 3 values for 2 adapters"),
    (["--scale", "1", "0"], "--scale 0: give a finite factor"),
    (["--layers", "0:3"], "--layers '0:3': .* has the layers 0 to 2"),
    (["--layers", "2:1"], "--layers '2:1': '2:1' runs backwards"),
    (["--layers", "first"], "--layers 'first': write layers as"),
    (["--layers", "0"], "--layers '0' leaves nothing of .*1: its layers are 1 to 2"),
    (["--unmerge", "--base-quant", "nf4"], "rounding to 4 bits has no inverse"),
]


@pytest.mark.parametrize("flags, words", REFUSALS, ids=[" ".join(flags) for flags, _ in REFUSALS])
def test_requests_that_cannot_be_carried_out(llama: Path, tmp_path: Path, command, flags, words) -> None:
    adapter(tmp_path / "0", down_proj(), "multiplicative_lora", seed=0)
    adapter(tmp_path / "1", dict(list(down_proj().items())[1:]), "multiplicative_lora", seed=1)
    code, _, error = command(llama, "--lora", str(tmp_path / "0"), str(tmp_path / "1"), *flags)
    assert code == 2
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in error
    assert re.search(words, error), error


def test_one_adapter_that_does_not_fit_stops_them_all(llama: Path, tmp_path: Path, command) -> None:
    """Also where what does not fit is in a layer that --layers leaves out: it tells of another model."""
    adapter(tmp_path / "0", down_proj(), "multiplicative_lora", seed=0)
    adapter(tmp_path / "1", {**down_proj(1), "model.layers.7.mlp.down_proj": (32, 48)}, "lora", seed=1)
    for flags in ([], ["--layers", "0"]):
        code, _, error = command(llama, "--lora", str(tmp_path / "0"), str(tmp_path / "1"), *flags)
        assert code == 2
        assert "model.layers.7.mlp.down_proj" in error
        assert not (tmp_path / "out").exists()


def test_kind_decides_for_the_adapter_that_leaves_it_open(llama: Path, tmp_path: Path, command) -> None:
    adapter(tmp_path / "ours", down_proj(), "multiplicative_lora", seed=0)
    tensors, _ = adapter(tmp_path / "square", QUERIES, "lora", seed=1)
    from safetensors.torch import save_file  # without our metadata, as PEFT would write it

    named = {f"base_model.model.{n[:-2]}.lora_{n[-1]}.weight": tensor for n, tensor in tensors.items()}
    save_file(named, tmp_path / "square" / "adapter_model.safetensors")
    both = ["--lora", str(tmp_path / "ours"), str(tmp_path / "square")]
    code, _, error = command(llama, *both)
    assert code == 2
    assert "--kind lora or --kind multiplicative_lora" in error
    code, said, _ = command(llama, *both, "--kind", "lora")
    assert code == 0
    assert "ours: multiplicative_lora" in said
    assert "square: lora" in said


@pytest.mark.parametrize(
    "trained_on, warned", [("base", False), ("Owner/Base", False), ("/elsewhere/base", False), ("Owner/Other", True)]
)
def test_an_adapter_that_names_another_base_is_pointed_out(
    llama: Path, tmp_path: Path, command, trained_on, warned
) -> None:
    adapter(tmp_path / "0", down_proj(), "multiplicative_lora", seed=0, base_model=trained_on)
    code, _, error = command(llama, "--lora", str(tmp_path / "0"))
    assert code == 0  # a warning, no refusal
    assert ("was trained on Owner/Other" in error and "goes by base" in error) == warned == ("warning" in error)


def test_other_names_a_base_goes_by(tmp_path: Path, command) -> None:
    """The config's _name_or_path, the folder in a Hub cache, and the base of the fold that made it."""
    adapter(tmp_path / "0", down_proj(), "multiplicative_lora", seed=0, base_model="Owner/Name-1")
    cached = make_base(tmp_path / "models--Owner--name-1" / "snapshots" / "abc")
    assert "warning" not in command(cached, "--lora", str(tmp_path / "0"), "--dry-run")[2]
    named = make_base(tmp_path / "copy")
    assert "goes by copy" in command(named, "--lora", str(tmp_path / "0"), "--dry-run")[2]
    edit_json(named / "config.json", _name_or_path="Owner/Name-1")
    assert "warning" not in command(named, "--lora", str(tmp_path / "0"), "--dry-run")[2]
    edit_json(named / "config.json", _name_or_path="")
    (named / "fold_report.json").write_text(json.dumps({"base": "Owner/Name-1"}))
    assert "warning" not in command(named, "--lora", str(tmp_path / "0"), "--dry-run")[2]


def test_logit_scales_of_several_multiply(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "cohere")
    for n, scale in enumerate((1.25, 0.5)):
        adapter(tmp_path / f"{n}", down_proj(), "multiplicative_lora", seed=n, train_logit_scale=scale)
    merge(base, [tmp_path / "0", tmp_path / "1"], tmp_path / "out", keep_logit_scale=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["logit_scale"] == 0.0625 * 1.25 * 0.5
    merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"], tmp_path / "back", keep_logit_scale=True, unmerge=True)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["logit_scale"] == pytest.approx(0.0625)
