"""Answers to prompts, token after token, with a cache of keys and values for each prompt and stage.

Takes prompts as ids and the stages, all in this process or one in each of several; gives for each prompt the tokens that
follow, on every process the same. Over processes as many prompts are under way as there are stages: a stage works on one
while another is elsewhere. One prompt is one row, so no token of it is padding, and its answer does not depend on the
others.

The order is a queue that every process keeps alike: the token of the prompt at its head is waited for, the prompt goes
through the stages once more, and to the queue's end. A hidden state goes from stage to stage; the token goes from the last
stage to all others, who then know by themselves what it was the end of.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache

from pipeline.console import UserError
from pipeline.generation.sampling import NOT_FINITE, Sampling
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.model.structure.parts import carried_width


class Memory:
    """What the stages of this process keep of a conversation from one answer to the next: caches, and the ids in them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.caches: list[Cache] | None = None

    def of(self, ids: Sequence[int]) -> "list[Cache] | None":
        """The caches, if `ids` goes on from what is in them; they have it from then on. Else None."""
        known = self.caches if len(self.ids) < len(ids) and list(ids[: len(self.ids)]) == self.ids else None
        self.caches = None
        return known


class Asked(NamedTuple):
    """A prompt's ids, at least one, and the noise that its answer is drawn with. `memory`: of the conversation that it is of;
    `most`: tokens that its answer may have, where that is less than all may have."""

    ids: Sequence[int]
    noise: torch.Generator
    memory: Memory | None = None
    most: int | None = None


class Answer(NamedTuple):
    """The tokens said, without the stop; and the stop that ended them, None where it was the limit."""

    tokens: list[int]
    stop: int | None

    @property
    def stopped(self) -> bool:
        """Whether the model ended its answer itself."""
        return self.stop is not None


class Turn:
    """A prompt under way: what was said so far, and what the stages of this process keep of it."""

    def __init__(self, number: int, asked: Asked, new_caches: Callable[[], list[Cache]]) -> None:
        self.number, self.noise, self.memory, self.most = number, asked.noise, asked.memory, asked.most
        self.said: list[int] = []
        known = asked.memory.of(asked.ids) if asked.memory is not None else None
        self._at = len(asked.memory.ids) if asked.memory is not None and known is not None else 0
        self.caches = known if known is not None else new_caches()
        self._next = list(asked.ids[self._at :])
        self._cached = list(asked.ids[: self._at])

    @property
    def length(self) -> int:
        """Tokens that go through the stages next: the whole prompt, and then the last token alone."""
        return len(self._next)

    def says(self, token: int) -> None:
        """`token` follows, and is what goes through the stages next."""
        self._at += len(self._next)
        self._next = [token]
        self.said.append(token)

    def sent(self) -> None:
        """What is next has gone through the stages: it is in the caches."""
        self._cached += self._next

    def remember(self) -> None:
        """Keep the caches for what goes on from here, where the conversation has a memory."""
        if self.memory is not None:
            self.memory.ids, self.memory.caches = self._cached, self.caches

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(ids [1, T], positions [1, T]) int64 of what goes through the stages next."""
        positions = torch.arange(self._at, self._at + len(self._next), device=device)
        return torch.tensor([self._next], device=device), positions.unsqueeze(0)


class Stages(Protocol):
    """What this process has of the model, and its way to the rest. `in_flight`: prompts that keep all stages busy."""

    in_flight: int

    def caches(self) -> list[Cache]:
        """New ones, for one prompt, of the stages in this process."""
        ...

    def forward(self, turn: Turn, sampling: Sampling) -> None:
        """This process's part of sending `turn` through all stages, and of choosing its next token."""
        ...

    def token(self, turn: Turn) -> int:
        """The token that was chosen; turns in the order of `forward`."""
        ...

    def finish(self) -> None:
        """Nothing more is sent; returns when all that was has arrived."""
        ...


