"""Log-probabilities of rows' targets, through the stages of a model.

Takes rows and the stages that this process has; gives for each row the sum over its targets, on every process the same. Rows go
through all stages in micro-batches of similar length, the longest first; over processes a stage works on one micro-batch
while the next stage has the one before. What is left of processes after the stages are replicas, which share the rows.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.microbatch import cut
from pipeline.data.row_store import IGNORED
from pipeline.evaluation.units import Row
from pipeline.kernels.cross_entropy import linear_cross_entropy, tokens_per_block
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.model.structure.parts import carried_width


class Score(NamedTuple):
    """Σ log p of a row's targets, in nats; and whether each is the likeliest token, where that was asked."""

    logprob: float
    greedy: bool


class Links(NamedTuple):
    """Where this process stands: ranks of its replica's stages in their order, which replica it is, of how many.

    `objects`: a group of all processes on a backend for what is on the CPU (gloo).
    """

    ranks: list[int]
    replica: int
    replicas: int
    objects: dist.ProcessGroup


class Scorer:
    """The stages in this process (all of them, or with `links` one) and how rows go through them.

    The stages are in eval mode. `filler`: an id that the model has. `micro_batch_size`: rows, and with `batch_size_tokens`
    tokens with padding instead. `dtype`: of hidden states.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        device: torch.device,
        dtype: torch.dtype,
        filler: int,
        *,
        micro_batch_size: int = 1,
        batch_size_tokens: int | None = None,
        links: Links | None = None,
    ) -> None:
        self._stages, self._device, self._dtype, self._filler = stages, device, dtype, filler
        self._size, self._tokens, self._links = micro_batch_size, batch_size_tokens, links

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that speaks for all."""
        return self._links is None or dist.get_rank() == 0

    def share(self, given: Any) -> Any:
        """What the first process gives, on every process."""
        if self._links is None:
            return given
        told = [given]
        dist.broadcast_object_list(told, 0, group=self._links.objects)
        return told[0]

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Row],
        *,
        greedy: bool = False,
        advance: Callable[[int], object] = lambda n: None,
    ) -> list[Score]:
        """The score of each of `rows`. All processes must come here with the same rows. `advance(n)`: n rows are done."""
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        starts = cut(lengths[order], self._size, self._tokens)
        found: dict[int, Score] = {}
        for number, (start, end) in enumerate(pairwise(starts.tolist())):
            if end > start and (self._links is None or number % self._links.replicas == self._links.replica):
                places = order[start:end].tolist()
                scores = self._forward([rows[place] for place in places], greedy)
                found |= dict(zip(places, scores, strict=False))
            advance(end - start)
        if self._links is not None:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, found, group=self._links.objects)
            found = {place: score for part in gathered for place, score in part.items()}
        return [found[place] for place in range(len(rows))]

    def _forward(self, rows: Sequence[Row], greedy: bool) -> list[Score]:
        """This process's part of a micro-batch; the scores on the last stage, nothing on others."""
        ids, following = padded(rows, self._filler)
        positions = torch.arange(ids.shape[1], device=self._device).expand_as(ids)
        ids = ids.to(self._device)
        first = self._stages[0]
        carried: Any = first.handed(ids if first.is_first else self._received(ids.shape), positions, ids)
        for stage in self._stages:
            carried = stage(carried)
        last = self._stages[-1]
        if last.is_last:
            return scores_of(last, carried, following.to(self._device), greedy)
        assert self._links is not None
        dist.send(carried[0].contiguous(), self._links.ranks[self._links.ranks.index(dist.get_rank()) + 1])
        return []

    def _received(self, shape: torch.Size) -> Tensor:
        """The hidden state [B, T, D] of the stage before."""
        assert self._links is not None
        width = carried_width(self._stages[0].model)
        hidden = torch.empty(*shape, width, dtype=self._dtype, device=self._device)
        dist.recv(hidden, self._links.ranks[self._links.ranks.index(dist.get_rank()) - 1])
        return hidden


def padded(rows: Sequence[Row], filler: int) -> tuple[Tensor, Tensor]:
    """(ids, next) int64 [B, T]: what is read, and at each place the target that follows; of a row's last token nothing does.

    Padded on the right: causal attention keeps padding from what is before it.
    """
    width = max(len(row.ids) for row in rows) - 1
    ids = torch.full((len(rows), width), filler)
    following = torch.full((len(rows), width), IGNORED)
    for place, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[place, : len(row.ids) - 1] = tokens[:-1]
        for start, end in row.spans:
            following[place, start - 1 : end - 1] = tokens[start:end]
    return ids, following


def scores_of(stage: Stage, normed_BTD: Tensor, next_BT: Tensor, greedy: bool) -> list[Score]:
    """The scores of a micro-batch on its last stage. Only where a target follows does a token go through the head."""
    row_N, place_N = (next_BT != IGNORED).nonzero(as_tuple=True)
    labels_N, hidden_ND = next_BT[row_N, place_N], normed_BTD[row_N, place_N]
    head, transform = stage.head, logit_transform(stage.model.config)
    nll_N = linear_cross_entropy(hidden_ND, head.weight, head.bias, labels_N, transform)
    sums = torch.zeros(len(next_BT), dtype=torch.float64, device=nll_N.device).index_add_(0, row_N, -nll_N.double())
    likeliest = torch.ones(len(next_BT), dtype=torch.bool, device=nll_N.device)
    if greedy:
        block = tokens_per_block(len(head.weight), head.weight.dtype)
        for start in range(0, len(labels_N), block):
            chosen = head(hidden_ND[start : start + block]).argmax(-1)  # which the logits' transform does not change
            wrong = chosen != labels_N[start : start + block]
            likeliest[row_N[start : start + block][wrong]] = False
    return [Score(*both) for both in zip(sums.tolist(), likeliest.tolist(), strict=True)]
