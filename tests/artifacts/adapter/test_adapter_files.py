"""Adapter files: stock PEFT as the reader of what we write, and as the writer of what we read; fp64 for the norms."""

import json
import math
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import version
from pipeline.artifacts.adapter.adapter import adapter_norms
from pipeline.artifacts.adapter.read import _matching, load_adapter
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.console import UserError
from pipeline.families import Kind
from pipeline.names import natural_order, public_name
from tests.helpers.artifacts import FACTS, down_proj, edit_json, hooked, load_model, logits, make_base, random_tensors

# Logits of about 1 after three layers in fp32: rounding is below 1e-6, a wrong adapter is above 1e-2.
LOGIT_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base")


def write(folder: Path, *, kind: Kind = "multiplicative_lora", rank: int = 4, alpha: float = 6.0, **changes) -> dict:
    tensors = changes.pop("tensors", None) or random_tensors(
        down_proj(), rank, multiplicative=kind == "multiplicative_lora"
    )
    save_adapter(folder, tensors, kind=kind, rank=rank, alpha=alpha, **{**FACTS, **changes})
    return tensors


@pytest.mark.parametrize("kind", ["multiplicative_lora", "lora"])
def test_stock_peft_loads_runs_and_merges_what_we_write(base: Path, tmp_path: Path, kind: Kind) -> None:
    tensors = write(tmp_path / "adapter", kind=kind)
    with hooked(model := load_model(base), tensors, 6 / 4, multiplicative=kind != "lora"):
        expected = logits(model)
    assert (expected - logits(model)).abs().max() > 1e-2  # the adapter does something
    adapted = PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter")).eval()
    assert (logits(adapted) - expected).abs().max() < LOGIT_TOLERANCE
    assert (logits(adapted.merge_and_unload()) - expected).abs().max() < LOGIT_TOLERANCE


def test_stock_peft_targets_exactly_the_layers_written_also_with_more_than_twenty(tmp_path: Path) -> None:
    """From 20 names on PEFT shortens target_modules by itself; layer 0 is left out, as '1:23' would."""
    base = make_base(tmp_path / "base", num_hidden_layers=24, hidden_size=16, intermediate_size=16)
    modules = {name: shape for name, shape in down_proj(24, 16, 16).items() if ".0." not in name}
    tensors = write(tmp_path / "adapter", tensors=random_tensors(modules, 4, multiplicative=True))
    with hooked(model := load_model(base), tensors, 1.5, multiplicative=True):
        expected = logits(model)
    adapted = PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter")).eval()
    assert (logits(adapted) - expected).abs().max() < LOGIT_TOLERANCE
    assert sum("peanut_A" in name for name, _ in adapted.named_parameters()) == 23


def test_stock_peft_refuses_an_adapter_of_modules_with_a_bias(tmp_path: Path) -> None:
    """PEANUT would leave the bias as it is, which is another function: such an adapter must not load as one."""
    base = make_base(tmp_path / "base", mlp_bias=True)
    write(tmp_path / "adapter", biased_targets=True)
    with pytest.raises(KeyError, match="MULTIPLICATIVE_LORA"):
        PeftModel.from_pretrained(load_model(base), str(tmp_path / "adapter"))
    assert load_adapter(tmp_path / "adapter").moves_bias


