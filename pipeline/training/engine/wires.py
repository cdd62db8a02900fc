"""What travels through DeepSpeed's pipeline: tuples of tensors, which only this file tells apart by position.

Takes micro-batches and an objective; gives the tuples that DeepSpeed hands to the first and to the last stage, and the
functions that it calls on the last stage, which give the tensors back their names. (`model/stage.py` documents what
passes between stages: the hidden state and the positions.)
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from pipeline.data.microbatch import MicroBatch
from pipeline.model.stage import FIRST_READS
from pipeline.objectives.objective import Objective, Tensors

Inputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # to the first stage, to the last


def pack(batch: MicroBatch, objective: Objective) -> Inputs:
    """What DeepSpeed reads: a micro-batch's tensors for the first stage, and those that the objective reads."""
    tensors = batch.tensors()
    first = (*FIRST_READS, *objective.first_reads)
    return tuple(tensors[name] for name in first), tuple(tensors[name] for name in objective.reads)


def pack_all(batches: Iterable[MicroBatch], objective: Objective) -> Iterable[Inputs]:
    """`pack` of each, as they are asked for."""
    return map(partial(pack, objective=objective), batches)


def training_loss(objective: Objective) -> Callable[[Tensor, tuple[Tensor, ...]], Tensor]:
    """DeepSpeed's `loss_fn` in training: fp32 scalar."""
    return lambda hidden_BTD, given: objective.loss(hidden_BTD, _named(given, objective))


def row_sums(objective: Objective) -> Callable[[Tensor, tuple[Tensor, ...]], Tensor]:
    """DeepSpeed's `loss_fn` in evaluation: fp32 [M, B], a line for each of the objective's measures."""

    def stacked(hidden_BTD: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        sums = objective.row_sums(hidden_BTD, _named(given, objective))
        return torch.stack([sums[name] for name in objective.measures])

    return stacked


def _named(given: tuple[Tensor, ...], objective: Objective) -> Tensors:
    return dict(zip(objective.reads, given, strict=True))
