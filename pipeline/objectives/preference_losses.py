"""Losses of preference training, as functions of the log-probabilities of completions: nothing here knows a model.

Takes, for U units of S rows each (slots: chosen, rejected; ranked answers, best first; a rated answer and a mismatched one),
the sums of log-probabilities under the policy and the reference; gives each unit's loss. Names and meanings are TRL's
(1.16), which are tested against its own code; what TRL has not is by the formula of its paper.

With Δ = log π(y|x) − log π_ref(y|x) of a row, h = Δ_chosen − Δ_rejected, n a row's tokens and σ the logistic function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Data = Literal["preference", "unpaired", "ranked"]
HIGHEST = 80.0  # exponent that fp32 still holds, as TRL limits the α-divergence's


@dataclass(frozen=True)
class Settings:
    """Numbers of the losses, under TRL's names. `divergence`, `alpha`: f_divergence_type, f_alpha_divergence_coef."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Real units of a micro-batch: `policy`, `reference` [S, U] sums over a row's targets, of which there are `tokens` [S, U].

    `desirable` [U]: of unpaired data, whether the answer is to become likelier.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    desirable: Tensor
    settings: Settings

    @cached_property
    def ratios(self) -> Tensor:
        """Δ, [S, U]."""
        return self.policy - self.reference

    @cached_property
    def scores(self) -> Tensor:
        """f'(e^Δ) of the f-divergence, [S, U]: Δ itself for the reverse KL."""
        ratios, kind = self.ratios, self.settings.divergence
        if kind == "forward_kl":
            return 1 - torch.exp(-ratios)
        if kind == "js_divergence":
            return math.log(2) + logsigmoid(ratios)
        power = self.settings.alpha - 1
        if kind == "alpha_divergence" and abs(power) >= 1e-6:
            return (torch.exp((power * ratios).clamp(max=HIGHEST)) - 1) / power
        return ratios

    @property
    def margin(self) -> Tensor:
        """β·h by the divergence, [U]."""
        return self.settings.beta * (self.scores[0] - self.scores[1])

    @property
    def mean_margin(self) -> Tensor:
        """As h of per-token means, [U], without β."""
        means = self.scores / self.tokens.clamp(min=1)
        return means[0] - means[1]

    @property
    def rewards(self) -> Tensor:
        """β·Δ, [S, U]: implicit rewards, of which no divergence is taken."""
        return self.settings.beta * self.ratios

    @property
    def means(self) -> Tensor:
        """The policy's log-probability a token, [S, U]."""
        return self.policy / self.tokens.clamp(min=1)


PerUnit = Callable[[Batch], Tensor]


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(m) − ε·log σ(−m)."""
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def sigmoid(b: Batch) -> Tensor:
    """−log σ(βh): DPO, arXiv 2305.18290."""
    return -logsigmoid(b.margin)


def hinge(b: Batch) -> Tensor:
    """max(0, 1 − βh): SLiC 2305.10425, RSO 2309.06657."""
    return torch.relu(1 - b.margin)


def ipo(b: Batch) -> Tensor:
    """(h̄ − 1/(2β))² of per-token means: IPO 2310.12036, eq. 17."""
    return (b.mean_margin - 1 / (2 * b.settings.beta)) ** 2


def exo_pair(b: Batch) -> Tensor:
    """KL(q ‖ (1 − ε, ε)), q = σ(βh): EXO 2402.00856, eq. 16. ε must be above 0."""
    smoothing = b.settings.label_smoothing
    better, worse = logsigmoid(b.margin), logsigmoid(-b.margin)
    return better.exp() * (better - math.log1p(-smoothing)) + worse.exp() * (worse - math.log(smoothing))


def nca_pair(b: Batch) -> Tensor:
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l): NCA 2402.05369."""
    chosen, rejected = b.rewards
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(b: Batch) -> Tensor:
    """(−(1 − ε)·log σ(βh) + ε·log σ(−βh)) / (1 − 2ε): 2403.00409; ε the share of wrong labels, below ½."""
    smoothing = b.settings.label_smoothing
    return (-(1 - smoothing) * logsigmoid(b.margin) + smoothing * logsigmoid(-b.margin)) / (1 - 2 * smoothing)


