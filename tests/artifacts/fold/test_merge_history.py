"""What a fold knows of its base: that it is the adapter's own, and what was folded into it before. And names that load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.formats.fingerprint import fingerprint
from pipeline.names import loadable_name
from pipeline.publishing.push import public_content
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.artifacts import hooked, load_model, logits, make_base, multiplicative, tensors_of
from tests.helpers.builders import save_model
from tests.helpers.configs import small

pytestmark = pytest.mark.usefixtures("small_blocks")

TWICE, OTHERS = "already, by its fold_report.json", "the weights in"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def trained(base: Path, folder: Path, **more: Any) -> Path:
    """An adapter that says which base it was trained on, as a run writes it."""
    multiplicative(folder, base_model=str(base), base_fingerprint=fingerprint(read_base(base)), **more)
    return folder


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fold_report.json").read_text())


def changed(base: Path, folder: Path, name: str, index: int) -> Path:
    """A copy of the base with another value in one row of one tensor."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


SEEN = [
    ("model.layers.0.mlp.down_proj.weight", 0),
    ("model.layers.2.self_attn.q_proj.weight", 31),
    ("model.embed_tokens.weight", 48),
    ("model.norm.weight", 3),
]


@pytest.mark.parametrize("name, row", SEEN)
def test_another_base_of_the_same_shapes_is_another(base: Path, tmp_path: Path, name: str, row: int, capsys) -> None:
    """By values, whatever the folder is called: a copy of the base is no other one."""
    adapter = trained(base, tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "renamed")
    for folder, warns in (
        (base, False),
        (tmp_path / "renamed", False),
        (changed(base, tmp_path / "other", name, row), True),
    ):
        merge(folder, adapter, tmp_path / "out", dry_run=True)
        error = capsys.readouterr().err
        assert (OTHERS in error and "are others" in error) == warns == ("warning" in error)


def test_the_same_weights_in_other_files_and_dtypes_are_the_same_base(tmp_path: Path) -> None:
    one = make_base(tmp_path / "one", dtype="bfloat16")
    wider = load_model(one, torch.float32)
    wider.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(read_base(tmp_path / "sharded").headers) > 1
    assert fingerprint(read_base(one)) == fingerprint(read_base(tmp_path / "sharded"))
    assert fingerprint(read_base(make_base(tmp_path / "cohere", "cohere"))) != fingerprint(read_base(one))


