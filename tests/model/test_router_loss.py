"""The routers' loss over stages: transformers' own number and gradients, on 1, 2 and 3 stages. Oracle: the unsplit model.

Stages run here as a pipeline runs them, forward with a detached tensor between them, and backward from the last to the first.
"""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipeline.console import UserError
from pipeline.model import cut_check, router_loss
from pipeline.model.adapters.base import trainable
from pipeline.model.memory import activation
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.router_loss import SCALE, RouterLoss
from pipeline.model.stage import empty_model, read_model_config
from pipeline.model.structure.carried import pack, unpack
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.mixtures import LAYERS, config_of, randomise, save_mixture
from tests.helpers.quick import only
from tests.helpers.stages import build

WEIGHT = 0.5
CUTS = ([0, 3], [0, 1, 3], [0, 1, 2, 3])
KINDS = {"mixtral": {}, "granitemoe": {"embedding_multiplier": 2.0}, "gpt_oss": {}}
LENGTHS = torch.tensor([12, 7])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    for kind, changes in KINDS.items():
        save_mixture(root / kind, kind, output_router_logits=True, router_aux_loss_coef=WEIGHT, **changes)
    return {kind: root / kind for kind in KINDS}


def token_ids() -> Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def stages_of(folder: Path, cuts: list[int], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Stages with adapters on experts and o_proj, in training; routers' inputs depend on these."""
    adapter = resolve.resolve(config_of(folder, target_modules=["experts", "o_proj"])).trained.adapter
    stages = [build(folder, first, end, dtype).train() for first, end in pairwise(cuts)]
    for stage in stages:
        families.inject(stage, adapter)
    randomise({name: p for stage in stages for name, p in trainable(stage).items()})
    return stages


def run(
    stages: list[Any], routers: list[RouterLoss], lengths: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighed loss of the routers alone, and the gradients."""
    ids = token_ids()
    at = torch.arange(12).expand_as(ids) if positions is None else positions
    carried: tuple[Tensor, ...] = (ids, at, *([] if lengths is None else [lengths]))
    entered: list[tuple[Tensor, Tensor]] = []
    for stage in stages[:-1]:
        given, positions = stage(carried)
        entered.append((given, given.detach().requires_grad_()))
        carried = (entered[-1][1], positions)
    stages[-1](carried)
    loss = WEIGHT * routers[-1].take()
    loss.backward()
    for given, leaf in reversed(entered):
        given.backward(leaf.grad)
    return loss.detach(), {n: p.grad for stage in stages for n, p in trainable(stage).items() if p.grad is not None}


def of_transformers(folder: Path, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The same of the unsplit model's own forward."""
    (stage,) = stages_of(folder, [0, LAYERS])
    ids = token_ids()
    given = {} if mask is None else {"attention_mask": mask}
    output = stage.model(input_ids=ids, output_router_logits=True, use_cache=False, **given)
    loss = WEIGHT * output.aux_loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainable(stage).items() if p.grad is not None}


def close(found: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Gradients of some 40 operations in a row, each rounded, and of routers' products in another order of sums."""
    largest = max(float(gradient.abs().max()) for gradient in right.values())
    return all(float((found[n] - gradient).abs().max()) <= 200 * 2**-24 * largest for n, gradient in right.items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_unsplit_models(folders: dict[str, Path], kind: str) -> None:
    right, gradients = of_transformers(folders[kind])
    assert any(".layers.0." in name for name in gradients)
    assert not any(".layers.2.mlp" in name for name in gradients)  # nothing behind the last router
    found = []
    for cuts in CUTS:
        stages = stages_of(folders[kind], cuts)
        loss, own = run(stages, [RouterLoss(stage, WEIGHT) for stage in stages])
        assert loss == pytest.approx(float(right), rel=4 * 2**-24)
        assert own.keys() >= gradients.keys()
        assert close(own, gradients)
        assert all(not own[name].any() for name in own.keys() - gradients.keys())
        found.append((loss, own))
    whole = found[0][1]
    assert all(loss == found[0][0] for loss, _ in found)
    assert all(torch.equal(own[name], gradient) for _, own in found for name, gradient in whole.items() if name in own)


def test_padding_does_not_choose(folders: dict[str, Path]) -> None:
    """As transformers with an attention mask; causal attention keeps padding on the right from the tokens before it."""
    mask = (torch.arange(12) < LENGTHS[:, None]).long()
    right, gradients = of_transformers(folders["mixtral"], mask)
    for cuts in CUTS:
        stages = stages_of(folders["mixtral"], cuts)
        loss, own = run(stages, [RouterLoss(stage, WEIGHT) for stage in stages], LENGTHS)
        assert loss == pytest.approx(float(right), rel=4 * 2**-24)
        assert close(own, gradients)
    full, _ = of_transformers(folders["mixtral"])
    assert abs(full - right) > 1e-3


def test_packed_documents_choose_as_each_does_alone(folders: dict[str, Path]) -> None:
    """Two documents in each row and padding behind them: the loss and gradients of transformers' function of the routers'
    logits that the documents have by themselves."""
    documents, padding = (5, 4), 3
    positions = torch.cat([torch.arange(n) for n in (*documents, padding)]).expand(2, -1)
    (whole,) = stages_of(folders["mixtral"], [0, LAYERS])
    alone: list[list[Tensor]] = []
    for row in token_ids():
        for ids in row.split([*documents, padding])[:-1]:
            logits = whole.model(input_ids=ids[None], output_router_logits=True, use_cache=False).router_logits
            alone.append(list(logits))
    together = tuple(torch.cat(of_layer) for of_layer in zip(*alone, strict=True))
    right = WEIGHT * load_balancing_loss_func(together, whole.model.num_experts, whole.model.num_experts_per_tok)
    right.backward()
    gradients = {n: p.grad for n, p in trainable(whole).items() if p.grad is not None}
    for cuts in CUTS:
        stages = stages_of(folders["mixtral"], cuts)
        routers = [RouterLoss(stage, WEIGHT) for stage in stages]
        loss, own = run(stages, routers, torch.full((2,), sum(documents)), positions)
        assert loss == pytest.approx(float(right), rel=4 * 2**-24)
        assert close(own, gradients)


def test_what_travels_behind_the_hidden_state_is_counted() -> None:
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(hidden_size=8)),
        parts=SimpleNamespace(streams=1),
        num_experts=4,
        dtype=torch.bfloat16,
    )
    packed = pack(torch.zeros(2, 5, 8, dtype=torch.bfloat16), torch.zeros(2 * 4 + 1 + 2))
    assert router_loss.bytes_behind(model, 2) == packed.nbytes - 2 * 5 * 8 * 2


@pytest.mark.parametrize("level", only([RecomputeLevel.INPUT, RecomputeLevel.PROJECTIONS], RecomputeLevel))
def test_a_layer_that_is_computed_again_counts_once(folders: dict[str, Path], level: RecomputeLevel) -> None:
    plain = stages_of(folders["mixtral"], [0, 1, 3])
    right, gradients = run(plain, [RouterLoss(stage, WEIGHT) for stage in plain])
    stages = stages_of(folders["mixtral"], [0, 1, 3])
    for stage in stages:
        activation.apply(stage, dict.fromkeys(stage.layer_indices, ActivationPolicy(level, False)))
    routers = [RouterLoss(stage, WEIGHT) for stage in stages]
    loss, own = run(stages, routers)
    assert loss == right
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())
    measured = {tag: value for one in routers for tag, value in one.measured().items()}
    assert measured["train/router_loss"] * WEIGHT == pytest.approx(float(right))
    for layer in range(LAYERS):
        most, least = measured[f"expert_load/{layer}/most"], measured[f"expert_load/{layer}/least"]
        assert 0 <= least <= 1 <= most <= 2  # each token goes to 2 of 4: no expert has more than all of them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_numbers_travel_exactly_both_ways(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(37, generator=generator) * 10 ** torch.linspace(-2, 5, 37)).requires_grad_()
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype).requires_grad_()
    packed = pack(hidden, values, SCALE)
    assert packed.dtype == dtype
    leaf = packed.detach().requires_grad_()
    back, found = unpack(leaf, 5, 37, SCALE)
    assert torch.equal(back, hidden)
    assert torch.equal(found, values)
    weights = torch.rand(37, generator=generator) * 1e-7
    (found @ weights + back.float().square().sum()).backward()
    packed.backward(leaf.grad)
    assert torch.equal(values.grad, weights)
    assert torch.equal(hidden.grad, (2 * hidden.detach().float()).to(dtype))


