"""`stage_worker.py`, which also counts what a process sends, records and runs in each step and evaluation.

Takes and gives what that does; a rank's facts also have `steps` and `evaluated`, a list of counts each:

    sent         (stage, dtype, shape) of every tensor sent to another stage
    reduced      (bytes, ranks) of every sum over a group of processes
    saved        tensors that autograd kept for backward
    backward     calls of backward
    asked        whether the hidden state (or ids) given to the stage asked for a gradient, by forward pass
    ticks        length of every schedule that was run
    left         tensors that the pipeline's buffers still hold at the end
    asked_host   numbers taken out of tensors, for each of which the host waits for a device
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.stage import Stage
from pipeline.training.engine import evaluate as evaluation
from pipeline.training.run.trainer import Trainer
from tests.workers import stage_worker

train = stage_worker.train


def counted_train(case: Any, config: Any, place: Any, watcher: Any, facts: dict[str, Any], tensors: Any) -> None:
    """As `stage_worker.train`."""
    facts |= {"steps": [], "evaluated": []}
    step, evaluate = Trainer._train_step, evaluation.evaluate

    def one_step(self: Trainer, *given: Any) -> None:
        with counting(facts["steps"], lambda: self.engine):
            step(self, *given)

    def one_evaluation(engine: PipelineEngine, *given: Any) -> float:
        with counting(facts["evaluated"], lambda: engine):
            return evaluate(engine, *given)

    with mock.patch.object(Trainer, "_train_step", one_step), mock.patch.object(evaluation, "evaluate", one_evaluation):
        train(case, config, place, watcher, facts, tensors)


class Numbers(TorchDispatchMode):
    """Counts what `item`, `float` and the like come down to."""

    def __init__(self, counts: dict[str, Any]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts["asked_host"] += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(into: list[dict[str, Any]], engine: Callable[[], PipelineEngine]) -> Iterator[None]:
    """Append what happens inside to `into`."""
    counts: dict[str, Any] = {
        "sent": [],
        "reduced": [],
        "saved": 0,
        "backward": 0,
        "asked": [],
        "ticks": [],
        "asked_host": 0,
    }
    send, backward, execute, forward = p2p.send, Tensor.backward, PipelineEngine._exec_schedule, Stage.forward
    reduce = dist.all_reduce

    def counted_send(tensor: Tensor, stage: int) -> None:
        counts["sent"].append([stage, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        send(tensor, stage)

    def counted_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        counts["reduced"].append([tensor.nbytes, dist.get_process_group_ranks(group)])
        return reduce(tensor, op=op, group=group, async_op=async_op)

    def counted_backward(self: Tensor, *given: Any, **named: Any) -> None:
        counts["backward"] += 1
        backward(self, *given, **named)

    def counted_execute(self: PipelineEngine, schedule: Any) -> None:
        counts["ticks"].append(len(list(schedule)))
        execute(self, schedule)

    def counted_forward(self: Stage, inputs: tuple[Tensor, Tensor]) -> Any:
        counts["asked"].append(inputs[0].requires_grad)
        return forward(self, inputs)

    def kept(tensor: Tensor) -> Tensor:
        counts["saved"] += 1
        return tensor

    with (
        mock.patch.object(p2p, "send", counted_send),
        mock.patch.object(dist, "all_reduce", counted_reduce),
        mock.patch.object(Tensor, "backward", counted_backward),
        mock.patch.object(PipelineEngine, "_exec_schedule", counted_execute),
        mock.patch.object(Stage, "forward", counted_forward),
        torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor),
        Numbers(counts),
    ):
        yield
    counts["left"] = sum(buffer is not None for kind in engine().pipe_buffers.values() for buffer in kind)
    into.append(counts)


if __name__ == "__main__":
    stage_worker.train = counted_train
    stage_worker.main()
