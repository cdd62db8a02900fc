"""An adapter of what a layer's experts write: sums by hand in fp64, the same on 1, 2 and 3 stages, what is refused."""

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.console import UserError
from pipeline.model.adapters import experts
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.targets import resolve_targets
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.mixtures import LAYERS, MIXTURES, config_of, randomise, save_mixture
from tests.helpers.stages import build, hidden

KINDS = pytest.mark.parametrize("kind", MIXTURES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of a family and its folder, made once."""

    @cache
    def get(kind: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("mixtures") / kind
        return save_mixture(folder, kind), folder

    return get


def token_ids() -> Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def stages_of(folder: Path, cuts: list[int], **changes: Any) -> tuple[list[Any], Any]:
    """Stages with the adapter at random values, and what resolved it."""
    plan = resolve.resolve(config_of(folder, len(cuts) - 1, layers_per_stage=None, **changes))
    stages = [build(folder, first, end) for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
    return stages, plan


def logits_of(stages: list[Any]) -> Tensor:
    return stages[-1].head(hidden(stages, token_ids()))


def written_by_hand(module: nn.Module, kind: str, args: tuple[Any, ...], M: Tensor) -> Tensor:
    """Σ_e g_e·(M·W_e·a_e + M·b_e) of the tokens in fp64, an expert and a token at a time."""
    x, index, weights = (given.double() if given.is_floating_point() else given for given in args)
    gate_up, down = module.gate_up_proj.double(), module.down_proj.double()
    out = torch.zeros(len(x), M.shape[0], dtype=torch.float64)
    for token in range(len(x)):
        for place in range(index.shape[1]):
            e, g = int(index[token, place]), weights[token, place]
            if kind == "gpt_oss":
                both = x[token] @ gate_up[e] + module.gate_up_proj_bias[e].double()
                gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
                a = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
                y = M @ (down[e].T @ a) + M @ module.down_proj_bias[e].double()
            else:
                gate, up = (gate_up[e] @ x[token]).chunk(2)
                y = (M @ down[e]) @ (nn.functional.silu(gate) * up)
            out[token] += g * y
    return out


@KINDS
def test_every_expert_is_multiplied_and_its_bias_too(saved: Any, kind: str) -> None:
    _, folder = saved(kind)
    (stage,), plan = stages_of(folder, [0, LAYERS])
    parameters = trainable(stage)
    assert {name.rpartition(".")[2] for name in parameters} == {"A", "B"}
    randomise(parameters)
    name = plan.trained.targets[-1]
    assert name == f"model.layers.{LAYERS - 1}.{MIXTURES[kind][1]}"
    adapter = stage.model.get_submodule(name)
    seen: list[Any] = []
    adapter.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    with torch.no_grad():
        hidden([stage], token_ids())
        (args, output) = seen[0]
        s, A, B = plan.trained.adapter.sizes[name].s, adapter.A.double(), adapter.B.double()
        M = torch.eye(len(B), dtype=torch.float64) + s * B @ A
        expected = written_by_hand(adapter.base_layer, kind, args, M)
    # Three products of at most 72 terms, and what the adapter adds, each rounded to fp32.
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (adapter.base_layer(*args) - expected).abs().max() > 1e-2


@KINDS
def test_stages_compute_and_learn_the_same(saved: Any, kind: str) -> None:
    _, folder = saved(kind)
    found: dict[tuple[int, ...], tuple[Tensor, dict[str, Tensor]]] = {}
    for cuts in ([0, 3], [0, 1, 3], [0, 1, 2, 3]):
        stages, _ = stages_of(folder, cuts)
        parameters = {name: p for stage in stages for name, p in trainable(stage).items()}
        randomise(parameters)
        logits = logits_of(stages)
        logits.square().mean().backward()
        found[tuple(cuts)] = logits.detach(), {name: p.grad for name, p in parameters.items()}
    (whole, gradients), *others = found.values()
    assert all(bool(gradient.any()) for gradient in gradients.values())
    for logits, own in others:
        assert torch.equal(logits, whole)
        assert own.keys() == gradients.keys()
        assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_down_proj_means_the_experts_too(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = saved("deepseek_v3")
    plan = resolve.resolve(config_of(folder, target_modules=["down_proj"]))
    said = capsys.readouterr().out
    assert plan.trained.targets == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.experts",
        "model.layers.1.mlp.shared_experts.down_proj",
        "model.layers.2.mlp.experts",
        "model.layers.2.mlp.shared_experts.down_proj",
    ]
    assert list(plan.trained.adapter.experts) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert (
        "mlp.experts: one pair a layer on what its experts write, which changes the down_proj of each of them" in said
    )


def test_the_share_of_the_weights(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the layers' weights: down_proj is a third of the experts', which are most of it."""
    model, folder = saved("mixtral")
    layers = model.model.layers
    every = sum(p.numel() for p in layers.parameters())
    in_experts = sum(p.numel() for name, p in layers.named_parameters() if ".experts." in name)
    down = sum(p.numel() for name, p in layers.named_parameters() if "down_proj" in name)
    attention = sum(p.numel() for name, p in layers.named_parameters() if "self_attn" in name)
    resolve.resolve(config_of(folder))
    assert f"on {100 * down / every:.3g} % of the weights of all layers" in capsys.readouterr().out
    resolve.resolve(config_of(folder, target_modules="all-linear"))
    said = capsys.readouterr().out
    assert f"on {100 * attention / every:.3g} % of the weights of all layers" in said
    assert (
        f"{100 * in_experts / every:.3g} % are in the experts' own tensors, which this adapter does not reach" in said
    )


def test_ranks_by_pattern_and_the_control_adapter(saved: Any) -> None:
    _, folder = saved("granitemoe")
    pattern = {"layers.1.block_sparse_moe.experts": 2}
    (stage,), _ = stages_of(folder, [0, LAYERS], rank_pattern=pattern)
    shapes = {name: tuple(p.shape) for name, p in trainable(stage).items()}
    assert shapes["model.layers.1.block_sparse_moe.experts.A"] == (2, 32)
    assert shapes["model.layers.2.block_sparse_moe.experts.A"] == (4, 32)
    (stage,), _ = stages_of(folder, [0, LAYERS], adapter_type="control_adapter", lora_alpha=None)
    assert trainable(stage)["model.layers.0.block_sparse_moe.experts.Q"].shape == (32, 4)


def test_what_is_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("mixtral")
    with pytest.raises(UserError, match="adapter_type = 'lora' changes what a module reads"):
        resolve.resolve(config_of(folder, adapter_type="lora"))
    with pytest.raises(
        UserError, match=r"no linear module 'up_proj' in the chosen layers; there are mlp.experts, self_attn"
    ):
        resolve.resolve(config_of(folder, target_modules=["up_proj"]))
    model, _ = saved("mixtral")
    mixture = experts.find(model.config)
    nested = {"self_attn": mixture["mlp.experts"]}
    whole = copy.copy(model)
    with pytest.raises(UserError, match="no linear module 'experts'"):
        resolve_targets(whole, ["experts"], [0], nested)  # a module without experts in it is none
