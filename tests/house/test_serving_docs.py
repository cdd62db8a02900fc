"""docs/serving.md: its Python blocks run as they stand, and compute what the folded model computes; its commands exist."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from tests.helpers.artifacts import down_proj, hooked, load_model, logits, make_base, multiplicative, tensors_of
from tests.helpers.builders import ROOT
from tests.helpers.families import by_peft

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
FOLDED, LOADED, PEFT, HALF, FOUR_BITS = BLOCKS
# fp32, three layers of width 32 to 48: a few hundred roundings of 6e-8. A wrong adapter is at 1e-2.
RELATIVE = 1e-5
OUTPUTS = {**down_proj(), **{f"model.layers.{i}.self_attn.o_proj": (32, 32) for i in range(3)}}
FAMILIES = ["lora", "dora", "ia3", "oft", "boft", "hra"]


def run(block: str, logits: Any = None, **places: Path) -> dict[str, Any]:
    """The block's names after it ran, with paths for the words in capitals; `logits` is one it may call."""
    for word, place in places.items():
        assert f'"{word}"' in block, word
        block = block.replace(f'"{word}"', repr(str(place)))
    names: dict[str, Any] = {"logits": logits}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(block, names)
    return names


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def same(block: str, folded: Path, **places: Path) -> bool:
    """Whether the block's `model` has the logits of the folded model."""
    return distance(logits(run(block, **places)["model"].eval()), logits(load_model(folded))) < RELATIVE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Cohere base, a multiplicative adapter with s = 1.5 of it, and what the page's commands make of the two."""
    root = tmp_path_factory.mktemp("served")
    base, adapter = make_base(root / "BASE", "cohere"), root / "ADAPTER"
    multiplicative(adapter, OUTPUTS)
    merge(base, [adapter], root / "MERGED")
    merge(base, [adapter], root / "HALF", scale=0.5)
    export(base, adapter, root / "EXPORTED", format="peft")
    assert distance(logits(load_model(base)), logits(load_model(root / "HALF"))) > 1e-2
    return {name: root / name for name in ("BASE", "ADAPTER", "MERGED", "HALF", "EXPORTED")}


def test_a_folded_model_is_loaded_by_transformers(folders: dict[str, Path]) -> None:
    assert same(FOLDED, folders["MERGED"], MERGED=folders["MERGED"])


@pytest.mark.parametrize("block", [LOADED, PEFT], ids=["transformers", "PEFT"])
@pytest.mark.parametrize("what", ["ADAPTER", "EXPORTED"])
def test_an_adapter_and_its_export_compute_the_fold(folders: dict[str, Path], block: str, what: str) -> None:
    assert same(block, folders["MERGED"], BASE=folders["BASE"], ADAPTER=folders[what])


def test_peft_merges_what_it_loaded(folders: dict[str, Path]) -> None:
    model = run(PEFT, BASE=folders["BASE"], ADAPTER=folders["ADAPTER"])["model"].merge_and_unload()
    assert distance(logits(model.eval()), logits(load_model(folders["MERGED"]))) < RELATIVE


def test_half_strength_is_half_the_scale_of_an_export_and_refused_of_a_peanut(folders: dict[str, Path]) -> None:
    block, dots, _ = f"{PEFT}\n{HALF}".partition("    ...")
    assert dots
    block += "    half = logits(model)\n"
    found = run(block, logits=logits, BASE=folders["BASE"], ADAPTER=folders["EXPORTED"])["half"]
    assert distance(found, logits(load_model(folders["HALF"]))) < RELATIVE
    with pytest.raises(ValueError, match="LoraLayer"):
        run(block, BASE=folders["BASE"], ADAPTER=folders["ADAPTER"])


