"""Adapters of the head and the embedding: tied or not, stored once or twice. Oracle: the live model of stock PEFT.

(PEFT's merge_and_unload adds a head's change to the tensor that both share, which is not what its forward pass computes.)
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.console import UserError
from tests.helpers.artifacts import bytes_of, edit_json, load_model, logits, make_base, tensors_of
from tests.helpers.families import by_peft

pytestmark = pytest.mark.usefixtures("small_blocks")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BASES = ("untied", "tied", "tied, stored twice")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of weights of about 1, so that what is done to the embedding shows; in two files with an index, but for one."""
    made = {}
    for case in BASES:
        folder = tmp_path_factory.mktemp("models") / "base"
        shard = "20KB" if case == "tied" else "50GB"
        model = load_model(make_base(folder, tie_word_embeddings=case != "untied"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter *= 8
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=shard)
        if case == "tied, stored twice":
            tensors = load_file(folder / "model.safetensors")
            save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
        made[case] = folder
    return made


def adapter(base: Path, folder: Path, **config: Any) -> torch.Tensor:
    """An adapter with large random values by PEFT, saved to `folder`; the logits of the live model."""
    model = get_peft_model(load_model(base), LoraConfig(r=4, lora_alpha=6, **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return logits(model.eval())


def close(found: torch.Tensor, live: torch.Tensor) -> bool:
    """To fp32's rounding: of weights of about 8, which an fp64 forward carries to 5e-6, and of the two forwards."""
    return bool((found - live).abs().max() < 2e-6 * max(10.0, float(live.abs().max())))


TARGETS = {
    "head": ["lm_head", "down_proj"],
    "embedding": ["embed_tokens", "down_proj"],
    "both": ["lm_head", "embed_tokens", "down_proj"],
    "embedding alone": ["embed_tokens"],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("case", BASES)
def test_lora_on_head_and_embedding_is_pefts_live_model(bases, tmp_path: Path, case: str, targets: str, capsys) -> None:
    base = bases[case]
    live = adapter(base, tmp_path / "adapter", target_modules=TARGETS[targets])
    assert any("base_layer" in name or "lora_embedding" in name for name in tensors_of(tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
    assert (logits(load_model(base)) - live).abs().max() > 0.1
    untied = case != "untied"
    assert ("head and embedding were one tensor" in capsys.readouterr().out) == untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    found, before = bytes_of(tmp_path / "out"), bytes_of(base)
    assert found.keys() == {*before, HEAD}
    changed = {"head": {HEAD}, "both": {HEAD, EMBEDDING}}.get(targets, {EMBEDDING})
    for name in (HEAD, EMBEDDING):
        assert (found[name] != before.get(name, before[EMBEDDING])) == (name in changed)


@pytest.mark.parametrize("case", BASES[1:])
def test_adapters_that_peft_ties_leave_the_base_tied(bases, tmp_path: Path, case: str) -> None:
    asked = {"target_modules": ["embed_tokens", "down_proj"], "ensure_weight_tying": True}
    live = adapter(bases[case], tmp_path / "adapter", **asked)
    merge(bases[case], tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(bases[case]).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("case", BASES)
def test_pairs_of_the_head_without_a_copy_of_it(bases, tmp_path: Path, case: str) -> None:
    """As tools other than PEFT save them."""
    live = adapter(bases[case], tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora_" in name}, file)
    merge(bases[case], tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)


def test_layers_leave_head_and_embedding_out(bases, tmp_path: Path) -> None:
    adapter(bases["tied"], tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    merge(bases["tied"], tmp_path / "adapter", tmp_path / "out", layers="0:2")
    assert bytes_of(tmp_path / "out").keys() == bytes_of(bases["tied"]).keys()
    assert bytes_of(tmp_path / "out")[EMBEDDING] == bytes_of(bases["tied"])[EMBEDDING]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    report = json.loads((tmp_path / "out" / "fold_report.json").read_text())
    assert report["adapters"][0]["left_out"] == ["lm_head"]


@pytest.mark.parametrize("case", BASES)
@pytest.mark.parametrize("which", ["embedding", "head and embedding"])
def test_a_changed_embedding_beside_an_adapter_is_loaded_as_peft_loads_it(
    bases, tmp_path: Path, case: str, which
) -> None:
    """save_embedding_layers writes them and announces nothing; on a tied base PEFT loads both into the one tensor."""
    adapter(bases[case], tmp_path / "adapter", target_modules=["down_proj"])
    file, other = tmp_path / "adapter" / "adapter_model.safetensors", torch.randn(96, 32)
    own = {f"base_model.model.{EMBEDDING}": other}
    if which == "head and embedding":
        own[f"base_model.model.{HEAD}"] = other.clone() if case != "untied" else torch.randn(96, 32)
    save_file({**load_file(file), **own}, file)
    with torch.no_grad():
        live = logits(PeftModel.from_pretrained(load_model(bases[case]), tmp_path / "adapter").eval())
    merge(bases[case], tmp_path / "adapter", tmp_path / "out")
    assert close(logits(load_model(tmp_path / "out")), live)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(bases[case]).keys()


def test_a_copy_in_a_narrower_dtype_is_the_bases_own(bases, tmp_path: Path, capsys) -> None:
    """PEFT saves the head as it was loaded, in bf16: nothing was trained, so the base's stays as it is."""
    adapter(bases["untied"], tmp_path / "adapter", target_modules=["down_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    copies = {f"base_model.model.{name}": tensors_of(bases["untied"])[name].bfloat16() for name in (HEAD, EMBEDDING)}
    save_file({**load_file(file), **copies}, file)
    merge(bases["untied"], tmp_path / "adapter", tmp_path / "out")
    assert "in full" not in capsys.readouterr().out
    for name in (HEAD, EMBEDDING):
        assert bytes_of(tmp_path / "out")[name] == bytes_of(bases["untied"])[name]


def test_the_way_back_from_an_untied_head(bases, tmp_path: Path) -> None:
    adapter(bases["tied"], tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    merge(bases["tied"], tmp_path / "adapter", tmp_path / "out")
    merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", unmerge=True)
    before = tensors_of(bases["tied"])
    for name, tensor in tensors_of(tmp_path / "back").items():
        assert (tensor - before.get(name, before[EMBEDDING])).abs().max() < 1e-5


def test_what_has_no_fold_or_no_export_is_refused_by_name(bases, tmp_path: Path) -> None:
    base = bases["untied"]
    adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "down_proj"])
    with pytest.raises(UserError, match=r"model.embed_tokens is an embedding, adapted by PEFT's lora_embedding_A"):
        export(base, tmp_path / "adapter", tmp_path / "out", format="peft")
    edit_json(tmp_path / "adapter" / "adapter_config.json", use_dora=True)
    with pytest.raises(UserError, match=r"use_dora on an embedding \(.*lora_embedding"):
        merge(base, tmp_path / "adapter", tmp_path / "out")
    by_peft(base, tmp_path / "tokens", "lora", trainable_token_indices=[5, 7])
    with pytest.raises(UserError, match=r"trainable_token_indices = \[5, 7\]: single token embeddings"):
        merge(base, tmp_path / "tokens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BASES)
def test_an_export_with_the_head_among_its_targets(bases, tmp_path: Path, case: str) -> None:
    live = adapter(bases[case], tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    export(bases[case], tmp_path / "adapter", tmp_path / "out", format="peft")
    with torch.no_grad():
        found = logits(PeftModel.from_pretrained(load_model(bases[case]), tmp_path / "out").eval())
    assert close(found, live)
