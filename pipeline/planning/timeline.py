"""When each stage of a pipeline computes, sends and waits within one step: DeepSpeed's 1F1B schedule, replayed.

Takes seconds per micro-batch and stage, of forward and of backward, and the seconds of one transfer; gives the step's
seconds, each stage's busy share and the bubble. Nothing is measured or run.

The order of instructions is that of `deepspeed.runtime.pipe.schedule.TrainSchedule` (DeepSpeed 0.19.8), which is 1F1B:
Narayanan et al. 2021 (arXiv:2104.04473, §2.2). What the engine leaves out is left out here: a stage below the first
trained one runs forward only, and no gradient is sent to it.

Assumption: a transfer is a rendezvous. It begins when the sender has come to its send and the receiver to its receive,
and both go on when it is over. DeepSpeed sends and receives on the stream it computes on; NCCL's send of more than a few
MiB (a hidden state has 2·T·D bytes, 128 MiB in the founding run) completes with its receive, and gloo's waits for the
receiver at any size. The optimizer's own time is not in it.
"""

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from pipeline.planning.quantities import Shape


class Do(Enum):
    """What a stage does next."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send activation"
    RECEIVE_ACTIVATION = "receive activation"
    SEND_GRADIENT = "send gradient"
    RECEIVE_GRADIENT = "receive gradient"


class Instruction(NamedTuple):
    """One entry of a stage's list."""

    do: Do
    micro_batch: int


class Timeline(NamedTuple):
    """One step. `busy`: share of the step in which each stage computes; `bubble`: share in which the mean stage does not."""

    step_s: float
    busy: list[float]
    bubble: float


# What the other end of a transfer does, and on which stage it is.
OTHER_END = {
    Do.SEND_ACTIVATION: (Do.RECEIVE_ACTIVATION, +1),
    Do.RECEIVE_ACTIVATION: (Do.SEND_ACTIVATION, -1),
    Do.SEND_GRADIENT: (Do.RECEIVE_GRADIENT, -1),
    Do.RECEIVE_GRADIENT: (Do.SEND_GRADIENT, +1),
}


def in_flight(stage: int, shape: Shape, first_trained_stage: int = 0) -> int:
    """Micro-batches whose activations `stage` holds at once: forwards begun and not yet gone back.

    min(stages − stage, micro-batches). DeepSpeed's `num_pipe_buffers` is at least 2, but the second buffer of a last stage
    is filled after the first one's backward. One where nothing runs backward: what is in passing.
    """
    return min(shape.stages - stage, shape.micro_batches) if stage >= first_trained_stage else 1


def instructions(stage: int, stages: int, micro_batches: int, first_trained_stage: int = 0) -> list[Instruction]:
    """What `stage` does in one step, in order.

    Forward of micro-batch j and backward of micro-batch j − (stages − stage) + 1 take turns, each where there is one. The
    transfers for a turn come at its beginning, together with sending on what the turn before made.
    """
    warm_up = stages - stage  # forwards before the first backward
    receives, sends = stage > 0, stage < stages - 1
    backward = stage >= first_trained_stage
    gradient_in, gradient_out = sends and backward, stage > first_trained_stage
    todo: list[Instruction] = []

    def add(do: Do, micro_batch: int, wanted: bool = True) -> None:
        if wanted and 0 <= micro_batch < micro_batches:
            todo.append(Instruction(do, micro_batch))

    for j in range(micro_batches + warm_up):
        add(Do.SEND_GRADIENT, j - warm_up, gradient_out)
        add(Do.RECEIVE_ACTIVATION, j, receives)
        add(Do.FORWARD, j)
        add(Do.RECEIVE_GRADIENT, j - warm_up + 1, gradient_in)
        add(Do.SEND_ACTIVATION, j, sends)
        add(Do.BACKWARD, j - warm_up + 1, backward)
    return todo


def simulate(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    link_s: float | Sequence[float],
    micro_batches: int,
    first_trained_stage: int = 0,
) -> Timeline:
    """One step of `len(forward_s)` stages.

    forward_s, backward_s: seconds of one micro-batch on each stage; backward_s below `first_trained_stage` is not used.
    link_s: seconds of one transfer of a hidden state or of its gradient, between all stages alike or between each and the
    next. Raises ValueError for lists of unlike length.
    """
    stages = len(forward_s)
    if len(backward_s) != stages or not stages or micro_batches < 1:
        raise ValueError(f"{stages} forward and {len(backward_s)} backward times, {micro_batches} micro-batches")
    links = [link_s] * (stages - 1) if isinstance(link_s, float | int) else link_s
    if len(links) != stages - 1:
        raise ValueError(f"{stages} stages with {len(links)} links between them")
    todo = [instructions(s, stages, micro_batches, first_trained_stage) for s in range(stages)]
    seconds = [{Do.FORWARD: forward_s[s], Do.BACKWARD: backward_s[s]} for s in range(stages)]
    clock, at = [0.0] * stages, [0] * stages

    def advance(stage: int) -> bool:
        """Do the stage's next instruction if it can be done; a transfer is done for both ends at once."""
        if at[stage] == len(todo[stage]):
            return False
        do, micro_batch = todo[stage][at[stage]]
        if do in (Do.FORWARD, Do.BACKWARD):
            clock[stage] += seconds[stage][do]
            at[stage] += 1
            return True
        wanted, step = OTHER_END[do]
        peer = stage + step
        if at[peer] == len(todo[peer]) or todo[peer][at[peer]] != Instruction(wanted, micro_batch):
            return False
        clock[stage] = clock[peer] = max(clock[stage], clock[peer]) + links[min(stage, peer)]
        at[stage] += 1
        at[peer] += 1
        return True

    while any(advance(stage) for stage in range(stages)):
        pass
    if any(at[s] < len(todo[s]) for s in range(stages)):
        raise RuntimeError("the stages wait for one another: the schedule's two ends of a transfer do not fit")
    step_s = max(clock)
    computing = [
        micro_batches * (forward_s[s] + (backward_s[s] if s >= first_trained_stage else 0.0)) for s in range(stages)
    ]
    busy = [c / step_s if step_s else 1.0 for c in computing]
    return Timeline(step_s, busy, 1 - sum(busy) / stages)
