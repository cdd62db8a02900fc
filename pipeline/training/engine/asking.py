"""Asks the model of a run while it is trained, through its stages and with all of its replicas.

Takes prompts as ids; gives their answers on every process. No generator that training draws from is used, no gradient is made,
and the stage is left in the mode it was in.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipeline.generation.decoding import Answer, Asked, InOneProcess, OverProcesses, Stages, answers, speaking
from pipeline.generation.sampling import Sampling
from pipeline.model.stage import Stage
from pipeline.training.engine.engine import Place


class RunAsker:
    """All processes make one. `dtype`: of hidden states between stages. `alive`: called for each token, the run gets on."""

    def __init__(self, stage: Stage, place: Place, dtype: torch.dtype, alive: Callable[[], object]) -> None:
        self._stage, self._place, self._alive = stage, place, alive
        self._stages = _stages(stage, place, dtype)

    def answers(
        self, asked: Sequence[Asked], sampling: Sampling, stops: Collection[int], max_new_tokens: int
    ) -> list[Answer]:
        """The answer to each of `asked`, in their order, on every process; replicas share them out. All processes must come
        here with the same."""
        mine = range(self._place.replica, len(asked), self._place.replicas)
        with speaking([self._stage]):
            own = answers(
                self._stages, [asked[n] for n in mine], sampling, stops, max_new_tokens, lambda *_: self._alive()
            )
        everyone: list[Any] = [None] * self._place.world
        dist.all_gather_object(everyone, dict(zip(mine, own, strict=True)))
        found: dict[int, Answer] = {number: answer for part in everyone for number, answer in part.items()}
        return [found[number] for number in range(len(found))]


def _stages(stage: Stage, place: Place, dtype: torch.dtype) -> Stages:
    """This process's way to all stages of its replica."""
    if place.stages == 1:
        return InOneProcess([stage], place.device)
    # Tokens are on the CPU, where a GPU's backend moves nothing. All processes take part in making a group.
    group = None if place.device.type == "cpu" else dist.new_group(backend="gloo")
    ranks = [place.topology.get_rank(pipe=n, data=place.replica) for n in range(place.stages)]
    return OverProcesses(stage, ranks, place.device, dtype, group)
