"""Do stages with caches of keys and values say what the uncut model says with its own? Asked before a weight is read.

Takes the model's config and each stage's layers; a tiny copy (tiny_copy.py) reads some tokens at once and others one by
one, whole and through the `Stage`s. UserError with the model's type where the logits differ, or where it keeps no cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.model.cut_check import TOLERANCE, difference, stages_of
from pipeline.model.stage import Stage, cache_argument, logit_transform
from pipeline.model.tiny_copy import NoCopyError, tiny_copy, token_ids
from pipeline.model.unsupported import named

AT_ONCE = 8  # tokens of the copy's twelve; more than its windows hold


@torch.no_grad()
def check(config: PretrainedConfig, ranges: Sequence[tuple[int, int]], wanted_by: str) -> None:
    """`wanted_by`: what the caches are for, with how to do without, for the message."""
    kind = config.model_type
    try:
        whole, _ = tiny_copy(config)
    except NoCopyError:  # cut_check.py has said so
        return
    try:
        with named(kind, "reading token after token with a cache of keys and values, tried on a tiny copy,"):
            found = _through(stages_of(whole, ranges))
            right = _whole(whole)
    except UserError as error:
        raise UserError(f"{wanted_by}: {error}") from error
    if (off := difference(found, right)) > TOLERANCE:
        raise UserError(
            f"{wanted_by}: model_type '{kind}' reads token after token otherwise on {len(ranges)} stage(s) than whole: on a "
            f"tiny copy by {off:.2g} of the largest logit"
        )


def _steps() -> list[tuple[Tensor, Tensor]]:
    """(ids [1, T], positions [1, T]) of what is read together: AT_ONCE tokens, then one and one."""
    ids = token_ids()
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    cuts = [slice(0, AT_ONCE), *(slice(at, at + 1) for at in range(AT_ONCE, ids.shape[1]))]
    return [(ids[:, cut], positions[:, cut]) for cut in cuts]


def _through(stages: list[Stage]) -> Tensor:
    """The logits [TOKENS, V] of the stages in a row."""
    caches = [stage.new_cache() for stage in stages]
    logits = []
    for step in _steps():
        carried: Any = step
        for stage, cache in zip(stages, caches, strict=True):
            carried = stage(carried, cache)
        logits.append(logit_transform(stages[-1].model.config).apply(stages[-1].head(carried))[0])
    return torch.cat(logits)


def _whole(model: PreTrainedModel) -> Tensor:
    """The same of the uncut model, with a cache as `generate` gives it one."""
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    steps = _steps()
    return torch.cat([model(input_ids=i, position_ids=p, use_cache=True, **cache).logits[0] for i, p in steps])