def test_nothing_is_changed_outside_training(folders: dict[str, Path]) -> None:
    stages = stages_of(folders["mixtral"], [0, 1, 3])
    for stage in stages:
        RouterLoss(stage, WEIGHT)
        stage.eval()
    given, positions = stages[0]((token_ids(), torch.arange(12).expand(2, 12)))
    assert given.shape == (2, 12, 32)
    assert stages[1]((given, positions)).shape == (2, 12, 32)


def test_which_weight_counts(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = folders["mixtral"]
    plan = resolve.resolve(config_of(folder, 2))
    assert plan.router_loss == WEIGHT
    assert "routers:  0.5 times their load-balancing loss, by config.json" in capsys.readouterr().out
    assert resolve.resolve(config_of(folder, load_balancing_loss_coef=0.1)).router_loss == 0.1
    assert resolve.resolve(config_of(folder, load_balancing_loss_coef=0)).router_loss == 0
    assert "without their load-balancing loss, which config.json asks for" in capsys.readouterr().out


def test_a_model_without_such_a_loss(tmp_path: Path) -> None:
    save_mixture(tmp_path, "deepseek_v3")
    assert router_loss.recorder(empty_model(read_model_config(str(tmp_path)), torch.float32, None)) is None
    with pytest.raises(UserError, match="transformers has no loss of the routers of model_type 'deepseek_v3'"):
        resolve.resolve(config_of(tmp_path, load_balancing_loss_coef=0.1))


def test_another_loss_than_ours_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_model_config(str(folders["mixtral"]))
    cut_check.check(config, [(0, 1), (1, 3)], router_loss=True)
    sums = RouterLoss._sums
    monkeypatch.setattr(
        RouterLoss, "_sums", lambda self, layer, logits, kept: 1.01 * sums(self, layer, logits, kept) ** 1.5
    )
    with pytest.raises(UserError, match=r"computes the loss of its routers in a way this program does not know"):
        cut_check.check(config, [(0, 1), (1, 3)], router_loss=True)