@pytest.mark.parametrize("kind", ["multiplicative_lora", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_back_what_was_written(tmp_path: Path, kind: Kind, dtype: torch.dtype) -> None:
    tensors = random_tensors(down_proj(12), 4, multiplicative=kind != "lora", dtype=dtype)
    write(tmp_path / "a", kind=kind, tensors=tensors, train_logit_scale=1.1, base_model="/secret/place/command-r")
    adapter = load_adapter(tmp_path / "a")
    assert (adapter.kind, adapter.train_logit_scale, adapter.base_model) == (kind, 1.1, "command-r")
    assert list(adapter.pairs) == [f"model.layers.{i}.mlp.down_proj" for i in range(12)]
    for module, pair in adapter.pairs.items():
        assert pair.scaling == 1.5
        assert pair.A.dtype == dtype
        assert torch.equal(pair.A, tensors[f"{module}.A"])
        assert torch.equal(pair.B, tensors[f"{module}.B"])
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())


def test_the_files_are_what_the_design_says(tmp_path: Path) -> None:
    write(tmp_path / "a", facts={"step": 100})
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]  # no lock, no temporary folder
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["depth"], config["act_fn"], config["scaling"]) == ("PEANUT", 0, "linear", 1.5)
    assert "lora_alpha" not in config
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as stored:
        own = json.loads(stored.metadata()["mulora_pipe"])
        names = set(stored.offset_keys())
    assert names == {f"base_model.model.{m}.peanut_{x}.weight" for m in down_proj() for x in "AB"}
    assert own["step"] == 100
    assert own["layers"] == [0, 1, 2]
    assert own["kind"] == "multiplicative_lora"
    assert (own["rank"], own["alpha"], own["scaling"], own["train_logit_scale"]) == (4, 6.0, 1.5, 1.0)
    assert own["version"] == version.full()
    mode = (tmp_path / "a" / "adapter_model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) & stat.S_IRUSR
    assert not stat.S_IMODE(mode) & stat.S_IWOTH


def test_a_folder_with_something_in_it_is_kept_unless_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(UserError, match="not empty"):
        write(tmp_path / "a", alpha=8.0)
    assert load_adapter(tmp_path / "a").pairs["model.layers.0.mlp.down_proj"].scaling == 1.5
    write(tmp_path / "a", alpha=8.0, replace=True)
    assert load_adapter(tmp_path / "a").pairs["model.layers.0.mlp.down_proj"].scaling == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_tensors_that_are_no_adapter_are_a_programming_error_and_leave_nothing(tmp_path: Path) -> None:
    good = random_tensors(down_proj(1), 4, multiplicative=True)
    a, b = good
    for bad in (
        {a: good[a]},
        {**good, "extra": good[a]},
        {a: good[a].T, b: good[b]},
        {a: good[a].int(), b: good[b]},
        {a: good[a] * math.nan, b: good[b]},
        {},
    ):
        with pytest.raises(ValueError):
            save_adapter(tmp_path / "x", bad, kind="multiplicative_lora", rank=4, alpha=4, **FACTS)
    assert not list(tmp_path.iterdir())


def test_norms_against_the_explicit_product_in_fp64() -> None:
    modules = {**down_proj(2, 40, 24), "model.layers.0.self_attn.q_proj": (16, 64)}
    tensors = random_tensors(modules, 8, multiplicative=False)
    tensors["model.layers.1.mlp.down_proj.B"].zero_()
    norms = adapter_norms(tensors, -0.75)
    assert set(norms) == set(modules)
    for module in modules:
        product = tensors[f"{module}.B"].double().numpy() @ tensors[f"{module}.A"].double().numpy()
        # fp32 Gram matrices of 64 terms: below 64·2⁻²⁴ ≈ 4e-6 of the norm
        assert norms[module] == pytest.approx(0.75 * np.linalg.norm(product), rel=4e-6, abs=0)
    assert adapter_norms({}, 1.0) == {}


@pytest.mark.parametrize(
    "given_name, written",
    [
        ("CohereForAI/c4ai-command-r-v01", "CohereForAI/c4ai-command-r-v01"),
        ("/mnt/data/c4ai/", "c4ai"),
        ("../models/base", "base"),
        ("~/models/base", "base"),
        ("./base", "base"),
        ("base", "base"),
    ],
)
def test_only_public_names_are_written(given_name: str, written: str) -> None:
    assert public_name(given_name) == written


@given(st.lists(st.integers(0, 200), unique=True, max_size=20))
def test_natural_order_is_the_order_of_the_numbers(layers: list[int]) -> None:
    names = [f"model.layers.{i}.mlp.down_proj" for i in layers]
    assert sorted(names, key=natural_order) == [f"model.layers.{i}.mlp.down_proj" for i in sorted(layers)]


PATTERNS = st.sampled_from(
    ["down_proj", "mlp.down_proj", r"layers\.1\.mlp.down_proj", r".*\.0\..*", "proj", "o_proj", "model"]
)


@settings(deadline=None)
@given(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), st.sampled_from(list(down_proj())))
def test_patterns_choose_as_peft_does(patterns: dict[str, int], module: str) -> None:
    found = _matching(Path("x"), {"rank_pattern": patterns}, "rank_pattern", module)
    assert (found or [7])[0] == patterns.get(get_pattern_key(patterns.keys(), module), 7)


