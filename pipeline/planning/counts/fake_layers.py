"""One decoder layer at its real dimensions on fake tensors, run as the model itself would run it.

Takes a model (or a stage's model) whose parameters are on `meta`, and a layer's index; gives a function that runs this
layer alone on a hidden state of so many tokens, for counting. Nothing of the model's size is allocated or computed.

The model's own base forward is run once with every other layer replaced by a pass-through, to learn what it calls the
layer with: masks, RoPE tables and positions are the model's own, for any family. They are made before counting starts,
as in a run all layers share them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, masking_utils

from pipeline.model.stage import run_base
from pipeline.model.structure.handed import from_wire
from pipeline.model.structure.parts import carried_width, layers_of_model, parts_of, text_config
from pipeline.model.structure.stand_ins import PassThrough, only_layers
from pipeline.planning.counts.counting import received


@contextlib.contextmanager
def layer_alone(
    model: PreTrainedModel, index: int, tokens: int, *, rows: int = 1, gradients_enter: bool = True
) -> Iterator[Callable[[], Tensor]]:
    """Within this context, a function that runs layer `index` of `model` and returns its output [rows, tokens, D].

    `model` is as `pipeline.model.stage.empty_model` makes it, whole or cut down by a Stage, with whatever has been put
    into the layer: adapters, kernels, recomputation (which may be wrapped around its forward in here as well). The layer's
    parameters are fake CPU tensors inside, and what they were afterwards. `gradients_enter`: whether the hidden state that
    the layer receives wants a gradient; it does not on and below the first layer that is trained.
    """
    layer = layers_of_model(model)[index]
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        GroupedProductsOfAnyDtype(),
        fake_parameters(layer),
        fake_parameters(_what_ids_need(model)),
        _one_document_a_row(),
    ):
        shape, parts = (rows, tokens, carried_width(model)), parts_of(model)
        args, kwargs = _what_it_is_called_with(model, index, rows, tokens)

        def run() -> Tensor:
            output = layer(from_wire(parts, received(shape, model.dtype, gradients_enter)), *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output

        yield run


def _what_ids_need(model: PreTrainedModel) -> nn.Module:
    """What runs before the layers, where these are given something made of the token ids; else nothing."""
    parts = parts_of(model)
    names = (parts.embedding, *parts.entry) if parts.rereads_ids else ()
    return nn.ModuleList(map(model.get_submodule, names))


@contextlib.contextmanager
def fake_parameters(layer: nn.Module) -> Iterator[None]:
    """Under a FakeTensorMode: the layer's parameters, and buffers that are on `meta`, as fake CPU tensors in its modules.

    In place and not in a copy: forwards that kernels or recomputation have replaced refer to these modules.
    """
    held: list[tuple[dict[str, Any], str, Tensor]] = [
        (tensors, name, tensor)
        for module in layer.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and (tensors is module._parameters or tensor.is_meta)
    ]
    fakes: dict[int, Tensor] = {}
    for parameters, name, real in held:
        if id(real) not in fakes:
            fake = torch.empty(real.shape, dtype=real.dtype)
            plain = not isinstance(real, nn.Parameter)
            fakes[id(real)] = fake if plain else nn.Parameter(fake, requires_grad=real.requires_grad)
        parameters[name] = fakes[id(real)]
    try:
        yield
    finally:
        for parameters, name, real in held:
            parameters[name] = real


@contextlib.contextmanager
def _one_document_a_row() -> Iterator[None]:
    """Tell transformers that positions do not restart within a row, which it cannot read from fake ones.

    transformers 5.23 and 5.24 take every row of fake positions to be packed and build a mask [T, T] for it, with which
    attention computes twice the products of a causal one. tests/planning/test_fake_layers.py fails when this is no longer needed.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


class GroupedProductsOfAnyDtype(TorchDispatchMode):
    """Grouped products of experts on fake tensors that are not bf16, which torch 2.13 refuses and computes on real ones.

    tests/planning/test_fake_layers.py fails when this is no longer needed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        one, other, ends = args[:3]
        groups = (len(ends),) if one.dim() == other.dim() == 2 else one.shape[:1] if one.dim() == other.dim() else ()
        return one.new_empty((*groups, one.shape[-2], other.shape[-1]))


class _Recorder(PassThrough):
    """Stands where the layer was; notes what it is called with beside the hidden state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called_with = args[1:], kwargs
        return super().forward(*args, **kwargs)


@torch.no_grad()
def _what_it_is_called_with(
    model: PreTrainedModel, index: int, rows: int, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parts, layers = parts_of(model), layers_of_model(model)
    items = parts.tuples or [None] * len(layers)
    recorder = _Recorder(layers[index], items[index])
    others = [recorder if i == index else PassThrough(other, items[i]) for i, other in enumerate(layers)]
    positions = torch.arange(tokens).unsqueeze(0).expand(rows, -1)
    width = text_config(model.config).hidden_size
    given = (
        {"input_ids": torch.zeros_like(positions)}
        if parts.rereads_ids
        else {"inputs_embeds": torch.empty(rows, tokens, width, dtype=model.dtype)}
    )
    with only_layers(model, others):
        run_base(model, positions, **given)
    return recorder.called_with
