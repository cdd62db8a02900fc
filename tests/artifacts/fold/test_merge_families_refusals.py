"""Adapters of DoRA, IA³, OFT, BOFT and HRA that cannot be folded, and folds of them that went wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter import maps
from pipeline.artifacts.adapter.read import load_pairs
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from tests.helpers.artifacts import edit_json
from tests.helpers.families import by_peft, loud_base

PLAIN = ["dora", "ia3", "oft", "boft", "hra"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_base(tmp_path_factory.mktemp("models") / "base", mlp_bias=True, attention_bias=True)


def refused(words: str, base: Path, adapters: Path | list[Path], out: Path, **asked: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        merge(base, adapters, out, **asked)
    assert caught.value.exit_code == 2
    assert not out.exists()


@pytest.mark.parametrize(
    "case, change, words",
    [
        ("oft", {"coft": True}, "coft = True: the rotations are held near"),
        ("oft", {"peft_version": "0.17.1"}, "an OFT adapter of PEFT 0.17.1: its series"),
        ("oft", {"peft_version": None}, "an OFT adapter of PEFT before 0.18"),
        ("oft", {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms = 2 is no rotation"),
        ("oft", {"block_share": True}, "oft_R is 6 × 28"),
        ("hra", {"brand_new_trick": 3}, "brand_new_trick = 3 is not known"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "lm_head was trained in full by its .* not in the file"),
        ("dora", {"lora_bias": True}, "use_dora with lora_bias"),
        (
            "dora",
            {"peft_type": "LILY"},
            "type 'LILY': .*LORA, PEANUT, IA3, OFT, BOFT, HRA, .* are what can be folded",
        ),
    ],
)
def test_configurations_that_change_the_function_are_refused(llama, tmp_path: Path, case, change, words) -> None:
    by_peft(llama, tmp_path / "adapter", case)
    edit_json(tmp_path / "adapter" / "adapter_config.json", **change)
    refused(words, llama, tmp_path / "adapter", tmp_path / "out")


DAMAGE = [
    ("ia3", "ia3_l", lambda t: t[0], "ia3_l is .*, neither D_out × 1 nor 1 × D_in"),
    ("oft", "oft_R.weight", lambda t: t[:, :-1], "oft_R is 6 × 27, and not blocks"),
    ("oft", "oft_R.weight", lambda t: t[:-1], "5 blocks of 8 inputs on .*whose weight is 32 × 48"),
    ("boft", "boft_R", lambda t: torch.cat([t, t]), "it has 2 butterfly factors"),
    ("boft", "boft_s", lambda t: t[:-1], "factors 31 on"),
    ("hra", "hra_u", lambda t: t * 0, "one of its vectors is zero"),
    ("hra", "hra_u", lambda t: t[1:], "vectors 47 × 6 on"),
    ("dora", "lora_magnitude_vector", lambda t: t[1:], "not as long as B"),
    ("dora", "lora_magnitude_vector", lambda t: t * float("nan"), "NaN or infinite"),
    ("dora", "lora_magnitude_vector", None, "has lora_., lora_. only. The adapter is incomplete"),
]


@pytest.mark.parametrize("case, name, change, words", DAMAGE, ids=[f"{c} {w[:20]}" for c, _, _, w in DAMAGE])
def test_tensors_that_do_not_fit_are_refused(llama: Path, tmp_path: Path, case, name, change, words) -> None:
    by_peft(llama, tmp_path / "adapter", case)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, full = load_file(file), f"base_model.model.model.layers.0.mlp.down_proj.{name}"
    one = tensors.pop(full)
    save_file({**tensors, **({full: change(one).contiguous()} if change else {})}, file)
    refused(words, llama, tmp_path / "adapter", tmp_path / "out")


FAULTS = {
    "oft": (maps.Turned, lambda W, _: W.roll(1, 1)),
    "boft": (maps.Turned, lambda W, _: W),
    "hra": (maps.Reflected, lambda W, _: W * 1.001),
    "ia3": (maps.ColumnFactors, lambda W, _: W),
    "dora": (maps.RowNorms, lambda W, first: W + first * 1e-3),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fold_that_computes_something_else_is_found(llama: Path, tmp_path: Path, case: str, monkeypatch) -> None:
    by_peft(llama, tmp_path / "adapter", case)
    of, fault = FAULTS[case]
    monkeypatch.setattr(of, "on", lambda *_: fault)
    with pytest.raises(UserError, match="deviates from the fold in fp64 by") as caught:
        merge(llama, tmp_path / "adapter", tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_programs_for_pairs_refuse_the_others_in_one_sentence(llama: Path, tmp_path: Path) -> None:
    for case in PLAIN:
        by_peft(llama, tmp_path / case, case)
        with pytest.raises(UserError, match=f"is an adapter of the family {case}, which is not a pair"):
            load_pairs(tmp_path / case)