def peft_adapter(base: Path, folder: Path, **config) -> Path:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["down_proj"], "init_lora_weights": False, **config}
    get_peft_model(load_model(base), LoraConfig(**settings)).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "config, words",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*changed"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'.*changed"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_what_a_fold_would_leave_out_is_refused_by_name(base: Path, tmp_path: Path, config: dict, words: str) -> None:
    folder = peft_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(UserError, match=words) as refused:
        load_adapter(folder)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "XLORA"}, "type 'XLORA'"),
        ({"r": 8}, "rank 4 .*says 8"),
        ({"brand_new_trick": 3}, "brand_new_trick = 3 is not known"),
        ({"lora_alpha": None}, "lora_alpha = None: input should be a valid number"),
        ({"lora_alpha": math.inf}, "lora_alpha = inf: input should be a finite number"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is not a valid regular expression"),
        ({"lora_bias": True}, "lora_A, lora_B only"),
        ({"layer_replication": [[0, 2]]}, "layers were repeated"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(base: Path, tmp_path: Path, change: dict, words: str) -> None:
    folder = peft_adapter(base, tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", **change)
    with pytest.raises(UserError, match=words):
        load_adapter(folder)


def test_alpha_patterns_whose_order_peft_has_lost_are_refused(base: Path, tmp_path: Path) -> None:
    """PEFT takes the first match of the order given, and saves sorted: after a reload it computes something else."""
    folder = peft_adapter(base, tmp_path / "adapter", alpha_pattern={r"layers\.2\..*": 3, "down_proj": 11})
    stored = json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"]
    assert list(stored) == ["down_proj", r"layers\.2\..*"]  # fails when PEFT keeps the order: then allow it
    with pytest.raises(UserError, match=r"alpha_pattern match model.layers.2.mlp.down_proj, with \[11, 3\]"):
        load_adapter(folder)
    edit_json(folder / "adapter_config.json", alpha_pattern={"down_proj": 11})
    assert {pair.scaling for pair in load_adapter(folder).pairs.values()} == {11 / 4}


def test_damaged_or_foreign_tensors_are_refused(base: Path, tmp_path: Path) -> None:
    folder = peft_adapter(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    good, whole = load_file(file), file.read_bytes()
    first = next(iter(good))
    for tensors, words in (
        ({**good, "base_model.model.model.norm.weight": torch.ones(2)}, "1 tensors are no lora_A or lora_B"),
        ({name: tensor for name, tensor in good.items() if name != first}, "only. The adapter is incomplete"),
        ({**good, first: good[first][0]}, "are not R × D and D × R"),
        ({**good, first: good[first] * math.inf}, "NaN or infinite"),
        ({**good, first: good[first].int()}, "not floating point"),
        ({}, "nothing to fold"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=words):
            load_adapter(folder)
    for damaged in (whole[:-1], whole + b"x", b"", whole[:100], b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"whole|bytes|header"):
            load_adapter(folder)
    file.unlink()
    with pytest.raises(UserError, match="neither"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="does not read as JSON"):
        load_adapter(folder)
    with pytest.raises(UserError, match="no folder"):
        load_adapter(tmp_path / "nowhere")


def test_our_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", scaling=0.7)
    with pytest.raises(UserError, match=r"0.7 by adapter_config.json and 1.5 .*--scale"):
        load_adapter(tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", scaling=1.5, act_fn="relu")
    with pytest.raises(UserError, match="act_fn 'relu' is not linear"):
        load_adapter(tmp_path / "a")


class Bomb:
    """A pickle that writes a file when it is loaded by an unsafe reader."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.target, "executed")


def test_a_pickled_adapter_is_read_without_running_code(base: Path, tmp_path: Path) -> None:
    """qlora-pipe saved the founding method's adapters as adapter_model.bin."""
    folder = peft_adapter(base, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    pair = load_adapter(folder).pairs["model.layers.0.mlp.down_proj"]
    assert torch.equal(pair.A, tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"])
    trap = tmp_path / "trap"
    torch.save({"a": Bomb(trap)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        load_adapter(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(UserError, match="more than tensors"):
        load_adapter(folder)
    assert not trap.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert trap.exists()  # the trap works on a reader that is not careful
