"""What preference training measures: TRL's names, means over tokens against plain logits, terms of a mixture."""

import inspect
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from pipeline.kernels.cross_entropy import LogitTransform
from torch import Tensor, nn

from pipeline.objectives.preference import Preference, StepTotals
from pipeline.objectives.preference_losses import LOSSES, Mixture, Settings

SLOTS, UNITS, TOKENS, WIDTH, VOCABULARY = 2, 3, 7, 8, 30
SCALE = 0.5


def preference(**weights: float) -> Preference:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return Preference(head, LogitTransform(SCALE), Mixture(weights, Settings()), SLOTS, StepTotals())


def given() -> tuple[Tensor, dict[str, Any]]:
    """Hidden states and labels of units, the last of which is filler."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SLOTS * UNITS, TOKENS, WIDTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (SLOTS * UNITS, TOKENS), generator=generator)
    for row, (start, end) in enumerate([(2, 7), (3, 5), (0, 0), (2, 4), (3, 7), (0, 0)]):
        labels[row, :start] = labels[row, end:] = -100
    return hidden, {
        "labels": labels,
        "loss_scale": torch.tensor(0.5),
        "unit_scale": torch.tensor(0.5),
        "reference": torch.full((SLOTS, UNITS), -10.0),
        "desirable": torch.zeros(UNITS, dtype=torch.bool),
    }


def shown(objective: Preference) -> dict[str, float]:
    hidden, tensors = given()
    sums = objective.row_sums(hidden, tensors)
    assert set(sums) == set(objective.measures)
    return objective.means({name: float(column.double().sum()) for name, column in sums.items()}, 0)


def test_trls_metrics_are_all_there() -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    theirs = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', inspect.getsource(DPOTrainer._compute_loss)))
    assert {"rewards/margins", "entropy", "logits/chosen"} <= theirs
    ours = shown(preference(sigmoid=1.0))
    assert theirs - ours.keys() == {"aux_loss", "num_tokens"}, "the routers' loss and tokens_per_s say these"


def test_means_over_tokens_are_those_of_the_logits() -> None:
    objective = preference(sigmoid=1.0)
    hidden, tensors = given()
    assert objective.head is not None
    logits = (objective.head(hidden) * SCALE).double()[:, :-1]
    labels = tensors["labels"][:, 1:]
    there = labels != -100
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    chosen = torch.arange(SLOTS * UNITS)[:, None] < UNITS
    right = logits.argmax(-1) == labels
    found = shown(objective)
    assert found["entropy"] == pytest.approx(float(entropy[there].mean()), rel=1e-5)
    assert found["logits/chosen"] == pytest.approx(float(logits.mean(-1)[there & chosen].mean()), rel=1e-4)
    assert found["logits/rejected"] == pytest.approx(float(logits.mean(-1)[there & ~chosen].mean()), rel=1e-4)
    assert found["mean_token_accuracy"] == pytest.approx(float(right[there & chosen].double().mean()))


def test_the_terms_of_a_mixture_add_up() -> None:
    found = shown(preference(sigmoid=0.7, ipo=0.1, sft=0.25))
    parts = [found[f"loss/{name}/weighted"] for name in ("sigmoid", "ipo", "nll")]
    assert found["loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert found["loss/sigmoid/weighted"] == pytest.approx(0.7 * found["loss/sigmoid"])
    assert not [name for name in shown(preference(sigmoid=0.7)) if name.startswith("loss/")]


def test_a_step_that_is_not_logged_measures_no_logits() -> None:
    objective = preference(sigmoid=1.0)
    hidden, tensors = given()
    for logged in (False, True):
        objective.step.begin(0.0, logged)
        objective.loss(hidden, tensors)
        found = objective.means(objective.step.taken(), 0)
        assert ("entropy" in found) == logged
        assert found["rewards/chosen"]


@pytest.mark.parametrize("name", LOSSES)
def test_neither_the_order_of_units_nor_padding_changes_anything(name: str) -> None:
    """Sums are taken in another order, which rounds otherwise; of each row the gradient stays, and padding has none."""
    objective = replace(preference(), mixture=Mixture({name: 1.0}, Settings(label_smoothing=1e-3)))
    hidden, tensors = given()
    tensors["desirable"] = torch.tensor([True, False, False])
    order = torch.tensor([2, 0, 1])
    rows = (torch.arange(SLOTS)[:, None] * UNITS + order).flatten()
    moved = {**tensors, "labels": nn.functional.pad(tensors["labels"][rows], (0, 4), value=-100)}
    moved |= {"reference": tensors["reference"][:, order], "desirable": tensors["desirable"][order]}
    other = nn.functional.pad(hidden[rows], (0, 0, 0, 4), value=3.0)
    hidden.requires_grad_()
    other.requires_grad_()
    losses = objective.loss(hidden, tensors), objective.loss(other, moved)
    torch.testing.assert_close(*losses, rtol=8 * 2**-24, atol=0)
    mine, theirs = (torch.autograd.grad(loss, of)[0] for loss, of in zip(losses, (hidden, other), strict=True))
    torch.testing.assert_close(theirs[:, :TOKENS], mine[rows], rtol=32 * 2**-24, atol=2**-24 * float(mine.abs().max()))
    assert not theirs[:, TOKENS:].any()
