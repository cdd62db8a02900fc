"""A run that begins with a saved adapter: every family comes back as the function it was, or is refused by what differs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.model.adapters.base import trainable, written
from pipeline.model.adapters.control import ControlAdapter
from pipeline.training.stage import families, initial_adapter
from pipeline.training.start import resolve, to_train
from tests.helpers.configs import small
from tests.helpers.stages import chain, hidden, token_ids

TARGETS = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 3)]
FAMILIES: dict[str, dict[str, Any]] = {
    "multiplicative_lora": {},
    "lora": {"adapter_type": "lora"},
    "rslora": {"adapter_type": "lora", "use_rslora": True},
    "dora": {"adapter_type": "lora", "use_dora": True},
    "moslora": {"adapter_type": "moslora"},
    "flora": {"adapter_type": "flora"},
    "control_adapter": {"adapter_type": "control_adapter", "lora_alpha": None},
    "ia3": {"adapter_type": "ia3", "lora_rank": None, "lora_alpha": None},
    "oft": {"adapter_type": "oft", "lora_rank": None, "lora_alpha": None, "oft_block_size": 8},
    "boft": {"adapter_type": "boft", "lora_rank": None, "lora_alpha": None, "boft_block_size": 8},
    "hra": {"adapter_type": "hra", "lora_alpha": None},
    "pissa": {"adapter_type": "lora", "init_lora_weights": "pissa"},
    "olora": {"adapter_type": "lora", "init_lora_weights": "olora"},
}
# What is saved is the same function in another form; PiSSA and OLoRA go on as the plain LoRA of twice the rank that it is.
REWRITTEN = ("moslora", "flora", "control_adapter", "pissa", "olora")
OF_TWICE_THE_RANK: dict[str, Any] = {"adapter_type": "lora", "lora_rank": 8, "lora_alpha": 16}
GOES_ON_AS = {**FAMILIES, "pissa": OF_TWICE_THE_RANK, "olora": OF_TWICE_THE_RANK}


def config_of(llama: Path, **changes: Any) -> Any:
    return loading.validate(small(**{"lora_weight_dtype": "float32", "model": str(llama), **changes}), "x.toml")


def stages_with(llama: Path, config: Any, cuts: list[int]) -> list[Any]:
    stages = chain(llama, cuts)
    for stage in stages:
        families.inject(stage, to_train.adapter_of(config, TARGETS))
        stage.eval()
    return stages


@torch.no_grad()
def perturb(stages: list[Any]) -> None:
    """As if trained; a control adapter's Q stays orthonormal, as it does in training."""
    for number, stage in enumerate(stages):
        controls = {f"{n}.Q" for n, m in stage.model.named_modules() if isinstance(m, ControlAdapter)}
        for name, parameter in trainable(stage).items():
            g = torch.Generator().manual_seed(len(name) + 100 * number)
            if name not in controls:
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)