@torch.no_grad()
def answers(
    stages: Stages,
    asked: Sequence[Asked],
    sampling: Sampling,
    stops: Collection[int],
    max_new_tokens: int,
    said: Callable[[int, int], object] = lambda number, token: None,
) -> list[Answer]:
    """The answer to each of `asked`, in their order. All processes must come here with the same.

    The stages are in eval mode (`speaking`). `said(number, token)` is called for each token, as soon as it is known.
    UserError, on every process, where the model's logits are not finite.
    """
    waiting = deque(enumerate(asked))
    under_way: deque[Turn] = deque()
    found: dict[int, Answer] = {}
    while waiting or under_way:
        if under_way and (not waiting or len(under_way) >= stages.in_flight):
            turn = under_way.popleft()
            token = stages.token(turn)
            if token == NOT_FINITE:
                raise UserError("the model's logits are not finite: it cannot say anything; its weights are damaged")
            if token in stops:
                found[turn.number] = Answer(turn.said, token)
                turn.remember()
                continue
            turn.says(token)
            said(turn.number, token)
            if len(turn.said) == min(max_new_tokens, turn.most or max_new_tokens):
                found[turn.number] = Answer(turn.said, None)
                turn.remember()
                continue
        else:
            turn = Turn(*waiting.popleft(), stages.caches)
        stages.forward(turn, sampling)
        turn.sent()
        under_way.append(turn)
    stages.finish()
    return [found[number] for number in range(len(asked))]


@contextmanager
def speaking(stages: Sequence[Stage]) -> Iterator[None]:
    """Inside, the stages are in eval mode: no dropout and no noise. Afterwards each module is in the mode it was in."""
    modes = {module: module.training for stage in stages for module in stage.modules()}
    for stage in stages:
        stage.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class InOneProcess:
    """All stages of a model, one after the other."""

    in_flight = 1

    def __init__(self, stages: Sequence[Stage], device: torch.device) -> None:
        self._stages, self._device = stages, device
        self._token = NOT_FINITE

    def caches(self) -> list[Cache]:
        return [stage.new_cache() for stage in self._stages]

    def forward(self, turn: Turn, sampling: Sampling) -> None:
        carried: Any = turn.inputs(self._device)
        for stage, cache in zip(self._stages, turn.caches, strict=True):
            carried = stage(carried, cache)
        self._token = _choose(self._stages[-1], carried, turn, sampling)

    def token(self, turn: Turn) -> int:
        return self._token

    def finish(self) -> None:
        pass


class OverProcesses:
    """One stage in each of several processes: hidden states go to the next, tokens from the last to all others.

    `ranks`: those of the stages, in their order. `dtype`: of hidden states. `token_group`: for tokens, which are on the CPU: a
    group of a backend for it (gloo) where the default group's is none.
    """

    def __init__(
        self,
        stage: Stage,
        ranks: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        token_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._stage, self._ranks, self._group = stage, list(ranks), token_group
        self._own = self._ranks.index(dist.get_rank())
        self._device, self._dtype = device, dtype
        self.in_flight = len(self._ranks)
        self._sent: deque[tuple[list[dist.Work | None], Tensor]] = deque()
        self._chosen: deque[int] = deque()

    def caches(self) -> list[Cache]:
        return [self._stage.new_cache()]

    def forward(self, turn: Turn, sampling: Sampling) -> None:
        ids_1T, positions_1T = turn.inputs(self._device)
        x = ids_1T if self._stage.is_first else self._received(turn.length)
        given: Any = self._stage(self._stage.handed(x, positions_1T, ids_1T), turn.caches[0])
        if self._stage.is_last:
            self._tell(_choose(self._stage, given, turn, sampling))
        else:
            dist.send(given[0].contiguous(), self._ranks[self._own + 1])

    def token(self, turn: Turn) -> int:
        if self._stage.is_last:
            return self._chosen.popleft()
        token = torch.empty(1, dtype=torch.int64)
        dist.recv(token, self._ranks[-1], group=self._group)
        return int(token)

    def finish(self) -> None:
        while self._sent:
            self._arrived()

    def _received(self, length: int) -> Tensor:
        """The hidden state [1, T, D] of the stage before."""
        width = carried_width(self._stage.model)
        hidden_1TD = torch.empty(1, length, width, dtype=self._dtype, device=self._device)
        dist.recv(hidden_1TD, self._ranks[self._own - 1])
        return hidden_1TD

    def _tell(self, token: int) -> None:
        """Say `token` to all other stages, without waiting: they may be sending, and a send waits for its receiver."""
        self._chosen.append(token)
        told = torch.tensor([token])
        self._sent.append(([dist.isend(told, rank, group=self._group) for rank in self._ranks[:-1]], told))
        if len(self._sent) > self.in_flight:  # all have read it: the prompt that it belongs to has come round again
            self._arrived()

    def _arrived(self) -> None:
        works, _ = self._sent.popleft()
        for work in works:
            if work is not None:
                work.wait()


def _choose(last: Stage, normed_1TD: Tensor, turn: Turn, sampling: Sampling) -> int:
    logits_V = logit_transform(last.model.config).apply(last.head(normed_1TD[0, -1])).float()
    return sampling.choose(logits_V, turn.noise)
