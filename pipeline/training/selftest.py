"""One second before the weights are loaded: does this DeepSpeed train what we think it does?

Takes our place in the pipeline; runs a toy over the same stages and accumulation steps through the same engine and
optimizer, and refuses to go on if gradients are scaled differently, a layer runs more than once per micro-batch, or
the norm is not the whole pipeline's. (The scale of accumulated gradients changed three times between releases.)
"""

import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.console import UserError, run_command, say
from pipeline.training import engine as engines
from pipeline.training.optimizer import PipelineOptimizer

WEIGHT = 1.5


class _Toy(nn.Module):
    """y = w·x, counting its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([WEIGHT]))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * self.w


def run(place: engines.Place, gradient_accumulation_steps: int) -> None:
    """Raises UserError naming what is off. About a second."""
    toy = _Toy().to(place.device)
    seen: dict[str, Tensor] = {}
    optimizer = PipelineOptimizer({"w": toy.w}, torch.optim.SGD([toy.w], lr=0.0), clip=0.0)
    optimizer.on_gradients = lambda sums: seen.update({name: g.clone() for name, g in sums.items()})
    engine = engines.build(
        toy, place, lambda y, _: y.sum(), optimizer, gradient_accumulation_steps, dynamic_shape=False
    )
    inputs = [float(1 + index + place.replica) for index in range(gradient_accumulation_steps)]
    nothing = torch.zeros(1)
    engine.train_batch(iter([(torch.tensor([[x]]), nothing) for x in inputs]))

    # d(Π w · x)/dw = w^(stages − 1) · x, averaged over micro-batches and replicas.
    everyone = [
        1 + index + replica for index in range(gradient_accumulation_steps) for replica in range(place.replicas)
    ]
    expected = WEIGHT ** (place.stages - 1) * sum(everyone) / len(everyone)
    problems = []
    if not math.isclose(float(seen["w"]), expected, rel_tol=1e-5):
        problems.append(
            f"stage {place.stage}'s gradient is {float(seen['w']) / expected:.4g} times the mean over micro-batches"
        )
    if toy.passes != gradient_accumulation_steps:
        problems.append(
            f"stage {place.stage} ran forward {toy.passes} times for {gradient_accumulation_steps} micro-batches"
        )
    if not math.isclose(optimizer.grad_norm, expected * math.sqrt(place.stages), rel_tol=1e-5):
        problems.append(
            f"the gradient's norm is {optimizer.grad_norm:.6g}, "
            f"over all stages it should be {expected * math.sqrt(place.stages):.6g}"
        )
    gathered: list[list[str]] = [[] for _ in range(place.world)]
    dist.all_gather_object(gathered, problems)
    if found := sorted({p for each in gathered for p in each}):
        raise UserError(
            f"DeepSpeed {engines.deepspeed.__version__} would train something else than asked: " + "; ".join(found)
        )


def main() -> int:
    """`make setup`: the toy on one stage, which also has DeepSpeed compile what it compiles at its first start."""
    with tempfile.TemporaryDirectory() as folder:
        place = engines.initialise(1, Path(folder) / "rendezvous", column_major=False)
        run(place, gradient_accumulation_steps=2)
        engines.shutdown()
    say(f"DeepSpeed {engines.deepspeed.__version__} with torch {torch.__version__} trains what it is asked to")
    return 0


if __name__ == "__main__":
    run_command(main)
