"""What is saved of modules trained in full: stock PEFT loads, runs, switches off and merges it, and a run begins with it.

Oracles: PEFT 0.21 over the unsplit Hugging Face model in fp32, and the stages' own logits.
"""

import json
import warnings
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.artifacts import saved_at
from pipeline.artifacts.adapter import full as full_tensors
from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters.base import trainable, written
from pipeline.model.stage import Stage
from pipeline.training.checkpoint import trained as saving
from pipeline.training.checkpoint.commit import CheckpointError
from pipeline.training.engine.engine import Place
from pipeline.training.stage import families, initial_adapter
from pipeline.training.start import resolve, to_train
from pipeline.training.start.resolved import Resolved
from tests.helpers.builders import save_model
from tests.helpers.configs import small
from tests.helpers.quick import only
from tests.helpers.stages import build, hidden, token_ids

# Logits of about 10 after four layers in fp32: the issue asks for 1e-5 of logits of about 1.
TOLERANCE = 1e-5
NAMES = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
LORA = {"adapter_type": "lora", "lora_rank": 4, "lora_alpha": 6.0}
OTHERS = {"lora_rank": None, "lora_alpha": None, "target_modules": ["q_proj", "down_proj"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "multiplicative": {"target_modules": ["o_proj", "down_proj"]},
    "multiplicative, patterns": {"rank_pattern": {"layers.0.mlp.down_proj": 6}, "train_logit_scale": 1.5},
    "control": {"adapter_type": "control_adapter", "lora_alpha": None},
    "lora": LORA,
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "dora": {**LORA, "use_dora": True},
    "ia3": {**OTHERS, "adapter_type": "ia3"},
    "oft": {**OTHERS, "adapter_type": "oft", "oft_block_size": 8},
    "hra": {**OTHERS, "adapter_type": "hra", "lora_rank": 4},
}
KINDS = ["untied", "tied"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        # Logits of about 1: a head like that of builders makes them 30.
        model = save_model(root / kind, "llama", tie_word_embeddings=kind == "tied")
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1 / 8)
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


def planned(folder: Path, **changes: Any) -> tuple[Any, Resolved]:
    raw = {
        "model": str(folder),
        "model_weight_dtype": "float32",
        "layers_to_transform": "0:2",
        "trainable_modules": NAMES,
    }
    config = loading.validate(small(**{**raw, **changes}), "x.toml")
    return config, resolve.resolve(config)


def stages_of(folder: Path, config: Any, plan: Resolved, cuts: list[int]) -> list[Stage]:
    stages = [build(folder, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
        trained_modules.unfreeze(stage, plan.trained.in_full)
    return stages


@torch.no_grad()
def move(stages: list[Stage], plan: Resolved) -> list[Stage]:
    """As after training; both ends of a tied weight alike."""
    for stage in stages:
        for name, parameter in trainable(stage).items():
            g = torch.Generator().manual_seed(zlib.crc32(plan.trained.tied.get(name, name).encode()))
            if not name.endswith(".Q"):
                parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return stages


def save(output: Path, config: Any, plan: Resolved, stages: list[Stage]) -> Path:
    output.mkdir()
    tensors = {name: t for stage in stages for name, t in written(stage).items()}
    families.writer(plan.trained.adapter, plan.base, config.train_logit_scale, plan.trained.tied)(output, tensors)
    return output


@torch.no_grad()
def logits(stages: list[Stage]) -> Tensor:
    return stages[-1].head(hidden(stages, token_ids()))


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    return model.eval()(token_ids(), use_cache=False).logits


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", only(list(FAMILIES)[:2], FAMILIES))
def test_stock_peft_loads_runs_and_merges_it(folders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    folder = folders[kind]
    config, plan = planned(folder, **FAMILIES[family])
    stages = move(stages_of(folder, config, plan, [0, 1, 4]), plan)
    ours, before = logits(stages), theirs(base_model(folder))
    assert torch.equal(ours, logits(move(stages_of(folder, config, plan, [0, 4]), plan)))
    adapter = save(tmp_path / "adapter", config, plan, stages)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        loaded = PeftModel.from_pretrained(base_model(folder), adapter)
    torch.testing.assert_close(theirs(loaded), ours, rtol=0, atol=TOLERANCE)
    with loaded.disable_adapter():
        torch.testing.assert_close(theirs(loaded), before, rtol=0, atol=TOLERANCE)
    assert (ours - before).abs().max() > 0.1
    torch.testing.assert_close(theirs(loaded.merge_and_unload()), ours, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["multiplicative", "lora", "ia3"])
def test_the_files_say_what_is_in_them(folders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    """PEFT's own names; a tied head once more under its own, and each in its module's full name."""
    config, plan = planned(folders[kind], **FAMILIES[family])
    stages = move(stages_of(folders[kind], config, plan, [0, 2, 4]), plan)
    adapter = save(tmp_path / "adapter", config, plan, stages)
    said = json.loads((adapter / "adapter_config.json").read_text())
    norms = [f"model.layers.{i}.{n}" for i in range(4) for n in ("input_layernorm", "post_attention_layernorm")]
    modules = {"model.embed_tokens", *norms, "model.norm"}
    copies = {"lm_head"} if kind == "tied" else set()
    assert set(said["modules_to_save"]) == modules | copies
    assert said.get("ensure_weight_tying", False) == (kind == "tied" and family == "lora")
    trained = {name: p for stage in stages for name, p in trainable(stage).items()}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        own = json.loads(file.metadata()["mulora_pipe"])
        assert {f"{module}.weight" for module in modules} == set(own["full"])
        assert own.get("tied", {}) == ({"lm_head.weight": "model.embed_tokens.weight"} if copies else {})
        for name in (f"{module}.weight" for module in modules | copies):
            assert torch.equal(file.get_tensor(f"base_model.model.{name}"), trained[name].detach())
        in_full = {key for key in file.keys() if key.removeprefix("base_model.model.") in plan.trained.in_full}  # noqa: SIM118
        assert len(in_full) == len(modules | copies)


def test_an_adapter_without_them_is_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    config, plan = planned(folders["tied"], trainable_modules=[])
    stages = stages_of(folders["tied"], config, plan, [0, 4])
    adapter = save(tmp_path / "adapter", config, plan, stages)
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] is None
    assert not plan.trained.in_full
    assert all(name.endswith((".A", ".B")) for name in trainable(stages[0]))


def test_numbers_that_are_none_are_not_written() -> None:
    weight = torch.ones(5000, 2)
    weight[4999, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        full_tensors.named({"model.embed_tokens.weight": weight}, {})
    with pytest.raises(ValueError, match="not a tensor of its own"):
        full_tensors.named({"a.weight": weight, "b.weight": weight}, {"b.weight": "a.weight"})


def test_what_the_stages_contribute_is_put_together_and_gone(tmp_path: Path) -> None:
    """Also tensors that are no row-major memory, cast to save_dtype; a failure leaves nothing."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    place = Place(0, 1, 0, 1, 0, 1, None, torch.device("cpu"))  # type: ignore[arg-type]
    tensors = {"a.B": torch.randn(6, 4).T, "model.norm.weight": torch.ones(6, dtype=torch.bfloat16)}
    saved: dict[str, Tensor] = {}

    def write(folder: Path, found: dict[str, Tensor]) -> None:
        assert [file.name for file in folder.iterdir()] == [".stage-0.safetensors"]
        saved.update({name: tensor.clone() for name, tensor in found.items()})
        (folder / "file").touch()
        if len(saved) > 2:
            raise ValueError("no")

    try:
        saving.save_adapter(tmp_path / "out", 7, place, tensors, torch.float16, write)
        with pytest.raises(CheckpointError, match=r"cannot write .*other: no"):
            saving.save_adapter(tmp_path / "other", 7, place, {"b.B": torch.ones(2)}, None, write)
    finally:
        dist.destroy_process_group()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"file", ".saved_at_step"}
    assert saved_at.step_of(tmp_path / "out") == 7
    assert saved["a.B"].dtype == torch.float16
    assert torch.equal(saved["a.B"], tensors["a.B"].half())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["multiplicative", "lora"])
def test_the_fold_is_the_model_that_was_trained(
    folders: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    config, plan = planned(folders[kind], **FAMILIES[family])
    stages = move(stages_of(folders[kind], config, plan, [0, 1, 4]), plan)
    merge(folders[kind], save(tmp_path / "adapter", config, plan, stages), tmp_path / "out")
    torch.testing.assert_close(theirs(base_model(tmp_path / "out")), logits(stages), rtol=0, atol=TOLERANCE)


# init_adapter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["multiplicative", "lora", "ia3"])
def test_a_run_begins_with_it(folders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    """Saved from two stages, begun with on three."""
    config, plan = planned(folders[kind], **FAMILIES[family])
    stages = move(stages_of(folders[kind], config, plan, [0, 1, 4]), plan)
    adapter = save(tmp_path / "adapter", config, plan, stages)
    again, plan = planned(folders[kind], **FAMILIES[family], seed=7, init_adapter=str(adapter))
    begun = stages_of(folders[kind], again, plan, [0, 2, 3, 4])
    tensors = to_train.initial_adapter_of(plan.trained, again.init_adapter)
    for stage in begun:
        initial_adapter.put(stage, tensors)
    assert torch.equal(logits(begun), logits(stages))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ties", [False, True])
def test_a_run_begins_with_an_adapter_that_peft_saved(
    folders: dict[str, Path], tmp_path: Path, kind: str, ties: bool
) -> None:
    config, plan = planned(folders[kind], **LORA, trainable_modules=["embed_tokens", "norm"])
    peft = get_peft_model(
        base_model(folders[kind]),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=plan.trained.targets,
            modules_to_save=["embed_tokens", "model.norm"],
            ensure_weight_tying=ties,
        ),
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    peft.save_pretrained(tmp_path / "theirs")
    begun = stages_of(folders[kind], config, plan, [0, 2, 4])
    tensors = initial_adapter.read_in_full(str(tmp_path / "theirs"), plan.trained.in_full, plan.trained.tied)
    assert tensors.keys() == set(plan.trained.in_full)
    again, plan = planned(
        folders[kind], **LORA, trainable_modules=["embed_tokens", "norm"], init_adapter=str(tmp_path / "theirs")
    )
    for stage in begun:
        initial_adapter.put(stage, to_train.initial_adapter_of(plan.trained, again.init_adapter))
    if kind == "untied" or ties:  # else PEFT has left the head as it was
        torch.testing.assert_close(logits(begun), theirs(peft), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("trained", "wanted", "said"),
    [
        (NAMES, ["norm"], "it has model.embed_tokens.weight in full, which this run does not train"),
        (
            ["norm"],
            ["norm", "embed_tokens"],
            "it does not have model.embed_tokens.weight in full, which this run trains",
        ),
        ([], ["norm"], "it does not have model.norm.weight in full"),
        (["norm"], [], "it has model.norm.weight in full"),
    ],
)
@pytest.mark.parametrize("family", ["multiplicative", "ia3"])
def test_what_is_trained_in_full_is_the_same(
    folders: dict[str, Path], tmp_path: Path, family: str, trained: list[str], wanted: list[str], said: str
) -> None:
    config, plan = planned(folders["tied"], **FAMILIES[family], trainable_modules=trained)
    adapter = save(tmp_path / "adapter", config, plan, stages_of(folders["tied"], config, plan, [0, 4]))
    with pytest.raises(UserError) as caught:
        planned(folders["tied"], **FAMILIES[family], trainable_modules=wanted, init_adapter=str(adapter))
    assert said in str(caught.value)
    assert "set trainable_modules to what it was trained on" in str(caught.value)
