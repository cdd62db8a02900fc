"""One process of benchmarks/pipeline_schedule.py, under the deepspeed launcher.

Takes REQUEST.json and a folder; builds its stage and gives FOLDER/<rank>.json: seconds of each timed step, of the
stage's forward and backward of one micro-batch (with both processes at work, as in the pipeline, and with the other one
idle), of the optimizer's step, and of handing a hidden state to the other process and back.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import variants
from benchmarks.shapes import Shape
from pipeline.model.adapters.base import trainable
from pipeline.model.fusion import apply as fusion
from pipeline.model.memory import activation
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.language_modelling import LanguageModelling
from pipeline.training.engine import engine
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer


def main() -> None:
    request_path, folder = (Path(argument) for argument in sys.argv[-2:])  # the launcher puts --local_rank before them
    request = json.loads(request_path.read_text())
    shape, micro_batches = Shape(*request["shape"]), request["micro_batches"]
    place = engine.initialise(2, folder.resolve() / "rendezvous", column_major=False)
    stage = build(shape, place, request["cut"], RecomputeLevel[request["level"].upper()])
    objective = LanguageModelling(stage.head if stage.is_last else None, logit_transform(stage.model.config))
    ids = variants.tokens(shape, place.device)
    positions = torch.arange(shape.tokens).unsqueeze(0)
    labels = ids, torch.tensor(1 / (shape.tokens - 1))
    facts = stage_times(stage, objective, shape, positions, labels, place, request["rounds"])

    parameters = trainable(stage)
    inner = make_inner(
        "adamw_kahan", [{"params": list(parameters.values())}], lr=1e-5, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0
    )
    optimizer = PipelineOptimizer(parameters, inner, clip=1.0)
    first = engine.first_trained_stage(bool(parameters), place)
    whole = engine.build(stage, place, objective, optimizer, micro_batches, dynamic_shape=False, first_trained=first)
    timed_optimizer = Timed(optimizer.step)
    optimizer.step = timed_optimizer  # type: ignore[method-assign]
    steps = []
    for _ in range(request["rounds"] + 1):  # the first one sets buffers up
        dist.barrier()
        began = time.perf_counter()
        whole.train_batch(iter([((ids, positions), labels)] * micro_batches))
        dist.barrier()
        steps.append(time.perf_counter() - began)
    facts |= {"step_s": steps[1:], "optimizer_s": timed_optimizer.seconds[1:]}
    (folder / f"{place.rank}.json").write_text(json.dumps(facts))
    engine.shutdown()


class Timed:
    """A function and the seconds of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, list[float]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds.append(time.perf_counter() - began)
        return result


def build(shape: Shape, place: engine.Place, cut: int, level: RecomputeLevel) -> Stage:
    """Layers [0, cut) or [cut, L) of the model, at `level`, with all kernels."""
    first, end = ((0, cut), (cut, shape.layers))[place.stage]
    whole = variants.model(shape, place.device)
    stage = variants.stage_of(whole, shape, first, end, frozenset(fusion.KERNELS))
    activation.apply(stage, dict.fromkeys(range(first, end), ActivationPolicy(level)))
    return stage


def stage_times(
    stage: Stage,
    objective: LanguageModelling,
    shape: Shape,
    positions: Tensor,
    labels: tuple[Tensor, Tensor],
    place: engine.Place,
    rounds: int,
) -> dict[str, Any]:
    """Seconds of forward and of backward, `rounds` each: 'together', 'alone'; and 'transfer_s', one way."""
    facts: dict[str, Any] = {}
    one = functools.partial(one_pass, stage, objective, shape, positions, labels)
    one()
    dist.barrier()
    facts["together"] = [one() for _ in range(rounds)]
    for turn in range(place.stages):
        dist.barrier()
        if place.stage == turn:
            facts["alone"] = [one() for _ in range(rounds)]
    dist.barrier()
    hidden = torch.zeros(1, shape.tokens, shape.hidden, dtype=torch.bfloat16)
    ways = []
    for _ in range(rounds):
        began = time.perf_counter()
        for sender in range(place.stages):
            dist.send(hidden, 1 - place.rank) if place.rank == sender else dist.recv(hidden, 1 - place.rank)
        ways.append((time.perf_counter() - began) / 2)
    facts["transfer_s"] = ways
    for parameter in stage.parameters():
        parameter.grad = None
    return facts


def one_pass(
    stage: Stage, objective: LanguageModelling, shape: Shape, positions: Tensor, labels: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Seconds of one micro-batch's forward (with the loss, on the last stage) and backward."""
    hidden = torch.randn(1, shape.tokens, shape.hidden).to(torch.bfloat16).requires_grad_()
    began = time.perf_counter()
    output = stage((labels[0] if stage.is_first else hidden, positions))
    result = objective.loss(output, dict(zip(objective.reads, labels, strict=True))) if stage.is_last else output[0]
    middle = time.perf_counter()
    result.backward(None if stage.is_last else torch.ones_like(result))
    return middle - began, time.perf_counter() - middle


if __name__ == "__main__":
    main()