def test_a_fingerprint_reads_little(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kind of tensor at most three, of each at most three rows: 9 kinds in the layers, embedding and last norm."""
    from pipeline.formats import safetensors

    read: list[int] = []
    original = safetensors.read_floats
    monkeypatch.setattr(safetensors, "read_floats", lambda t, *a: (read.append(t.n_bytes), original(t, *a))[1])
    fingerprint(read_base(base))
    assert 0 < len(read) <= (9 + 2) * 9
    assert max(read) <= 48 * 4


def test_the_same_adapter_twice_is_said_and_remembered(base: Path, tmp_path: Path, capsys) -> None:
    first, second = trained(base, tmp_path / "first"), trained(base, tmp_path / "second", seed=1)
    merge(base, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two")
    assert "warning" not in capsys.readouterr().err  # a fold's result is of the base that the adapters were trained on
    shutil.copytree(first, tmp_path / "another name")
    merge(tmp_path / "two", tmp_path / "another name", tmp_path / "three")
    assert TWICE in capsys.readouterr().err
    folds = [*report(tmp_path / "three")["earlier"], report(tmp_path / "three")]
    assert [[entry["adapter"] for entry in fold["adapters"]] for fold in folds] == [
        ["first"],
        ["second"],
        ["another name"],
    ]
    assert [fold["base"] for fold in folds] == ["base", "one", "two"]
    assert folds[0]["base_fingerprint"] == fingerprint(read_base(base)) != folds[1]["base_fingerprint"]
    assert all("tensors" not in fold and "earlier" not in fold for fold in folds[:-1])


def test_twice_in_one_command_and_again_after_it_was_taken_out(base: Path, tmp_path: Path, capsys) -> None:
    adapter = trained(base, tmp_path / "adapter")
    merge(base, [adapter, adapter], tmp_path / "out", dry_run=True)
    assert TWICE in capsys.readouterr().err
    merge(base, adapter, tmp_path / "in")
    merge(tmp_path / "in", adapter, tmp_path / "back", unmerge=True)
    merge(tmp_path / "back", adapter, tmp_path / "again")
    assert "warning" not in capsys.readouterr().err
    assert len(report(tmp_path / "again")["earlier"]) == 2


def test_taking_out_what_is_beneath_another_fold_is_said(base: Path, tmp_path: Path, capsys) -> None:
    first, second = trained(base, tmp_path / "first"), trained(base, tmp_path / "second", seed=1)
    merge(base, first, tmp_path / "one")
    merge(tmp_path / "one", second, tmp_path / "two")
    merge(tmp_path / "two", first, tmp_path / "out", unmerge=True, dry_run=True)
    assert "a fold of first × 1, second × 1; what is taken out is first × 1" in capsys.readouterr().err
    merge(tmp_path / "two", [first, second], tmp_path / "out", unmerge=True)
    assert "warning" not in capsys.readouterr().err
    before = tensors_of(base)
    assert all((tensor - before[name]).abs().max() < 3e-6 for name, tensor in tensors_of(tmp_path / "out").items())


@pytest.mark.parametrize(
    "strange", [3, [], {"adapters": 3}, {"earlier": {}, "adapters": [{"adapter": 3, "scale": "x"}, 4]}]
)
def test_a_report_of_others_does_not_stop_a_fold(base: Path, tmp_path: Path, strange: Any) -> None:
    adapter = trained(base, tmp_path / "adapter")
    (base / "fold_report.json").write_text(json.dumps(strange))
    if isinstance(strange, dict):
        merge(base, adapter, tmp_path / "out")
    else:
        with pytest.raises(UserError, match=r"fold_report\.json does not hold a JSON object"):
            merge(base, adapter, tmp_path / "out")


def test_a_rank_above_the_width_is_said(base: Path, tmp_path: Path, capsys) -> None:
    """down_proj is 32 × 48: by the fold, and when a run is looked at."""
    trained(base, tmp_path / "adapter", rank=40)
    merge(base, tmp_path / "adapter", tmp_path / "out", dry_run=True)
    assert "the rank is above the width of 3 weights, model.layers.0.mlp.down_proj first" in capsys.readouterr().err
    trained(base, tmp_path / "full", rank=32)
    merge(base, tmp_path / "full", tmp_path / "out", dry_run=True)
    assert "warning" not in capsys.readouterr().err
    save_model(tmp_path / "model")
    for rank, warned in ((33, True), (32, False)):
        asked = small(model=str(tmp_path / "model"), target_modules=["down_proj"], lora_rank=rank)
        resolve.resolve(loading.validate(asked, "x.toml"))
        assert ("lora_rank = 33 is above the width of" in capsys.readouterr().err) == warned


def test_what_lies_beside_an_adapter_and_is_not_folded_is_said(base: Path, tmp_path: Path, capsys) -> None:
    trained(base, tmp_path / "adapter")
    save_file({"input_embeddings": torch.ones(4, 32)}, tmp_path / "adapter" / "new_embeddings.safetensors")
    merge(base, tmp_path / "adapter", tmp_path / "out", dry_run=True)
    assert "holds new_embeddings.safetensors, rows for tokens beyond" in capsys.readouterr().err
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}')
    with pytest.raises(UserError, match="is an adapter of MLX"):
        merge(base, tmp_path / "mlx", tmp_path / "out")


ADAPTERS: dict[str, dict[str, Any]] = {
    "multiplicative_lora": {},
    "lora": {"adapter_type": "lora"},
    "dora": {"adapter_type": "lora", "use_dora": True},
    "hra": {"adapter_type": "hra", "lora_alpha": None},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_stock_peft_finds_the_base_of_an_adapter_on_this_machine(tmp_path: Path, case: str) -> None:
    """AutoPeftModelForCausalLM reads the base from adapter_config.json; what is uploaded has no private path."""
    save_model(tmp_path / "private place" / "base")
    keys = {"target_modules": ["down_proj"], **ADAPTERS[case]}
    config = loading.validate(small(model=str(tmp_path / "private place" / "base"), **keys), "x.toml")
    plan = resolve.resolve(config)
    rank, generator = config.lora_rank or 1, torch.Generator().manual_seed(0)
    tensors = {}
    for module in plan.trained.targets:
        rows, columns = plan.meta_model.shared.get_submodule(module).weight.shape
        shapes = {"A": (rank, columns if config.adapter_type == "lora" else rows), "B": (rows, rank)}
        shapes |= {"lora_magnitude_vector": (rows,)} if case == "dora" else {}
        shapes = {"hra_u": (columns, rank)} if case == "hra" else shapes
        tensors |= {f"{module}.{key}": 0.2 + torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    (tmp_path / "adapter").mkdir()
    families.writer(plan.trained.adapter, plan.base, config.train_logit_scale)(tmp_path / "adapter", tensors)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    merge(tmp_path / "private place" / "base", tmp_path / "adapter", tmp_path / "out")
    assert (logits(found) - logits(load_model(tmp_path / "out"))).abs().max() < 2e-5
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.base_model == "base"
    assert adapter.base_fingerprint == fingerprint(read_base(tmp_path / "private place" / "base"))
    uploaded = public_content(tmp_path / "adapter" / "adapter_config.json")
    assert isinstance(uploaded, bytes)
    assert b"private" not in uploaded
    config_file = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert json.loads(uploaded) == config_file | {"base_model_name_or_path": "base"}
    assert b"private" not in (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()


def test_stock_peft_finds_the_base_of_an_export(base: Path, tmp_path: Path) -> None:
    tensors = multiplicative(tmp_path / "adapter", base_model=str(base))
    export(base, tmp_path / "adapter", tmp_path / "peft", format="peft")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32).eval()
    model = load_model(base)
    with hooked(model, tensors, 1.5, multiplicative=True):
        assert (logits(found) - logits(model)).abs().max() < 1e-5


def test_the_name_of_a_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loadable_name("owner/name") == "owner/name"
    assert loadable_name("base") == loadable_name("../" + tmp_path.name + "/base") == str(base)
    assert loadable_name("/not/here/command-r") == "command-r"
