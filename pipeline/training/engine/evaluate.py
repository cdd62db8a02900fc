"""Evaluation: a whole set through one full pipeline, every row scored exactly once.

Takes DeepSpeed's engine and a set's micro-batches; gives the mean loss over all its target tokens. One pipeline call for
the set keeps all stages busy; with a call per micro-batch they would take turns.
"""

import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from pipeline.console import progress
from pipeline.data.evaluation import EvaluationBatches
from pipeline.data.microbatch import MicroBatch
from pipeline.training.engine import prefetch
from pipeline.training.engine.prefetch import Inputs


def as_inputs(batch: MicroBatch) -> Inputs:
    """What DeepSpeed hands to the stages: (ids, positions, rows' lengths) to the first, (labels, loss_scale) to the last."""
    first = batch.input_ids, batch.position_ids, batch.lengths
    return first, (batch.labels, torch.tensor(batch.loss_scale, dtype=torch.float32))


def evaluate(engine: PipelineEngine, row_losses: Callable[..., Tensor], batches: EvaluationBatches, name: str) -> float:
    """Mean loss in nats per target token, the same number on every process."""
    training_objective = engine.module.loss_fn
    engine.module.loss_fn = row_losses
    engine.total_loss = None  # it adds up losses, and those of evaluation are per row
    engine.reset_activation_shape()
    with progress(f"evaluating {name}", len(batches)) as advance:
        outputs = engine.eval_batch(
            _fed(batches, advance, engine.device), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )
    engine.reset_activation_shape()
    engine.total_loss = None
    engine.module.loss_fn = training_objective

    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    if engine.is_last_stage():
        for rows_B in outputs:
            total += rows_B.double().sum()
    dist.all_reduce(total)  # the other stages add nothing
    return float(total) / batches.target_tokens


def perplexity(loss: float) -> float:
    """e^loss, or the largest number there is."""
    return math.exp(min(loss, math.log(sys.float_info.max)))


def _fed(batches: EvaluationBatches, advance: Callable[[int], None], device: torch.device) -> Iterator[Inputs]:
    for inputs in prefetch.ahead(map(as_inputs, batches), device):
        advance(1)
        yield inputs
