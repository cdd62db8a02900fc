"""Does a model say with caches of keys and values what it says without? Asked before a weight is read.

Takes the model's config and each stage's layers; a tiny copy (tiny_copy.py) reads a text whole, and through the `Stage`s
some tokens at once and the others one by one. UserError with the model's type where the logits differ, or where it keeps no
cache. Tells as well whether a text may be gone on with by several tokens at once, as a conversation is by its next turn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.model.cut_check import difference, stages_of
from pipeline.model.stage import Stage
from pipeline.model.structure.build import leaves_transform_out, logit_transform
from pipeline.model.tiny_copy import NoCopyError, tiny_copy, token_ids
from pipeline.model.unsupported import named

# Tokens that are read together: four windows of the copy (tiny_copy.WINDOW), the first read longer than one.
ONE_BY_ONE = (8, *[1] * 12)
IN_TURNS = (8, 1, 5, 1, 5)

# Of the largest logit. The copy reads in fp64, so that what rounding makes of a deep copy does not hide anything: most
# families differ by 1e-15, those that compute something in fp32 whatever they are given by up to 2e-5. A layer that forgets,
# or sees what it should not, was off by 0.06 and more.
TOLERANCE = 1e-3


@torch.no_grad()
def check(config: PretrainedConfig, ranges: Sequence[tuple[int, int]], wanted_by: str) -> bool:
    """Whether the model goes on by several tokens at once from a cache; that it does by one is checked.

    `wanted_by`: what the caches are for, with how to do without, for the message.
    """
    kind = config.model_type
    try:
        whole, _ = tiny_copy(config)
    except NoCopyError:  # cut_check.py has said so
        return False
    try:
        with named(kind, "reading token after token with a cache of keys and values, tried on a tiny copy,"):
            right = _read_whole(exact(whole))
            stages = stages_of(whole, ranges)
            off = difference(_read(stages, ONE_BY_ONE), right)
    except UserError as error:
        raise UserError(f"{wanted_by}: {error}") from error
    if off > TOLERANCE:
        raise UserError(
            f"{wanted_by}: model_type '{kind}' reads token after token otherwise than all at once: on a tiny copy, on "
            f"{len(ranges)} stage(s), by {off:.2g} of the largest logit; transformers' cache does not keep what it needs"
        )
    try:
        return difference(_read(stages, IN_TURNS), right) <= TOLERANCE
    except Exception:  # transformers says in many ways that it does not: it is not asked to
        return False


def exact(copy: PreTrainedModel) -> PreTrainedModel:
    """The tiny copy in fp64, where its class runs so; else as it is. In place."""
    if hasattr(copy, "set_experts_implementation"):
        copy.set_experts_implementation("eager")  # the others take no fp64
    try:
        copy.double()(input_ids=token_ids(), use_cache=False)
    except Exception:  # a constant that fp64 does not hold, a tensor that is made fp32
        copy.float()
    return copy


def _read_whole(model: PreTrainedModel) -> Tensor:
    """The logits [T, V] of the uncut model without a cache."""
    logits = model(input_ids=token_ids(sum(ONE_BY_ONE)), use_cache=False).logits[0]
    return logit_transform(model.config).apply(logits) if leaves_transform_out(model.config) else logits


def _read(stages: list[Stage], parts: Sequence[int]) -> Tensor:
    """The same of the stages in a row, with new caches; `parts` tokens at a time."""
    ids = token_ids(sum(parts))
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    caches = [stage.new_cache() for stage in stages]
    logits = []
    for step in zip(ids.split(parts, 1), positions.split(parts, 1), strict=True):
        carried: Any = step
        for stage, cache in zip(stages, caches, strict=True):
            carried = stage(carried, cache)
        logits.append(logit_transform(stages[-1].model.config).apply(stages[-1].head(carried))[0])
    return torch.cat(logits)