def cdpo(b: Batch) -> Tensor:
    """−(1 − ε)·log σ(βh) − ε·log σ(−βh): conservative DPO, what label_smoothing did to TRL's sigmoid before 1.0."""
    return _smoothed(b.margin, b.settings.label_smoothing)


def bco_pair(b: Batch) -> Tensor:
    """−log σ(r_w) − log σ(−r_l): BCO 2404.04656, with its moving shift δ = 0, as TRL has it now."""
    chosen, rejected = b.rewards
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(b: Batch) -> Tensor:
    """(Δ_w − 1/(2β))² + (Δ_l + 1/(2β))²: SPPO 2405.00675, with a certain winner."""
    chosen, rejected = b.ratios
    half = 0.5 / b.settings.beta
    return (chosen - half) ** 2 + (rejected + half) ** 2


def aot(b: Batch) -> Tensor:
    """Distributional alignment 2406.05882: sorted policy margins against sorted reference margins, of the micro-batch."""
    policy, reference = (row[0] - row[1] for row in (b.policy, b.reference))
    margins = b.settings.beta * (policy.sort().values - reference.sort().values)
    return _smoothed(margins, b.settings.label_smoothing)


def aot_unpaired(b: Batch) -> Tensor:
    """As `aot`, of sorted chosen against sorted rejected Δ."""
    chosen, rejected = (row.sort().values for row in b.ratios)
    return _smoothed(b.settings.beta * (chosen - rejected), b.settings.label_smoothing)


def apo_zero(b: Batch) -> Tensor:
    """1 − σ(r_w) + σ(r_l): APO 2408.06266, eq. 7, where the chosen are better than the model."""
    chosen, rejected = b.rewards
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(b: Batch) -> Tensor:
    """σ(r_w) + 1 − σ(r_w − r_l): APO 2408.06266, eq. 8, where the chosen are worse than the model."""
    chosen, rejected = b.rewards
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def discopop(b: Batch) -> Tensor:
    """(1 − m)·(−log σ(βh)) + m·e^(−βh), m = σ(βh/τ): DiscoPOP 2406.08414, eq. 5."""
    share = torch.sigmoid(b.margin / b.settings.discopop_tau)
    return -logsigmoid(b.margin) * (1 - share) + torch.exp(-b.margin) * share


def sigmoid_norm(b: Batch) -> Tensor:
    """−log σ(βh̄) of per-token means: TRL's length-normalised DPO."""
    return -logsigmoid(b.settings.beta * b.mean_margin)


def simpo(b: Batch) -> Tensor:
    """−log σ(β(mean log-probability of the chosen − of the rejected) − γ), smoothed: SimPO 2405.14734. No reference."""
    chosen, rejected = b.means
    return _smoothed(b.settings.beta * (chosen - rejected) - b.settings.simpo_gamma, b.settings.label_smoothing)


def cpo(b: Batch) -> Tensor:
    """−log σ(β(log π_w − log π_l)), smoothed: CPO 2401.08417, eq. 3, without its negative log-likelihood. No reference."""
    chosen, rejected = b.policy
    return _smoothed(b.settings.beta * (chosen - rejected), b.settings.label_smoothing)


def orpo(b: Batch) -> Tensor:
    """−β·log σ(log odds_w − log odds_l), odds p/(1 − p) of per-token means: ORPO 2403.07691, λ = β. No reference."""
    odds = b.means - _log1mexp(b.means)
    return -b.settings.beta * logsigmoid(odds[0] - odds[1])


def plackett_luce(b: Batch) -> Tensor:
    """−Σ_k [s_k − log Σ_{j ≥ k} e^{s_j}] over S answers, best first, s = β·Δ: 2305.18290, appendix A.3. S = 2 is sigmoid."""
    scores = b.rewards
    denominators = torch.stack([scores[k:].logsumexp(dim=0) for k in range(len(scores) - 1)])
    return (denominators - scores[:-1]).sum(dim=0)