def save(folder: Path, stages: list[Any], config: Any) -> None:
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        tensors |= written(stage)
    folder.mkdir()
    families.writer(to_train.adapter_of(config, TARGETS), resolve.base_of(config))(folder, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_goes_on_as_the_function_that_was_saved(llama: Path, tmp_path: Path, family: str) -> None:
    """Saved from two stages, begun with on three others, whose own start is another."""
    config = config_of(llama, **FAMILIES[family])
    trained = stages_with(llama, config, [0, 2, 4])
    untrained = hidden(trained, token_ids())
    perturb(trained)
    save(tmp_path / "saved", trained, config)
    again = config_of(llama, seed=7, init_adapter=str(tmp_path / "saved"), **GOES_ON_AS[family])
    begun = stages_with(llama, again, [0, 1, 3, 4])
    tensors = families.saved(to_train.adapter_of(again, TARGETS), again.init_adapter)
    for stage in begun:
        initial_adapter.put(stage, tensors)
    with torch.no_grad():
        wanted, found = hidden(trained, token_ids()), hidden(begun, token_ids())
    assert (wanted - untrained).abs().max() > 1e-2, "it does something"
    if family in REWRITTEN:
        # Products of R = 4 terms in another order, in a normed hidden state of about 1 after four layers in fp32.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        return
    assert torch.equal(found, wanted)
    parameters = [{n: p for stage in stages for n, p in trainable(stage).items()} for stages in (trained, begun)]
    assert parameters[0].keys() == parameters[1].keys()
    assert all(torch.equal(p, parameters[1][name]) for name, p in parameters[0].items())


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One folder a family, as it begins."""
    folders = {}
    for family, keys in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp("saved") / family
        config = config_of(llama, **keys)
        save(folders[family], stages_with(llama, config, [0, 4]), config)
    return folders


# Family that was saved; what this run has otherwise; what is said.
REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rank": ("lora", {"adapter_type": "lora", "lora_rank": 16, "lora_alpha": 32}, "has rank 4, this run's has rank 16"),
    "scaling": (
        "lora",
        {"adapter_type": "lora", "lora_alpha": 4},
        "with s = 2 (alpha / rank = 8 / 4), this run has s = 1,",
    ),
    "rslora": ("lora", {"adapter_type": "lora", "use_rslora": True}, "this run has s = 4,"),
    "kind": ("lora", {}, "it is a lora, and this run trains a multiplicative_lora"),
    "other kind": (
        "multiplicative_lora",
        {"adapter_type": "lora"},
        "it is a multiplicative_lora, and this run trains a lora",
    ),
    "free": ("multiplicative_lora", {"adapter_type": "control_adapter", "lora_alpha": None}, "was trained with s = 2"),
    "family": ("ia3", FAMILIES["hra"], "it is ia3, and this run trains hra"),
    "block": (
        "oft",
        {**FAMILIES["oft"], "oft_block_size": 16},
        "it was trained with oft_block_size = 8, this run has 16",
    ),
    "pair for ia3": ("lora", FAMILIES["ia3"], "it is lora, and this run trains ia3"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_differs_is_named(llama: Path, saved: Mapping[str, Path], case: str) -> None:
    family, changes, said = REFUSALS[case]
    config = config_of(llama, init_adapter=str(saved[family]), **changes)
    with pytest.raises(UserError) as caught:
        families.saved(to_train.adapter_of(config, TARGETS), config.init_adapter)
    assert said in str(caught.value)
    assert str(saved[family]) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("family", ["multiplicative_lora", "oft"])
def test_modules_are_the_same(llama: Path, saved: Mapping[str, Path], family: str) -> None:
    config = config_of(llama, init_adapter=str(saved[family]), **FAMILIES[family])
    with pytest.raises(UserError, match=r"has nothing for model\.layers\.2\.mlp\.down_proj, which this run trains"):
        families.saved(to_train.adapter_of(config, [*TARGETS, "model.layers.2.mlp.down_proj"]), config.init_adapter)
    with pytest.raises(UserError, match=r"has model\.layers\.1\.mlp\.down_proj and 1 more, which this run does not"):
        families.saved(to_train.adapter_of(config, TARGETS[:1]), config.init_adapter)


def test_no_folder(llama: Path, tmp_path: Path) -> None:
    config = config_of(llama, init_adapter=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such folder"):
        families.saved(to_train.adapter_of(config, TARGETS), config.init_adapter)


def test_it_is_not_looked_at_when_resuming(llama: Path, tmp_path: Path) -> None:
    """Also where the command line says so and the configuration does not."""
    config = config_of(llama, init_adapter=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such folder"):
        resolve.resolve(config)
    assert resolve.resolve(config, resumes=True).trained.targets


def test_another_models_shapes_change_nothing(llama: Path, saved: Mapping[str, Path]) -> None:
    config = config_of(llama, init_adapter=str(saved["multiplicative_lora"]))
    (stage,) = stages_with(llama, config, [0, 4])
    tensors = families.saved(to_train.adapter_of(config, TARGETS), config.init_adapter)
    tensors[f"{TARGETS[2]}.B"] = torch.ones(48, 4)
    before = {name: p.detach().clone() for name, p in trainable(stage).items()}
    with pytest.raises(UserError, match=r"is \[48, 4\], and the model's module asks for \[32, 4\]"):
        initial_adapter.put(stage, tensors)
    assert all(torch.equal(p, before[name]) for name, p in trainable(stage).items())


def test_peanut_of_others_leaves_biases_alone(llama: Path, saved: Mapping[str, Path], tmp_path: Path) -> None:
    """PEFT's PEANUT changes the weight only; trained here on a module with a bias it would move that, too."""
    from safetensors.torch import load_file, save_file

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    ours = saved["multiplicative_lora"]
    (theirs / "adapter_config.json").write_bytes((ours / "adapter_config.json").read_bytes())
    save_file(load_file(ours / "adapter_model.safetensors"), theirs / "adapter_model.safetensors", {"format": "pt"})
    config = config_of(llama, init_adapter=str(theirs))
    assert families.saved(to_train.adapter_of(config, TARGETS), config.init_adapter)
    with pytest.raises(UserError, match="without their biases"):
        families.saved(to_train.adapter_of(config, TARGETS, biased_targets=True), config.init_adapter)