def test_over_four_bits_an_export_is_the_lora_it_says_and_a_peanut_fails(tmp_path: Path) -> None:
    """Against hooks on the modules of the same quantised base: what the base computes is the same in both."""
    base = make_base(
        tmp_path / "base", hidden_size=64, intermediate_size=128
    )  # bitsandbytes wants rows of whole blocks
    multiplicative(tmp_path / "adapter", down_proj(hidden=64, feed_forward=128))
    export(base, tmp_path / "adapter", tmp_path / "export", format="peft")
    model = run(FOUR_BITS, BASE=base, EXPORTED=tmp_path / "export")["model"].eval()
    found = logits(model)
    with model.disable_adapter():
        before = logits(model)
        with hooked(model.get_base_model(), _pairs(tensors_of(tmp_path / "export")), 1.5, multiplicative=False):
            expected = logits(model)
    assert (
        type(model.get_submodule("base_model.model.model.layers.0.mlp.down_proj.base_layer")).__name__ == "Linear4bit"
    )
    # A step of bf16 is 2⁻⁷: PEFT's sum may be rounded once more than the hooks', in each module.
    assert (found - expected).norm() < 2**-7 * (expected - before).norm()
    with pytest.raises(RuntimeError, match="shapes"):
        logits(run(FOUR_BITS, BASE=base, EXPORTED=tmp_path / "adapter")["model"].eval())


def test_over_eight_bits_a_peanut_is_wrong_without_a_word(folders: dict[str, Path]) -> None:
    """What the page warns of: farther from the folded model than the base without an adapter, where an export is near."""
    block = FOUR_BITS.replace(
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16', "load_in_8bit=True"
    )
    assert "load_in_8bit" in block
    expected, base = (logits(load_model(folders[name])) for name in ("MERGED", "BASE"))
    found = {
        what: distance(logits(run(block, BASE=folders["BASE"], EXPORTED=folders[what])["model"].eval()), expected)
        for what in ("ADAPTER", "EXPORTED")
    }
    assert found["EXPORTED"] < 0.25 * distance(base, expected) < distance(base, expected) < found["ADAPTER"]


def _pairs(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An additive export's tensors under the names of their modules."""
    short = {name.removeprefix("base_model.model.").removesuffix(".weight"): t for name, t in stored.items()}
    return {name.replace(".lora_", "."): tensor for name, tensor in short.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table(llama: Path, tmp_path: Path, family: str) -> None:
    """PEFT computes the fold; transformers' load_adapter too, and of DoRA what the page warns of."""
    by_peft(llama, tmp_path / "adapter", family)
    merge(llama, [tmp_path / "adapter"], tmp_path / "folded", kind="lora" if family == "lora" else None)
    assert same(PEFT, tmp_path / "folded", BASE=llama, ADAPTER=tmp_path / "adapter")
    assert same(LOADED, tmp_path / "folded", BASE=llama, ADAPTER=tmp_path / "adapter") == (family != "dora")


@pytest.mark.parametrize("what", ["adapter", "export"])
@pytest.mark.parametrize("block", [LOADED, PEFT], ids=["transformers", "PEFT"])
def test_modules_trained_in_full_come_along(folders: dict[str, Path], tmp_path: Path, block: str, what: str) -> None:
    base = folders["BASE"]
    full = {"model.norm.weight": 1.25 * tensors_of(base)["model.norm.weight"]}
    multiplicative(tmp_path / "adapter", OUTPUTS, full=full)
    export(base, tmp_path / "adapter", tmp_path / "export", format="peft")
    merge(base, [tmp_path / "adapter"], tmp_path / "folded")
    assert distance(logits(load_model(folders["MERGED"])), logits(load_model(tmp_path / "folded"))) > 1e-2
    assert same(block, tmp_path / "folded", BASE=base, ADAPTER=tmp_path / what)


def test_a_multiplicative_adapter_that_moves_biases_is_refused_by_both(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", mlp_bias=True)
    multiplicative(tmp_path / "adapter", biased_targets=True)
    for block in (LOADED, PEFT):
        with pytest.raises((KeyError, ValueError)):
            run(block, BASE=base, ADAPTER=tmp_path / "adapter")


def test_the_page_s_commands_and_tests_exist() -> None:
    import export_lora
    import merge_lora

    for script, words in re.findall(r"(?m)^    python (merge_lora|export_lora)\.py +(.*)$", PAGE):
        parser = {"merge_lora": merge_lora, "export_lora": export_lora}[script].parser()
        parser.parse_args(words.split())
    for name in re.findall(r"`(tests/[a-z_]+\.py)`", PAGE):
        assert (ROOT / name).exists(), name
