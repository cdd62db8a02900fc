"""What a model hands its layers: the axes of the hidden state, and whether the token ids are needed again at each layer.

Takes a model whose parts are known; runs it with its layers left out, so that it costs next to nothing, and looks at what
these are called with. Nothing is known by a model's name.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from pipeline.model.structure.parts import Parts, layers_of_model

ROWS, TOKENS = 5, 11  # of the two runs: sizes by which the axes are told apart, and no usual number of streams
WIRE = "BTSD"  # the axes of what crosses a stage boundary, where there are several streams; the last two are one there


@torch.no_grad()
def with_handed(model: PreTrainedModel, parts: Parts) -> Parts:
    """`parts` of `model`, which has them already, with what its layers are handed. A model that does not run without its
    layers is taken to hand them a hidden state [B, T, D] and nothing of the ids; the trial of the cut says whether it does."""
    found = parts
    with suppress(Exception):  # whatever the model's code raises where its layers do nothing
        generator = torch.Generator().manual_seed(3)
        ids = [torch.randint(8, 64, (ROWS, TOKENS), generator=generator) for _ in range(2)]
        (shape, first), (_, second) = (_called_with(model, parts, one) for one in ids)
        axes, streams = _axes(shape, found)
        rereads = len(first) != len(second) or any(
            a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=True)
        )
        found = replace(parts, axes=axes, streams=streams, rereads_ids=rereads)
    return found


def to_wire(parts: Parts, hidden: Tensor) -> Tensor:
    """What a layer is given, as it crosses a stage boundary: [B, T, S·D], of one stream as it is."""
    if parts.streams == 1:
        return hidden
    return hidden.permute(*(parts.axes.index(axis) for axis in WIRE)).flatten(2)


def from_wire(parts: Parts, carried: Tensor) -> Tensor:
    """The inverse of `to_wire`."""
    if parts.streams == 1:
        return carried
    apart = carried.unflatten(2, (parts.streams, -1))
    return apart.permute(*(WIRE.index(axis) for axis in parts.axes)).contiguous()


def _axes(shape: torch.Size, parts: Parts) -> tuple[str, int]:
    """The axes of a hidden state of ROWS rows of TOKENS tokens, and its streams. ValueError for one of other axes."""
    if len(shape) == 3:
        return parts.axes, parts.streams
    names = {ROWS: "B", TOKENS: "T"}
    axes = "".join(names.pop(size, "S") for size in shape[:-1]) + "D"
    if sorted(axes) != sorted(WIRE):
        raise ValueError(f"a hidden state of axes {axes}")
    return axes, shape[axes.index("S")]


def _called_with(model: PreTrainedModel, parts: Parts, ids_BT: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """(shape of the hidden state, the other tensors that all layers are given), the layers left out."""
    shapes: list[torch.Size] = []
    others: list[Tensor] = []

    def called(items: int | None, *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = (*args, *kwargs.values())
        shapes.append(hidden.shape)
        others.extend(leaf for leaf in tree_leaves(rest) if isinstance(leaf, Tensor))
        return hidden if items is None else (hidden, *[None] * (items - 1))

    with _left_out(model, parts, called):
        model(input_ids=ids_BT, use_cache=False)
    return shapes[0], others


@contextmanager
def _left_out(model: PreTrainedModel, parts: Parts, called: Any) -> Iterator[None]:
    """Inside, layers are not run: `called` is, with the number of things that one returns and what it is given."""
    layers = layers_of_model(model)
    for layer, items in zip(layers, parts.tuples or [None] * len(layers), strict=True):
        layer.forward = lambda *args, _items=items, **kwargs: called(_items, *args, **kwargs)  # type: ignore[method-assign, assignment, misc]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
