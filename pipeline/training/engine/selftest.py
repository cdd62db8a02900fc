"""One second before the weights are loaded: does this DeepSpeed train what we think it does?

Takes our place in the pipeline; runs a toy over the same stages and accumulation steps through the same engine and
optimizer, and refuses to go on if gradients are scaled differently, a layer runs more than once per micro-batch, the
norm is not the whole pipeline's, or gradients are asked for below the first stage that trains. (The scale of
accumulated gradients changed three times between releases.)
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.console import UserError, log_if_slow
from pipeline.objectives.objective import Tensors
from pipeline.training.engine import engine as engines
from pipeline.training.engine import schedule
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer

WEIGHT = 1.5


class _Toy(nn.Module):
    """y = w·x, counting its forward passes, and those whose input asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([WEIGHT]))
        self.passes = self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.asked += x.requires_grad
        return x * self.w


class _Sum:
    """An `Objective`: the sum of the toy's output."""

    reads = measures = ("nothing",)
    first_reads = ()

    def loss(self, y: Tensor, given: Tensors) -> Tensor:
        return y.sum()

    def row_sums(self, y: Tensor, given: Tensors) -> dict[str, Tensor]:
        return {}

    def means(self, totals: Mapping[str, float], targets: int) -> dict[str, float]:
        return {}


@log_if_slow("starting: seeing what DeepSpeed trains of a toy")
def run(place: engines.Place, gradient_accumulation_steps: int) -> None:
    """Raises UserError naming what is off. About a second. Every stage trains, and then the last one alone."""
    toy = _Toy().to(place.device)
    seen: dict[str, Tensor] = {}
    optimizer = PipelineOptimizer({"w": toy.w}, torch.optim.SGD([toy.w], lr=0.0), clip=0.0)
    optimizer.on_gradients = lambda sums: seen.update({name: g.clone() for name, g in sums.items()})
    engine = engines.build(
        toy, place, _Sum(), optimizer, gradient_accumulation_steps, dynamic_shape=False, first_trained=0
    )
    for first_trained in dict.fromkeys((0, place.stages - 1)):
        toy.w.requires_grad_(place.stage >= first_trained)
        schedule.apply(engine, first_trained)
        toy.passes = toy.asked = 0
        inputs = [float(1 + index + place.replica) for index in range(gradient_accumulation_steps)]
        nothing = (torch.zeros(1),)
        engine.train_batch(iter([(torch.tensor([[x]]), nothing) for x in inputs]))
        problems = _problems(
            place, gradient_accumulation_steps, first_trained, toy, float(seen["w"]), optimizer.grad_norm
        )
        gathered: list[list[str]] = [[] for _ in range(place.world)]
        dist.all_gather_object(gathered, problems)
        if found := sorted({p for each in gathered for p in each}):
            raise UserError(
                f"DeepSpeed {engines.deepspeed.__version__} would train something else than asked: " + "; ".join(found)
            )


def _problems(
    place: engines.Place, micro_batches: int, first_trained: int, toy: _Toy, gradient: float, norm: float
) -> list[str]:
    """What is off on this process in a step with `micro_batches`, stages from `first_trained` on being trained."""
    # d(Π w · x)/dw = w^(stages − 1) · x, averaged over micro-batches and replicas.
    everyone = [1 + index + replica for index in range(micro_batches) for replica in range(place.replicas)]
    expected = WEIGHT ** (place.stages - 1) * sum(everyone) / len(everyone)
    expected_norm = expected * math.sqrt(place.stages - first_trained)
    trains = place.stage >= first_trained
    problems = []
    if not math.isclose(gradient, expected * trains, rel_tol=1e-5):
        problems.append(
            f"stage {place.stage}'s gradient is {gradient / expected:.4g} times the mean over micro-batches"
            + ("" if trains else ", though it trains nothing")
        )
    if toy.passes != micro_batches:
        problems.append(f"stage {place.stage} ran forward {toy.passes} times for {micro_batches} micro-batches")
    if toy.asked != toy.passes * (place.stage > first_trained):
        problems.append(
            f"stage {place.stage} was asked for a gradient of its input {toy.asked} of {toy.passes} times, "
            f"the first stage that trains being {first_trained}"
        )
    if not math.isclose(norm, expected_norm, rel_tol=1e-5):
        problems.append(f"the gradient's norm is {norm:.6g}, over all stages it should be {expected_norm:.6g}")
    return problems
