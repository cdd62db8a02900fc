"""Stages of a saved model in this process, and the whole model they must equal."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pipeline.model import weights
from pipeline.model.stage import Stage, empty_model, read_model_config
from tests.helpers.builders import VOCABULARY

CPU = torch.device("cpu")


def build(folder: Path, first: int, end: int, dtype: torch.dtype = torch.float32) -> Stage:
    """Layers [first, end) of the model in `folder`, loaded, in eval mode."""
    stage = Stage(empty_model(read_model_config(str(folder)), dtype, None), first, end)
    weights.load(stage, str(folder), dtype, CPU)
    return stage.eval()


def chain(folder: Path, cuts: list[int], dtype: torch.dtype = torch.float32) -> list[Stage]:
    """Stages between consecutive `cuts`, e.g. [0, 1, 4] for two stages of a model of four layers."""
    return [build(folder, first, end, dtype) for first, end in pairwise(cuts)]


def hidden(stages: list[Stage], ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
    """The normed hidden state [B, T, D] of the last stage; positions count from 0 unless given."""
    if positions_BT is None:
        positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    carried = (ids_BT, positions_BT)
    for stage in stages:
        carried = stage(carried)
    return carried


def token_ids(rows: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Random ids [B, T] without the special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
