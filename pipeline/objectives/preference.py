"""Preference training on the last stage: the losses of `preference_losses.py` over units of rows, and what is measured of them.

A micro-batch's B rows are U units of S rows, slot after slot (data/microbatch.py); units of filler have no targets and take
part in nothing. The loss of a step is the mean over its units, and the likelihood's part (`sft`, and within ORPO and CPO) the
mean over the targets of their first rows, however the units fall into micro-batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.kernels.cross_entropy import LogitTransform
from pipeline.objectives.objective import Tensors
from pipeline.objectives.preference_losses import LOSSES, Batch, Mixture
from pipeline.objectives.rows import log_probs, token_facts

PAIRS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
COUNTS = ("units", "losses", "log-likelihood", "targets")
RATED = ("desirable", "desirable rewards", "undesirable rewards", "desirable logps", "undesirable logps", "kl")
# Of tokens: TRL's names, and what each is a mean over.
OVER = {
    "entropy": "answers' tokens",
    "logits/chosen": "targets",
    "logits/rejected": "rejected tokens",
    "mean_token_accuracy": "targets",
}
OF_TOKENS = (*OVER, "answers' tokens", "rejected tokens")


@dataclass
class StepTotals:
    """What was measured of the micro-batches of a step so far, summed; on the last stage. `progress`: the part of the run that
    was done before it. `logged`: whether what costs something to measure is to be measured, too."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0
    logged: bool = True

    def begin(self, progress: float, logged: bool = True) -> None:
        """A step begins."""
        self.sums, self.progress, self.logged = {}, progress, logged

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Of one more micro-batch: [U] each."""
        for name, column in columns.items():
            self.sums[name] = self.sums.get(name, 0.0) + column.detach().double().sum()

    def taken(self) -> dict[str, float]:
        """The sums, which begin anew."""
        sums, self.sums = self.sums, {}
        return {name: float(value) for name, value in sums.items()}


@dataclass(frozen=True)
class Preference:
    """An `Objective`. `head`: None on stages that compute no loss. `step`: what training measures on its way. `beside`: takes the
    reference's normed hidden state [B, T, D] of the micro-batch that has just run, where it runs in every step."""

    head: nn.Linear | None
    transform: LogitTransform
    mixture: Mixture
    slots: int
    step: StepTotals
    beside: Callable[[], Tensor] | None = None

    reads: ClassVar[tuple[str, ...]] = ("labels", "loss_scale", "unit_scale", "reference", "desirable")

    @property
    def first_reads(self) -> tuple[str, ...]:
        """By marks stages know that the reference runs, too."""
        return ("marks",) if self.beside else ()

    @property
    def measures(self) -> tuple[str, ...]:
        """Columns that `means` knows how to read, TRL's names where it has them."""
        of_data = RATED if self.mixture.data == "unpaired" else PAIRS + OF_TOKENS
        return (*COUNTS, *of_data, *map(_term, self.terms))

    @property
    def terms(self) -> tuple[str, ...]:
        """The losses that are added, where there are several; but for likelihoods, which are of tokens."""
        several = len(self.mixture.weights) > 1
        return tuple(name for name in self.mixture.weights if several and LOSSES[name].per_unit is not None)

    def loss(self, hidden_BTD: Tensor, given: Tensors) -> Tensor:
        """fp32 scalar: unit_scale · Σ units' losses − weight of the likelihood · loss_scale · Σ log p of first rows."""
        batch, real_U = self._batch(hidden_BTD, given)
        losses = self.mixture.per_unit(batch)
        self.step.add(self._columns(batch, losses))
        if self.step.logged:
            self.step.add(self._of_tokens(hidden_BTD, given, batch, real_U))
        likelihood = self.mixture.nll * given["loss_scale"] * batch.policy[0].sum()
        return losses.sum() * given["unit_scale"] - likelihood

    def row_sums(self, hidden_BTD: Tensor, given: Tensors) -> dict[str, Tensor]:
        """fp32 [U] for each of `measures`; 0 for filler."""
        batch, real_U = self._batch(hidden_BTD, given)
        columns = self._columns(batch, self.mixture.per_unit(batch))
        columns |= self._of_tokens(hidden_BTD, given, batch, real_U)
        empty_U = torch.zeros(len(real_U), device=real_U.device)
        return {name: empty_U.masked_scatter(real_U, columns[name]) for name in self.measures}

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        """'loss', and TRL's metrics, of columns summed over a step or a set."""
        units, words = max(1.0, totals["units"]), self.mixture.nll / max(1.0, totals["targets"])
        found = {"loss": totals["losses"] / units - words * totals["log-likelihood"]}
        for name in self.terms:
            found[f"loss/{name}"] = totals[_term(name)] / units
            found[f"loss/{name}/weighted"] = self.mixture.weights[name] * found[f"loss/{name}"]
        if self.mixture.nll and len(self.mixture.weights) > 1:
            found["loss/nll"] = -totals["log-likelihood"] / max(1.0, totals["targets"])
            found["loss/nll/weighted"] = self.mixture.nll * found["loss/nll"]
        if self.mixture.data != "unpaired":
            found |= {name: totals[name] / units for name in PAIRS}
            return found | {name: totals[name] / max(1.0, totals[of]) for name, of in OVER.items() if name in totals}
        good, bad = totals["desirable"], units - totals["desirable"]
        found["kl"] = totals["kl"] / units
        for side, name, count in (("chosen", "desirable", good), ("rejected", "undesirable", bad)):
            if count:
                found |= {f"{kind}/{side}": totals[f"{name} {kind}"] / count for kind in ("rewards", "logps")}
        if good and bad:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def _batch(self, hidden_BTD: Tensor, given: Tensors) -> tuple[Batch, Tensor]:
        """The real units, and which of all they are, bool [U]."""
        assert self.head is not None, "only the last stage computes a loss"
        sums_B, counts_B = log_probs(hidden_BTD, given["labels"], self.head, self.transform)
        sums_SU, counts_SU = sums_B.view(self.slots, -1), counts_B.view(self.slots, -1)
        real_U = counts_SU[0] > 0
        reference_SU = given["reference"]
        if self.beside is not None:
            with torch.no_grad():
                reference_SU = log_probs(self.beside(), given["labels"], self.head, self.transform)[0].view_as(sums_SU)
        batch = Batch(
            sums_SU[:, real_U],
            reference_SU[:, real_U],
            counts_SU[:, real_U],
            given["desirable"][real_U],
            self.mixture.settings,
        )
        return batch, real_U

    @torch.no_grad()
    def _columns(self, batch: Batch, losses_U: Tensor) -> dict[str, Tensor]:
        """fp32 [U] each. Of ranked answers the chosen is the best, the rejected the mean of the others; accurate is a unit whose
        best has the largest reward."""
        first_U, rewards = batch.policy[0], batch.rewards
        found = {"units": torch.ones_like(first_U), "losses": losses_U, "log-likelihood": first_U}
        found["targets"] = batch.tokens[0].to(first_U)
        found |= {_term(name): LOSSES[name].per_unit(batch) for name in self.terms}  # type: ignore[misc]
        if self.mixture.data == "unpaired":
            good = batch.desirable.to(first_U)
            shift = batch.ratios[1].mean().clamp(min=0) if len(first_U) else first_U.sum()
            rated = (good, good * rewards[0], (1 - good) * rewards[0], good * first_U, (1 - good) * first_U)
            return found | dict(zip(RATED, (*rated, shift.expand_as(first_U)), strict=True))
        others, rest_U = rewards[1:], batch.policy[1:].mean(dim=0)
        right = (rewards[0] > others.max(dim=0).values).to(first_U)
        margin = rewards[0] - others.mean(dim=0)
        paired = (rewards[0], others.mean(dim=0), right, margin, first_U, rest_U)
        return found | dict(zip(PAIRS, paired, strict=True))

    def _of_tokens(self, hidden_BTD: Tensor, given: Tensors, batch: Batch, real_U: Tensor) -> dict[str, Tensor]:
        """fp32 [U] each: sums over tokens. Of ranked answers the rejected are all but the best.

        It takes another product of the head."""
        if self.mixture.data == "unpaired":
            return {}
        assert self.head is not None, "only the last stage computes a loss"
        facts = token_facts(hidden_BTD, given["labels"], self.head, self.transform)
        entropy_SU, logits_SU, right_SU = (fact_B.view(self.slots, -1)[:, real_U] for fact_B in facts)
        tokens_SU = batch.tokens.to(entropy_SU)
        return {
            "entropy": entropy_SU.sum(0),
            "answers' tokens": tokens_SU.sum(0),
            "logits/chosen": logits_SU[0],
            "logits/rejected": logits_SU[1:].sum(0),
            "rejected tokens": tokens_SU[1:].sum(0),
            "mean_token_accuracy": right_SU[0],
        }


def _term(name: str) -> str:
    return f"loss {name}"
