"""What stands on a stage where another stage's modules were: nothing with weights, and nothing that computes.

Takes a model that `stage.empty_model` made, and the layers a stage owns. The model's own code runs as ever; what enters the
first layer is put in where the model would call it, and what leaves is taken where it calls the next stage's first layer, so
whatever a model does before its layers and after them happens once. Only where layers are given something made of the token
ids does what runs before the first one stay on each stage, for the sake of that; its hidden state is thrown away.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.model.structure.parts import Parts, layers_of_model, parts_of


class PassThrough(nn.Module):
    """Stands where another stage's layer was: returns the hidden state it is given, in the form in which the layer does.

    What the model reads of a layer beside calling it (its type, its attention's) is as it was. `items`: of how many things
    the layer returns a tuple, of which the first is the hidden state; None for the hidden state alone.
    """

    def __init__(self, replaced: nn.Module | None = None, items: int | None = None) -> None:
        super().__init__()
        for name, value in _read_of(replaced) if replaced is not None else ():
            if isinstance(value, str | int | float) and not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.items = items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else next(iter(kwargs.values()))
        hidden = self.hidden(given)
        return hidden if self.items is None else (hidden, *[None] * (self.items - 1))

    def hidden(self, given: Any) -> Any:
        """What it hands on, of what it is given."""
        return given


def _read_of(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """A layer's attributes, with those of its family's classes and their properties."""
    for kind in reversed(type(layer).__mro__):
        if kind.__module__.startswith("transformers.models"):
            yield from ((name, getattr(layer, name, None)) for name in vars(kind) if not name.startswith("_"))
    yield from vars(layer).items()


class Arrival(PassThrough):
    """Stands for the first layer on a later stage: what runs before it is not asked, as the hidden state has been through it."""

    arrived: Any = None

    def hidden(self, given: Any) -> Any:
        return self.arrived


class Departure(PassThrough):
    """Stands for the first layer of the next stage, and keeps what that is given."""

    departs: Any = None

    def hidden(self, given: Any) -> Any:
        self.departs = given
        return given


class AddsNothing(nn.Module):
    """Stands for what the first stage adds to the embedding: learned positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())


def put_stand_ins(model: PreTrainedModel, first_layer: int, end_layer: int) -> None:
    """Put something without weights in the place of all that layers [first_layer, end_layer) do not need."""
    parts, layers = parts_of(model), layers_of_model(model)
    items = parts.tuples or [None] * len(layers)
    for index, layer in enumerate(layers):
        if not first_layer <= index < end_layer:
            kind = Departure if index == end_layer else Arrival if index == 0 else PassThrough
            layers[index] = kind(layer, items[index])
    if end_layer < len(layers):
        for name in (*parts.leaving, parts.head):
            model.set_submodule(name, PassThrough())
    if first_layer > 0 and not parts.rereads_ids:
        for name in (parts.embedding, *parts.entry):
            model.set_submodule(name, _for_entry(parts, name))


def _for_entry(parts: Parts, name: str) -> nn.Module:
    return AddsNothing() if name in parts.adds else PassThrough()


@contextmanager
def only_layers(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a whole model whose decoder layers are `layers` and that has nothing else with weights in its base, but for what
    layers need of the token ids."""
    parts = parts_of(model)
    stand_ins: dict[str, nn.Module] = {name: PassThrough() for name in parts.leaving}
    if not parts.rereads_ids:
        stand_ins |= {name: _for_entry(parts, name) for name in parts.entry}
    stand_ins[parts.layers] = nn.ModuleList(layers)
    there = {name: model.get_submodule(name) for name in stand_ins}
    for name, module in stand_ins.items():
        model.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in there.items():
            model.set_submodule(name, module)


@contextmanager
def arrives(model: PreTrainedModel, hidden_BTD: Tensor) -> Iterator[None]:
    """Inside, the hidden state that a model whose first layer is an `Arrival` goes on from."""
    arrival: Any = layers_of_model(model)[0]
    arrival.arrived = hidden_BTD
    try:
        yield
    finally:
        arrival.arrived = None


def departed(model: PreTrainedModel, end_layer: int) -> Tensor:
    """The hidden state that the model's last run has given the next stage's first layer; it is given once."""
    departure: Any = layers_of_model(model)[end_layer]
    hidden_BTD, departure.departs = departure.departs, None
    return hidden_BTD  # type: ignore[no-any-return]
