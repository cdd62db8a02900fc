"""Every adapter family through the configuration: on one stage and on two, against stock PEFT, in the fold.

Oracles: PEFT 0.21 loading what we wrote and computing on the unsplit Hugging Face model, PEFT's merged weights, PEFT's
own start of PiSSA and OLoRA, and the formulas in fp64.
"""

import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.artifacts.fold.merge import merge
from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.console import UserError
from pipeline.model.adapters import lora
from pipeline.model.adapters.base import _plain, trainable, written
from pipeline.model.memory.levels import RecomputeLevel
from pipeline.model.stage import Stage, empty_model, read_model_config
from pipeline.training.stage import families
from pipeline.training.start import plan as planned
from pipeline.training.start import resolve
from tests.helpers.artifacts import tensors_of
from tests.helpers.builders import save_model
from tests.helpers.configs import small
from tests.helpers.quick import only
from tests.helpers.stages import build, hidden, token_ids

# Normed hidden states of about 1 after four layers of sums of at most 64 products in fp32: rounding is near 1e-6.
TOLERANCE = 1e-5
# Weights of about 1, changed by sums of at most 64 + 8 products of the same size: 72·2⁻²⁴ ≈ 4e-6.
WEIGHT_TOLERANCE = 5e-6

LORA = {"adapter_type": "lora", "lora_rank": 4, "lora_alpha": 6.0}
ROTATIONS = {"lora_rank": None, "lora_alpha": None, "target_modules": ["q_proj", "down_proj"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "multiplicative": {"adapter_type": "multiplicative_lora", "target_modules": ["o_proj", "down_proj"]},
    "control": {
        "adapter_type": "control_adapter",
        "lora_alpha": None,
        "target_modules": ["o_proj", "down_proj"],
    },
    "lora": LORA,
    "rslora": {**LORA, "use_rslora": True},
    "moslora": {**LORA, "adapter_type": "moslora"},
    "moslora, rslora": {**LORA, "adapter_type": "moslora", "use_rslora": True},
    "flora": {**LORA, "adapter_type": "flora"},
    "dora": {**LORA, "use_dora": True},
    "dora, rslora": {**LORA, "use_dora": True, "use_rslora": True},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "pissa, rslora": {**LORA, "init_lora_weights": "pissa", "use_rslora": True},
    "olora": {**LORA, "init_lora_weights": "olora"},
    "ia3": {"adapter_type": "ia3", "lora_rank": None, "lora_alpha": None},
    "oft": {**ROTATIONS, "adapter_type": "oft", "oft_block_size": 8},
    "boft": {**ROTATIONS, "adapter_type": "boft", "boft_block_size": 8},
    "hra": {**ROTATIONS, "adapter_type": "hra", "lora_rank": 4},
}
QUICK = ("multiplicative", "control", "lora", "dora, rslora", "pissa", "hra")
ALL = pytest.mark.parametrize("family", only(QUICK, FAMILIES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2, whose q, k and v have biases."""
    path = tmp_path_factory.mktemp("models") / "qwen2"
    model = save_model(path, "qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(path)
    return path


def config_of(folder: Path, family: str, **changes: Any) -> Config:
    raw = {"model": str(folder), "layers_to_transform": "0:2", **FAMILIES[family], **changes}
    return loading.validate(small(**raw), "x.toml")


def stages_of(folder: Path, config: Config, cuts: list[int]) -> list[Stage]:
    """Stages with the configured adapter, as they start."""
    plan = resolve.resolve(config)
    stages = [build(folder, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    return stages


def trained(stages: list[Stage]) -> dict[str, nn.Parameter]:
    return {name: p for stage in stages for name, p in trainable(stage).items()}


@torch.no_grad()
def move(stages: list[Stage]) -> list[Stage]:
    """As after training: every trained parameter moved, the same whatever the cut; Q stays orthonormal."""
    for name, parameter in trained(stages).items():
        g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if not name.endswith(".Q"):
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return stages


def save(config: Config, stages: list[Stage], output: Path) -> Path:
    plan = resolve.resolve(config)
    output.mkdir()
    tensors = {name: t for stage in stages for name, t in written(stage).items()}
    families.writer(plan.trained.adapter, plan.base, config.train_logit_scale)(output, tensors)
    return output


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    """The normed hidden state of a Hugging Face model, with PEFT's layers in it or not."""
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    return inner.eval().model(token_ids(), use_cache=False).last_hidden_state


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@ALL
def test_a_start_changes_nothing_and_does_not_depend_on_the_cut(folder: Path, family: str) -> None:
    config = config_of(folder, family)
    one, two = stages_of(folder, config, [0, 4]), stages_of(folder, config, [0, 1, 4])
    first, second = trained(one), trained(two)
    assert first.keys() == second.keys()
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        torch.testing.assert_close(
            hidden(one, token_ids()), hidden([build(folder, 0, 4)], token_ids()), rtol=0, atol=TOLERANCE
        )


@ALL
def test_stages_equal_each_other_and_stock_peft_with_what_was_saved(folder: Path, tmp_path: Path, family: str) -> None:
    config = config_of(folder, family)
    one, two = move(stages_of(folder, config, [0, 4])), move(stages_of(folder, config, [0, 1, 4]))
    with torch.no_grad():
        ours = hidden(two, token_ids())
        assert torch.equal(ours, hidden(one, token_ids()))
        assert (ours - hidden([build(folder, 0, 4)], token_ids())).abs().max() > 0.02, "the adapter does nothing"
    loaded = PeftModel.from_pretrained(base_model(folder), save(config, two, tmp_path / "adapter"))
    torch.testing.assert_close(theirs(loaded), ours, rtol=0, atol=TOLERANCE)


@ALL
def test_resuming_by_name_on_other_stages(folder: Path, family: str) -> None:
    config = config_of(folder, family)
    before = move(stages_of(folder, config, [0, 1, 4]))
    after = stages_of(folder, config, [0, 2, 3, 4])
    with torch.no_grad():
        for name, parameter in trained(before).items():
            trained(after)[name].copy_(parameter)
        assert torch.equal(hidden(before, token_ids()), hidden(after, token_ids()))


@ALL
def test_gradients_are_those_of_peft_with_what_was_saved(folder: Path, tmp_path: Path, family: str) -> None:
    """By the chain rule where a family is saved as a pair that its own parameters make up."""
    config = config_of(folder, family)
    stages = move(stages_of(folder, config, [0, 1, 4]))
    loaded = PeftModel.from_pretrained(
        base_model(folder), save(config, stages, tmp_path / "adapter"), is_trainable=True
    ).train()
    g = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(5))
    for stage in stages:
        stage.train()
    (hidden(stages, token_ids()) * g).sum().backward()
    (loaded.base_model.model.model(token_ids(), use_cache=False).last_hidden_state * g).sum().backward()
    plain = {_plain(n.replace("peanut_", "lora_")): p for n, p in loaded.base_model.model.named_parameters()}
    gradients = {name: p.grad for name, p in plain.items() if p.grad is not None}
    own = trained(stages)
    for name, parameter in own.items():
        right = chain_rule(family, name, own, gradients)
        # Through four layers rounding is near 1e-5 of the largest entry; in q and k gradients are differences of larger ones.
        assert (parameter.grad - right).abs().max() <= 1e-4 * right.abs().max(), name


@torch.no_grad()
def chain_rule(family: str, name: str, own: dict[str, nn.Parameter], theirs: dict[str, Tensor]) -> Tensor:
    """The gradient of our parameter `name` from those of the A and B that are made of it."""
    module, _, letter = name.rpartition(".")
    if family == "control":  # A = Qᵀ, B = Q·diag(e^S − 1)
        Q, S, dA, dB = own[f"{module}.Q"], own[f"{module}.S"], theirs[f"{module}.A"], theirs[f"{module}.B"]
        return dA.T + dB * torch.expm1(S) if letter == "Q" else (dB * Q).sum(0) * torch.exp(S)
    if family.startswith(("moslora", "flora")) and letter != "A":  # B' = B·M
        B, M, dB = own[f"{module}.B"], own[f"{module}.M"], theirs[f"{module}.B"]
        return dB @ M.T if letter == "B" else B.T @ dB
    if family.startswith(("pissa", "olora")):  # [A; A₀] and [B, −B₀]
        return theirs[name][:4] if letter == "A" else theirs[name][:, :4]
    return theirs[name]


@ALL
def test_fold_is_pefts_merge_and_the_live_model(folder: Path, tmp_path: Path, family: str) -> None:
    """PiSSA and OLoRA are folded onto the original base, which is not the one PEFT would train them on."""
    config = config_of(folder, family)
    stages = move(stages_of(folder, config, [0, 1, 4]))
    adapter = save(config, stages, tmp_path / "adapter")
    merge(folder, adapter, tmp_path / "out")
    merged = PeftModel.from_pretrained(base_model(folder), adapter).merge_and_unload().state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert (tensor - merged[name]).abs().max() < WEIGHT_TOLERANCE, name
    with torch.no_grad():
        live = hidden(stages, token_ids())
    torch.testing.assert_close(theirs(base_model(tmp_path / "out")), live, rtol=0, atol=TOLERANCE)


@ALL
def test_counted_on_meta_it_has_the_same_parameters(folder: Path, family: str) -> None:
    config = config_of(folder, family)
    plan = resolve.resolve(config)
    meta_model = empty_model(read_model_config(str(folder)), torch.float32, None)
    stage = Stage(meta_model.requires_grad_(False), 0, 4)
    families.inject(stage, plan.trained.adapter)
    counted = {name: p.shape for name, p in trainable(stage).items()}
    assert counted == {name: p.shape for name, p in trained(stages_of(folder, config, [0, 4])).items()}


@pytest.mark.parametrize(
    "family", ["control", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "pissa", "oft", "hra"))]
)
def test_the_planner_counts_it(folder: Path, family: str) -> None:
    config = config_of(folder, family)
    plan = resolve.resolve(config)
    cost = planned.costs(plan, [RecomputeLevel.INPUT, RecomputeLevel.EVERYTHING], False)(64)
    assert len(cost.layers) == 4


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_100"])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_from_the_weight_are_pefts(folder: Path, start: str, rslora: bool) -> None:
    """Singular vectors have no sign of their own, so the product is compared, and PEFT's changed base.

    100 subspace iterations, with 14 vectors of which 4 are wanted, are the exact ones to (σ₁₅/σ₄)²⁰⁰, below 1e-7 here; but
    rounding turns the subspaces that two algorithms find, by up to that of W over the gap σ₄ − σ₅ (Davis & Kahan).
    """
    config = config_of(folder, "lora", init_lora_weights=start, use_rslora=rslora)
    stages = stages_of(folder, config, [0, 4])
    targets = resolve.resolve(config).trained.targets
    peft = get_peft_model(
        base_model(folder),
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            init_lora_weights=start.removesuffix("_niter_100"),
            target_modules=targets,
        ),
    )
    original = base_model(folder).state_dict()
    for name in targets:
        module, ours = peft.base_model.model.get_submodule(name), stages[0].model.get_submodule(name)
        s = module.scaling["default"]
        product = s * module.lora_B["default"].weight @ module.lora_A["default"].weight
        values = torch.linalg.svdvals(original[f"{name}.weight"])
        turned = float(values[0] / (values[3] - values[4])) if "niter" in start else 0.0
        assert (ours.scaling * ours.B @ ours.A - product).abs().max() < WEIGHT_TOLERANCE * (1 + turned)
        assert (original[f"{name}.weight"] - product - module.base_layer.weight).abs().max() < WEIGHT_TOLERANCE


