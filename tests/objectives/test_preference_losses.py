"""The losses of preference training against TRL's own functions, the paper's formulas, and where policy and reference agree."""

import inspect
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from pipeline.objectives.preference_losses import LOSSES, Batch, Mixture, Settings
from tests.helpers.trl_losses import cpo_trainer, dpo_loss, kto_loss, orpo_trainer

PAIRED = [name for name, loss in LOSSES.items() if loss.data == "preference" and (loss.reference or name == "sft")]
OF_TRL = [name for name in PAIRED if name != "cdpo"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def drawn(slots: int, units: int, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Log-probabilities a token, of rows of 1 to 9 tokens, and the reference's sums, which are near."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 10, (slots, units), generator=generator)
    rows = [[-3 * torch.rand(int(n), generator=generator, dtype=torch.float64) for n in row] for row in tokens]
    noise = 2 * torch.randn(slots, units, generator=generator, dtype=torch.float64)
    policy = torch.stack([torch.stack([row.sum() for row in of_slot]) for of_slot in rows])
    desirable = torch.rand(units, generator=generator) > 0.4
    return {
        "policy": policy.to(dtype, copy=True).requires_grad_(),
        "reference": (policy + noise).to(dtype),
        "tokens": tokens,
        "desirable": desirable,
    }


def ours(weights: dict[str, float], settings: Settings, given: dict[str, Any]) -> Tensor:
    """A step of one micro-batch."""
    mixture = Mixture(weights, settings)
    loss = mixture.per_unit(Batch(**given, settings=settings)).mean()
    return loss - mixture.nll * given["policy"][0].sum() / given["tokens"][0].sum()


def agree(mine: Tensor, theirs: Tensor, given: dict[str, Any], other: Tensor) -> None:
    """Equal, and equal in what they give back to each row's sum."""
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    gradient = torch.autograd.grad(mine, given["policy"], allow_unused=True, retain_graph=True)[0]
    expected = torch.autograd.grad(theirs, other, allow_unused=True)[0]
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def test_every_loss_that_trl_has_is_compared_with_it() -> None:
    theirs = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert theirs == set(OF_TRL)
    assert len(theirs) == 15
    assert set(LOSSES) - theirs == {
        *("cdpo", "plackett_luce"),  # not in TRL
        *("simpo", "cpo", "orpo", "kto", "apo_zero_unpaired"),  # of its other trainers
    }


@pytest.mark.parametrize("name", OF_TRL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_loss_and_its_gradient_are_trls(name: str, dtype: torch.dtype) -> None:
    for seed, beta, smoothing in itertools.product(range(3), (0.02, 0.1, 0.5), (1e-3, 0.2)):
        settings = Settings(beta=beta, label_smoothing=smoothing)
        given = drawn(2, 5, seed, dtype)
        theirs, other = dpo_loss([name], [1.0], settings, given)
        agree(ours({name: 1.0}, settings, given), theirs, given, other)


@pytest.mark.parametrize("name", OF_TRL)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_are_trls(name: str, divergence: Any) -> None:
    """Where they change the loss, and where they do not."""
    dtype = torch.float32 if divergence == "alpha_divergence" else torch.float64  # TRL's has no table for fp64
    settings = Settings(label_smoothing=0.1, divergence=divergence, alpha=0.7)
    given = drawn(2, 4, 7, dtype)
    theirs, other = dpo_loss([name], [1.0], settings, given)
    agree(ours({name: 1.0}, settings, given), theirs, given, other)


@pytest.mark.parametrize("name", [name for name in PAIRED if LOSSES[name].by_divergence])
def test_alpha_divergences_are_their_formula(name: str) -> None:
    """In fp64, where TRL has none: f'(t) = (t^(α−1) − 1)/(α − 1) is 1 − 1/t at α = 0, its forward KL, and log t at α = 1; between
    them, what the loss makes of scores that are given."""
    given = drawn(2, 4, 7)

    def of(divergence: Any, alpha: float = 0.5) -> Tensor:
        return ours({name: 1.0}, Settings(label_smoothing=0.1, divergence=divergence, alpha=alpha), given)

    agree(of("alpha_divergence", 0.0), of("forward_kl"), given, given["policy"])
    agree(of("alpha_divergence", 1.0), of("reverse_kl"), given, given["policy"])
    ratios = given["policy"] - given["reference"]
    as_scores = {**given, "policy": (torch.exp(-0.3 * ratios) - 1) / -0.3, "reference": torch.zeros_like(ratios)}
    agree(
        of("alpha_divergence", 0.7), ours({name: 1.0}, Settings(label_smoothing=0.1), as_scores), given, given["policy"]
    )


def test_a_divergence_changes_only_the_losses_that_say_so() -> None:
    given, plain = drawn(2, 4, 7), Settings(label_smoothing=0.1)
    other = Settings(label_smoothing=0.1, divergence="forward_kl")
    changed = {name for name in PAIRED if not torch.equal(*(ours({name: 1.0}, s, given) for s in (plain, other)))}
    assert changed == {name for name, loss in LOSSES.items() if loss.by_divergence}


def test_label_smoothing_changes_only_the_losses_that_say_so() -> None:
    given = drawn(2, 4, 7)
    settings = [Settings(label_smoothing=smoothing) for smoothing in (0.1, 0.2)]
    names = [name for name, loss in LOSSES.items() if loss.data == "preference"]
    changed = {name for name in names if not torch.equal(*(ours({name: 1.0}, s, given) for s in settings))}
    assert changed == {name for name, loss in LOSSES.items() if loss.smoothed}


def test_a_mixture_is_trls() -> None:
    weights = {"sigmoid": 1.0, "bco_pair": 0.3, "sft": 0.1}
    given = drawn(2, 6, 11)
    theirs, other = dpo_loss(list(weights), list(weights.values()), Settings(), given)
    agree(ours(weights, Settings(), given), theirs, given, other)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired_losses_are_trls(name: str) -> None:
    for seed in range(4):
        settings = Settings(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
        given = drawn(2, 6, seed)
        theirs, other = kto_loss(name, settings, given)
        gradient = torch.autograd.grad(ours({name: 1.0}, settings, given), given["policy"])[0]
        torch.testing.assert_close(ours({name: 1.0}, settings, given), theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[0], torch.autograd.grad(theirs, other)[0], rtol=1e-12, atol=1e-12)
        assert not gradient[1].any(), "the mismatched rows only shift"


@pytest.mark.parametrize(("name", "theirs"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_losses_without_a_reference_are_trls(name: str, theirs: str) -> None:
    settings = Settings(beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, cpo_alpha=0.0)
    given = drawn(2, 5, 3)
    sums = given["policy"] / given["tokens"] if name == "simpo" else given["policy"]
    expected = cpo_trainer(theirs, settings).cpo_loss(sums[0], sums[1])[0].mean()
    agree(ours({name: 1.0}, settings, given), expected, given, given["policy"])
    with_likelihood = ours({"cpo": 1.0}, Settings(cpo_alpha=0.5), given)
    mixed = ours({"cpo": 1.0, "sft": 0.5}, Settings(cpo_alpha=0.0), given)
    torch.testing.assert_close(with_likelihood, mixed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_orpo_is_trls_with_the_completions_likelihood(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # TRL's casts to fp32
    settings = Settings(beta=0.2)
    given = drawn(2, 5, 3, dtype)
    means = given["policy"] / given["tokens"]
    odds = -orpo_trainer(settings).odds_ratio_loss(means[0], means[1])[0].mean()
    expected = odds - given["policy"][0].sum() / given["tokens"][0].sum()
    agree(ours({"orpo": 1.0}, settings, given), expected, given, given["policy"])


def test_orpo_has_a_gradient_on_both_sides_of_the_branch() -> None:
    """log(1 − e^x) by both branches, against fp64 by the odds themselves, of per-token means near 0 and near 1."""
    given = drawn(2, 4, 0)
    given["policy"] = torch.tensor([[-1e-7, -3.0, -0.69, -40.0], [-2.0, -1e-6, -0.7, -0.1]], dtype=torch.float64)
    given["policy"].requires_grad_()
    given["tokens"] = torch.ones_like(given["tokens"])
    loss = ours({"orpo": 1.0}, Settings(), given)
    p = given["policy"].exp()
    naive = -0.1 * torch.log((p[0] / (1 - p[0])) / (p[0] / (1 - p[0]) + p[1] / (1 - p[1]))).mean() - p[0].log().mean()
    torch.testing.assert_close(loss, naive, rtol=1e-7, atol=1e-7)
    assert torch.autograd.grad(loss, given["policy"])[0].isfinite().all()


def test_plackett_luce_over_two_is_sigmoid_and_sums_to_one_over_orders() -> None:
    given = drawn(2, 4, 5)
    assert torch.equal(
        ours({"plackett_luce": 1.0}, Settings(), given).round(decimals=14),
        ours({"sigmoid": 1.0}, Settings(), given).round(decimals=14),
    )
    given, settings = drawn(4, 3, 6), Settings(beta=0.7)
    probability = torch.zeros(3, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        batch = Batch(
            **{key: value[list(order)] if value.shape[0] == 4 else value for key, value in given.items()},
            settings=settings,
        )
        probability += torch.exp(-LOSSES["plackett_luce"].per_unit(batch).detach())  # type: ignore[misc]
    torch.testing.assert_close(probability, torch.ones_like(probability))


def test_plackett_luce_is_the_product_of_choices() -> None:
    """Π_k e^{s_k} / Σ_{j ≥ k} e^{s_j}: the best of all, the next best of the rest, and so on; s = β·Δ."""
    given, settings = drawn(4, 3, 6), Settings(beta=0.7)
    odds = torch.exp(settings.beta * (given["policy"] - given["reference"]))
    chosen = [odds[k] / odds[k:].sum(0) for k in range(4)]
    agree(
        ours({"plackett_luce": 1.0}, settings, given), -torch.stack(chosen).prod(0).log().mean(), given, given["policy"]
    )


def test_cdpo_is_robust_before_its_correction() -> None:
    given, smoothing = drawn(2, 4, 8), 0.2
    settings = Settings(label_smoothing=smoothing)
    plain, flipped = Settings(), {**given, "policy": given["policy"].flip(0), "reference": given["reference"].flip(0)}
    mixed = (1 - smoothing) * ours({"sigmoid": 1.0}, plain, given) + smoothing * ours({"sigmoid": 1.0}, plain, flipped)
    agree(ours({"cdpo": 1.0}, settings, given), mixed, given, given["policy"])


AT_THE_REFERENCE = {
    "sigmoid": math.log(2), "hinge": 1, "ipo": 25, "exo_pair": 2.7612, "nca_pair": 2 * math.log(2), "robust": math.log(2),
    "cdpo": math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 50, "aot": math.log(2), "aot_unpaired": math.log(2),
    "apo_zero": 1, "apo_down": 1, "discopop": 0.8466, "sigmoid_norm": math.log(2), "plackett_luce": math.log(6), "kto": 0.5,
    "apo_zero_unpaired": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reference])
def test_losses_where_policy_and_reference_agree(name: str) -> None:
    """Known numbers at β = 0.1 (ε = 1e-3 where there is smoothing), whatever the log-probabilities."""
    slots = 3 if name == "plackett_luce" else 2
    given = drawn(slots, 5, 1)
    given["reference"] = given["policy"].detach().clone()
    settings = Settings(label_smoothing=1e-3 if name == "exo_pair" else 0.0)
    if name == "aot_unpaired":
        given["policy"] = given["policy"].detach()[:1].expand(2, -1)
        given["reference"] = given["policy"]
    loss = LOSSES[name].per_unit(Batch(**given, settings=settings))  # type: ignore[misc]
    torch.testing.assert_close(loss, torch.full_like(loss, AT_THE_REFERENCE[name]), rtol=0, atol=5e-5)


def test_nothing_but_real_units_is_needed() -> None:
    """A micro-batch of filler alone has no units: a loss of 0 with a gradient of 0, in every loss."""
    for name, loss in LOSSES.items():
        policy = torch.zeros(3, 2, requires_grad=True)
        none = torch.tensor([False, False])
        mixture = Mixture({name: 1.0}, Settings(label_smoothing=0.1))
        batch = Batch(
            policy[:, none], torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(0, dtype=bool), mixture.settings
        )
        if loss.data != "ranked":
            batch = Batch(
                *(t[:2] for t in (batch.policy, batch.reference, batch.tokens)), batch.desirable, batch.settings
            )
        total = mixture.per_unit(batch).sum() - mixture.nll * batch.policy[0].sum()
        assert float(total) == 0
        assert not torch.autograd.grad(total, policy)[0].any(), name


def test_a_mixture_says_what_it_needs() -> None:
    assert Mixture({"sft": 1.0, "orpo": 2.0}, Settings()).nll == 3.0
    assert not Mixture({"simpo": 1.0}, Settings()).reads_reference
    assert Mixture({"sft": 1.0, "ipo": 1.0}, Settings()).reads_reference
    assert Mixture({"kto": 1.0}, Settings()).data == "unpaired"
