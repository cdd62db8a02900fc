"""Evaluation: a whole set through one full pipeline, every row scored exactly once.

Takes DeepSpeed's engine and a set's micro-batches; gives the means over all its targets. One pipeline call for
the set keeps all stages busy; with a call per micro-batch they would take turns.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from pipeline.console import progress
from pipeline.data.batches import EvaluationBatches
from pipeline.objectives.objective import Objective
from pipeline.training.engine import prefetch, wires
from pipeline.training.engine.wires import Inputs


def evaluate(engine: PipelineEngine, objective: Objective, batches: EvaluationBatches, name: str) -> dict[str, float]:
    """What the objective says of the set, 'loss' among it; the same on every process."""
    outputs = scores(engine, objective, batches, f"evaluating {name}")
    totals_M = torch.zeros(len(objective.measures), dtype=torch.float64, device=engine.device)
    for sums_MB in outputs:
        totals_M += torch.stack([row_sums_B.double().sum() for row_sums_B in sums_MB])
    dist.all_reduce(totals_M)  # the other stages add nothing
    return objective.means(dict(zip(objective.measures, totals_M.tolist(), strict=True)), batches.targets)


def scores(engine: PipelineEngine, objective: Objective, batches: EvaluationBatches, doing: str | None) -> list[Tensor]:
    """The objective's measures of each micro-batch of this replica's, fp32 [M, B], in order; on its last stage, else nothing.
    `doing`: over a bar, None for none."""
    in_training, measured = (engine.module.loss_fn, engine.dynamic_shape), wires.row_sums(objective)

    def losses(hidden_BTD: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        engine.total_loss = (
            None  # it adds up losses, and those of evaluation are per row, of which there are more or fewer
        )
        return measured(hidden_BTD, given)

    engine.module.loss_fn, engine.dynamic_shape = losses, batches.fixed_shape is None
    engine.reset_activation_shape()
    with progress(doing, len(batches)) if doing else nullcontext(lambda n: None) as advance:
        outputs = engine.eval_batch(
            _fed(batches, objective, advance, engine.device),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(batches),
        )
    engine.reset_activation_shape()
    engine.total_loss = None
    engine.module.loss_fn, engine.dynamic_shape = in_training
    return outputs if engine.is_last_stage() else []


def perplexity(loss: float) -> float:
    """e^loss, or the largest number there is."""
    return math.exp(min(loss, math.log(sys.float_info.max)))


def _fed(
    batches: EvaluationBatches, objective: Objective, advance: Callable[[int], None], device: torch.device
) -> Iterator[Inputs]:
    for inputs in prefetch.ahead(wires.pack_all(batches, objective), device):
        advance(1)
        yield inputs