def test_few_iterations_come_near_the_best_approximation() -> None:
    """A weight whose singular values fall as 1/√i: the part that rank 8 leaves is within 1 % of the smallest possible."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 96, generator=generator)).Q for n in (96, 160))
    singular = torch.arange(1, 97).rsqrt()
    W = U * singular @ V.T
    probes = torch.randn(160, 18, generator=generator)
    left, values, right = lora.approximate_svd(W, probes, iterations=4)
    left_over = torch.linalg.matrix_norm(W - left[:, :8] * values[:8] @ right[:8])
    assert left_over < 1.01 * singular[8:].square().sum().sqrt()
    assert (left[:, :8].T @ left[:, :8] - torch.eye(8)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@ALL
def test_adapter_has_its_own_dtype_over_a_16_bit_base(folder: Path, family: str, dtype: str) -> None:
    config = config_of(folder, family, lora_weight_dtype=dtype)
    stage = build(folder, 0, 4, torch.bfloat16).train()
    families.inject(stage, resolve.resolve(config).trained.adapter)
    plain = hidden([build(folder, 0, 4, torch.bfloat16)], token_ids())
    output = hidden([stage], token_ids())
    assert output.dtype == torch.bfloat16
    # At the start; PiSSA in bf16 subtracts what it adds, each rounded to 2⁻⁹, in four layers.
    assert (output - plain).abs().max() < 0.25
    output.float().square().sum().backward()
    parameters = trainable(stage)
    assert {p.dtype for p in parameters.values()} == {getattr(torch, dtype)}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters.values())


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"adapter_type": "poly"}, "adapter_type", "by a task's number"),
        ({"adapter_type": "X-LoRA"}, "adapter_type", "twice through all stages"),
        ({"adapter_type": "vera"}, "adapter_type", "type = 'VERA'"),
        ({"adapter_type": "loha"}, "adapter_type", "type = 'LOHA'"),
        ({"adapter_type": "lokr"}, "adapter_type", "type = 'LOKR'"),
        ({"adapter_type": "control_adapter"}, "lora_alpha", "scaling is 1"),
        ({"adapter_type": "oft", "lora_rank": None, "lora_alpha": None}, "oft_block_size", "required"),
        ({"adapter_type": "hra", "lora_alpha": None, "lora_rank": 3}, "lora_rank", "even"),
        ({"use_dora": True}, "use_dora", "no meaning"),
        ({"adapter_type": "moslora", "use_dora": True}, "use_dora", "no meaning"),
        ({"adapter_type": "lora", "use_dora": True, "init_lora_weights": "pissa"}, "init_lora_weights", "use_dora"),
        ({"adapter_type": "lora", "init_lora_weights": "eva"}, "init_lora_weights", "pissa"),
        (
            {"adapter_type": "lora", "init_lora_weights": "pissa", "quantization": {"bnb": {"load_in_4bit": True}}},
            "init_lora_weights",
            "4- or 8-bit",
        ),
        (
            {"adapter_type": "hra", "lora_alpha": None, "quantization": {"bnb": {"load_in_8bit": True}}},
            "adapter_type",
            "garbage",
        ),
        ({"adapter_type": "lora", "oft_block_size": 8}, "oft_block_size", "no meaning"),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        loading.validate(small(**changes), "x.toml")
    assert key in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("control", {"lora_rank": 33}, "32 outputs"),
        ("oft", {"oft_block_size": 7}, "does not divide the 32 inputs"),
        ("boft", {"boft_block_size": 48}, "does not divide"),
        ("pissa", {"lora_rank": 32}, "of rank 16"),
        ("ia3", {"feedforward_modules": ["up_proj"]}, "none of target_modules"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_weights_are_read(
    folder: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resolve.resolve(config_of(folder, family, **changes))


def test_families_refuse_what_they_would_not_save(folder: Path, tmp_path: Path) -> None:
    """Tensors that are not the family's, or not numbers, end in an error and no file."""
    config = config_of(folder, "ia3")
    stages = move(stages_of(folder, config, [0, 4]))
    with torch.no_grad():
        next(iter(trained(stages).values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        save(config, stages, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").iterdir())
