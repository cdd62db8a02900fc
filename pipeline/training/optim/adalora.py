"""AdaLoRA's budget of ranks, shared out among the modules of all stages (Zhang et al. 2023, arXiv 2303.10512).

Takes a stage's modules with A [R, D_in], E [R], B [D_out, R] of W + s/R·B·diag(E)·A, and the optimizer that updates them; after
an update sets those E to zero whose triplets matter least, of all stages' together. As PEFT 0.21's RankAllocator
(`peft/tuners/adalora/layer.py`), which sees one process's modules alone; what has to be known of the others is R numbers a module
at each change of the budget. Moving averages and masks are in the optimizer's state, and so in checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.training.optim.inner import add, value
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer, communication_device

SENSITIVITY, UNCERTAINTY, KEPT = (
    "adalora_sensitivity",
    "adalora_uncertainty",
    "adalora_kept",
)  # keys of the optimizer's state


@dataclass(frozen=True)
class Schedule:
    """PEFT's keys, `total_step` and the others in steps; `modules`: of all stages.

    Until `tinit` all ranks are kept; then their number falls as a cube to `target_r` a module, which it is at `total_step` −
    `tfinal`, and is taken every `delta_t` steps; from there on the same are kept.
    """

    modules: int
    init_r: int
    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    total_step: int
    beta1: float
    beta2: float
    orth_reg_weight: float

    @property
    def last(self) -> int:
        """The step after which the same triplets are kept."""
        return self.total_step - self.tfinal

    def dropped(self, step: int) -> int | None:
        """How many triplets, of all modules, are to be zero after `step`; None where that is not decided anew."""
        before, after = self.init_r * self.modules, self.target_r * self.modules
        if step == self.last:
            return before - after
        if step <= self.tinit or step > self.last or step % self.delta_t:
            return None
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return before - int((before - after) * left**3 + after)


class Triplets(NamedTuple):
    """A module's parameters, and its place among those of all stages."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter
    place: int


class RankAllocator:
    """Shares out the budget after each update of `optimizer`, whose stages' group it asks."""

    def __init__(self, optimizer: PipelineOptimizer, modules: Mapping[str, Triplets], schedule: Schedule) -> None:
        self.optimizer, self.modules, self.schedule = optimizer, modules, schedule

    @torch.no_grad()
    def after_update(self) -> None:
        """With the gradients of the step still in `.grad`, as PEFT's `update_and_allocate`."""
        step = self.optimizer.completed_steps + 1
        if step < self.schedule.last:
            for triplets in self.modules.values():
                for parameter in triplets[:3]:
                    self._follow(parameter)
        dropped = self.schedule.dropped(step)
        if dropped is not None:
            self._share_out(dropped)
        if dropped is not None or step > self.schedule.last:
            for triplets in self.modules.values():
                self._mask(triplets.E)

    def _follow(self, parameter: nn.Parameter) -> None:
        """Moving averages of the sensitivity |w·∂L/∂w| and of its uncertainty (eq. 9 to 11), fp32."""
        assert parameter.grad is not None, "every trained parameter has a gradient at an update"
        state, s = self.optimizer.inner.state[parameter], self.schedule
        now = (parameter.float() * parameter.grad.float()).abs()
        mean, spread = (state.get(key, torch.zeros_like(now)) for key in (SENSITIVITY, UNCERTAINTY))
        mean = s.beta1 * mean + (1 - s.beta1) * now
        state[SENSITIVITY] = mean
        state[UNCERTAINTY] = s.beta2 * spread + (1 - s.beta2) * (now - mean).abs()

    def _share_out(self, dropped: int) -> None:
        """Note of each module which triplets are kept: those above the `dropped`-th lowest score of all stages' modules."""
        s = self.schedule
        first = next(iter(self.modules.values()), None)
        device = communication_device() if first is None else first.E.device
        scores = torch.zeros(s.modules, s.init_r, device=device)
        for triplets in self.modules.values():
            scores[triplets.place] = self._scores(triplets)
        self.optimizer.sum_over_stages(scores)  # each row is one stage's, and zero on the others
        threshold = torch.kthvalue(scores.flatten(), dropped)[0] if dropped else scores.new_full((), -1.0)
        for triplets in self.modules.values():
            kept = scores[triplets.place] > threshold
            self.optimizer.inner.state[triplets.E][KEPT] = kept.to(torch.uint8)

    def _scores(self, triplets: Triplets) -> Tensor:
        """Of each triplet [R]: E's, and the means of A's row and B's column (eq. 7)."""
        A, E, B = (self._element_scores(parameter) for parameter in triplets[:3])
        return E.flatten() + torch.stack([A.mean(1), B.mean(0)], dim=1).sum(1)

    def _element_scores(self, parameter: nn.Parameter) -> Tensor:
        state = self.optimizer.inner.state[parameter]
        if SENSITIVITY not in state:  # a run that goes on without its optimizer's states
            return torch.zeros_like(parameter, dtype=torch.float32)
        return state[SENSITIVITY] * state[UNCERTAINTY]

    def _mask(self, E: nn.Parameter) -> None:
        kept = self.optimizer.inner.state[E].get(KEPT)
        if kept is not None:
            inner = self.optimizer.inner
            add(inner, E, torch.where(kept.bool()[:, None], 0.0, -value(inner, E)))