def kto(b: Batch) -> Tensor:
    """λ_D·(1 − σ(β(Δ − z))) or λ_U·(1 − σ(β(z − Δ))): KTO 2402.01306, eq. 7. z = max(0, mean Δ of slot 1), no gradient."""
    shift = b.ratios[1].detach().mean().clamp(min=0)
    return _rated(b, torch.sigmoid(b.settings.beta * (b.ratios[0] - shift)))


def apo_zero_unpaired(b: Batch) -> Tensor:
    """As `kto` with z = 0."""
    return _rated(b, torch.sigmoid(b.settings.beta * b.ratios[0]))


def _rated(b: Batch, likelier: Tensor) -> Tensor:
    """What is lost of a desirable answer that is not `likelier`, or of an undesirable one that is."""
    s = b.settings
    return torch.where(b.desirable, s.desirable_weight * (1 - likelier), s.undesirable_weight * likelier)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, without cancellation."""
    small = x < -math.log(2)  # each branch is given what it can take, so that neither makes the other's gradient NaN
    far, near = torch.where(small, x, -1.0), torch.where(small, -0.1, x)
    return torch.where(small, torch.log1p(-torch.exp(far)), torch.log(-torch.expm1(near)))


@dataclass(frozen=True)
class Loss:
    """A row of the table: each unit's loss (None: it has only the likelihood), and what it needs.

    `nll`: the weight of −log π(chosen) a token in it. `by_divergence`: whether f_divergence_type changes it. `compares`:
    whether the units of a micro-batch are compared with each other, so that it needs several.
    """

    per_unit: PerUnit | None
    data: Data = "preference"
    reference: bool = True
    by_divergence: bool = False
    smoothed: bool = False
    compares: bool = False
    nll: Callable[[Settings], float] = lambda settings: 0.0


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid, by_divergence=True),
    "hinge": Loss(hinge, by_divergence=True),
    "ipo": Loss(ipo, by_divergence=True),
    "exo_pair": Loss(exo_pair, by_divergence=True, smoothed=True),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, by_divergence=True, smoothed=True),
    "cdpo": Loss(cdpo, by_divergence=True, smoothed=True),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, smoothed=True, compares=True),
    "aot_unpaired": Loss(aot_unpaired, smoothed=True, compares=True),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop, by_divergence=True),
    "sigmoid_norm": Loss(sigmoid_norm, by_divergence=True),
    "sft": Loss(None, reference=False, nll=lambda settings: 1.0),
    "simpo": Loss(simpo, reference=False, smoothed=True),
    "cpo": Loss(cpo, reference=False, smoothed=True, nll=lambda settings: settings.cpo_alpha),
    "orpo": Loss(orpo, reference=False, nll=lambda settings: 1.0),
    "plackett_luce": Loss(plackett_luce, data="ranked"),
    "kto": Loss(kto, data="unpaired", compares=True),
    "apo_zero_unpaired": Loss(apo_zero_unpaired, data="unpaired"),
}


@dataclass(frozen=True)
class Mixture:
    """Losses by name with their weights; what is minimised is their weighted sum."""

    weights: dict[str, float]
    settings: Settings

    @property
    def data(self) -> Data:
        """What units it is of; all of them of one kind."""
        return LOSSES[next(iter(self.weights))].data

    @property
    def reads_reference(self) -> bool:
        """Whether the reference's log-probabilities matter."""
        return any(LOSSES[name].reference for name in self.weights)

    @property
    def nll(self) -> float:
        """The weight of −log π(chosen) a token."""
        return sum(weight * LOSSES[name].nll(self.settings) for name, weight in self.weights.items())

    def per_unit(self, batch: Batch) -> Tensor:
        """[U]: the losses of units, without the likelihood's part."""
        terms = [(LOSSES[name].per_unit, weight) for name, weight in self.weights.items()]
        zero = torch.zeros_like(batch.policy[0])
        return sum((weight * term(batch) for term, weight in terms if term is not None), start=zero)
