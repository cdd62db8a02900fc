"""A base model for a command that runs it: looked at first, then read, whole or a stage of it in each of several processes.

Takes a model's folder; gives what can be known of it without its weights, and then the stage of this process. Raises UserError
before a weight is read where the folder is wrong, or the model cannot be cut.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.artifacts.fold.warnings import other_base
from pipeline.artifacts.fold_history import earlier_folds
from pipeline.console import RankError, UserError, log_if_slow, warn
from pipeline.formats.base_model import Base, read_base, warn_of_remarks
from pipeline.formats.device import usable_device
from pipeline.formats.fingerprint import fingerprint
from pipeline.formats.hub import model_folder
from pipeline.generation.adapter import Saved
from pipeline.model import cut_check, quantized, unsupported, weights
from pipeline.model.stage import Stage, check_head, empty_model, read_model_config
from pipeline.model.structure.parts import head_of_model, layers_of_model
from pipeline.model.trial import attention_check
from pipeline.planning.cut import balanced, explicit

WAITS_AT_MOST = timedelta(days=7)  # for whoever sits at the terminal


class Found(NamedTuple):
    """A base that can be run. `whole`: without weights, for its structure. `ranges`: each stage's layers [first, end). `scheme`:
    in which its weights are quantised as they are read."""

    folder: str
    base: Base
    config: PretrainedConfig
    whole: PreTrainedModel
    dtype: torch.dtype
    attention: str | None
    ranges: list[tuple[int, int]]
    scheme: quantized.Scheme | None = None


def meet(device: str | None) -> torch.device:
    """This process's device. Where a launcher started several processes, they find each other."""
    on_gpu = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return usable_device(device or ("cuda" if on_gpu else "cpu"))
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(found)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAITS_AT_MOST)
    return found


def part() -> None:
    """The end of `meet`: wait for the others, if there are any."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def look(
    folder: Path,
    key: str,
    n_stages: int,
    *,
    dtype: torch.dtype | None,
    attention: str | None = None,
    layers_per_stage: list[int] | None = None,
    scheme: quantized.Scheme | None = None,
) -> Found:
    """All that can be known without reading a weight. `key`: what named the folder. `dtype`: None is the model's own.

    A `folder` that is a name on the Hub is downloaded.
    """
    folder = Path(model_folder(folder, key))
    config = read_model_config(str(folder))
    base = read_base(folder, key)
    dtype = dtype or config.dtype or torch.float32
    with unsupported.named(config.model_type, "looking at its structure"):
        whole = empty_model(config, dtype, attention)
        weights.check_complete(whole, base)
    warn_of_remarks(base)
    if scheme:
        quantized.put_placeholders(whole, scheme)
        if stacked := quantized.marked_within(whole):
            quantized.check_experts(config, stacked)
    ranges = explicit(layers_per_stage, len(layers_of_model(whole))) if layers_per_stage else _ranges(whole, n_stages)
    with log_if_slow("trying out a tiny copy of the model"):
        attention_check.check(config, attention, dtype)
        cut_check.check(config, ranges)
    return Found(str(folder), base, config, whole, dtype, attention, ranges, scheme)


def warn_of_another_base(base: Base, saved: Saved) -> None:
    """Where the adapter was trained on another."""
    now = fingerprint(base) if saved.adapter.base_fingerprint else ""
    if doubt := other_base(base, saved.adapter, earlier_folds(base.folder), now):
        warn(doubt)


@contextmanager
def said_here() -> Iterator[None]:
    """What one process alone finds wrong it says itself, and ends: the launcher then ends the others."""
    try:
        yield
    except UserError as error:
        if dist.is_initialized():
            raise RankError(str(error), error.exit_code) from error
        raise


def read_stage(found: Found, number: int, device: torch.device) -> Stage:
    """Stage `number`, with its weights, in eval mode."""
    with log_if_slow("reading the weights"), unsupported.named(found.config.model_type, "putting its stage together"):
        empty = empty_model(read_model_config(found.folder), found.dtype, found.attention)
        if found.scheme:
            quantized.put_placeholders(empty, found.scheme)
        stage = Stage(empty, *found.ranges[number])
        if found.scheme:
            from pipeline.model import quantized_bnb

            quantized_bnb.put_in(stage)
        weights.load(stage, found.folder, found.dtype, device)
        stage.to(device)
        if stage.is_last:
            check_head(stage)
    return stage.eval()


def _ranges(whole: PreTrainedModel, n_stages: int) -> list[tuple[int, int]]:
    """Each stage's layers, balanced by the weights that are read for a token."""
    sizes = [float(sum(p.numel() for p in layer.parameters())) for layer in layers_of_model(whole)]
    head: Any = head_of_model(whole)
    return balanced(sizes, float(head.weight.numel()), n_stages)