@torch.no_grad()
def add_orthogonality(sums: Mapping[str, Tensor], modules: Mapping[str, Triplets], schedule: Schedule) -> None:
    """Add to gradients, in fp32 by name, that of orth_reg_weight times the mean over all modules' A and B of ‖A·Aᵀ − I‖_F and
    ‖Bᵀ·B − I‖_F, which PEFT adds to the loss: 2·C·A/‖C‖ with C = A·Aᵀ − I, and 2·B·C/‖C‖."""
    weight = schedule.orth_reg_weight / (2 * schedule.modules)
    for name, triplets in modules.items():
        A, B = triplets.A.float(), triplets.B.float()
        for own, P, turned in ((f"{name}.lora_A", A, False), (f"{name}.lora_B", B.T, True)):
            C = P @ P.T - torch.eye(len(P), device=P.device)
            length = torch.linalg.norm(C)
            gradient = torch.where(length > 0, 2 * weight * (C @ P) / length, 0.0)
            sums[own].add_(gradient.T if turned else gradient)


def attach(
    optimizer: PipelineOptimizer, layers: Mapping[str, Any], places: Mapping[str, int], settings: Mapping[str, Any]
) -> None:
    """Have `optimizer` share out the budget, and its gradients hold A and B orthogonal. Every stage must, for the sake of the
    others.

    `layers`: the stage's, PEFT's AdaLoRA layers by name; `places`: of all stages' modules; `settings`: all of PEFT's keys.
    """
    s = settings
    schedule = Schedule(
        len(places),
        *(int(s[key]) for key in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step")),
        *(float(s[key]) for key in ("beta1", "beta2", "orth_reg_weight")),
    )
    modules = {}
    for name, layer in layers.items():
        A, E, B = (next(iter(held.values())) for held in (layer.lora_A, layer.lora_E, layer.lora_B))
        modules[name] = Triplets(A, E, B, places[name])
        layer.kept = partial(_kept, optimizer, E)
    allocator = RankAllocator(optimizer, modules, schedule)
    optimizer.after_update.append(allocator.after_update)
    if schedule.orth_reg_weight:
        optimizer.before_norm.append(lambda sums: add_orthogonality(sums, modules, schedule))


def _kept(optimizer: PipelineOptimizer, E: nn.Parameter) -> Tensor | None:
    """Which of a module's triplets are kept [R]; None while all are."""
    kept: Tensor | None = optimizer.inner.state.get(E, {}).get(KEPT)
    return kept
