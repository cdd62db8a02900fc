"""A saved adapter in a stage, as it was trained: of this program, of PEFT, or of the founding method's.

Takes an adapter's folder, its base and a stage with the base's weights; puts into the stage what training puts there:
h + s·B·A·h, or PEFT's LoRA. The families that are no pair, and pairs that training does not make, are folded into a weight
beside the base's, in fp32 and rounded once, as merge_lora.py folds them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.artifacts.adapter.adapter import Adapter, Pair
from pipeline.artifacts.adapter.maps import RowFactors, WholeWeight
from pipeline.artifacts.adapter.parameters import Placed, placed
from pipeline.artifacts.adapter.read import load_adapter
from pipeline.artifacts.fold.match import match
from pipeline.artifacts.fold.ties import settled
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA, MULTIPLICATIVE, Kind
from pipeline.formats.base_model import Base
from pipeline.formats.stored_names import running_parameters
from pipeline.model.adapters.base import owned, trainable, wrap
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.adapters.parameters import inject as inject_parameters
from pipeline.model.adapters.parameters import wrapper_of
from pipeline.model.quantized import PackedLinear
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import layers_of_model
from pipeline.names import HEAD, is_embedding, layer_of


class Folded(nn.Module):
    """A linear layer with another weight, beside the one that it had."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base_layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out]."""
        return nn.functional.linear(x, self.weight, self.bias)


class Saved(NamedTuple):
    """An adapter as its files have it, and of which family it is: where they leave that open, as its shapes or the user say.

    `shapes`: of PEFT's own types, of all modules. `parameters`: LoRAs of parameters, by their names."""

    adapter: Adapter
    kind: str
    shapes: Mapping[str, tuple[int, int]]
    parameters: dict[str, Placed]


def read(folder: Path, base: Base, kind: Kind | None) -> Saved:
    """The adapter in `folder`, which fits the base. `kind`: the user's word where the files leave it open.

    UserError where it does not fit, or has a pair for what is no part of a layer, where a fold alone can put it.
    """
    settled_base, (adapter,), apart = settled(base, [load_adapter(folder)])
    part = match(settled_base, adapter, kind=kind, kind_is_meant=kind is not None, scale=1.0, layers=None)
    if outside := [name for name in adapter.modules if layer_of(name) is None]:
        raise UserError(
            f"{folder}: it adapts {outside[0]}, which is no part of a layer; fold it (merge_lora.py) and give the merged folder"
        )
    table = next((name for name in adapter.full if is_embedding(name.removesuffix(".weight"))), None)
    if table and not apart and HEAD not in base.tensors:  # the head is the embedding, also where it is on another stage
        adapter = replace(adapter, full={**adapter.full, HEAD: adapter.full[table]})
    shapes = [one.shapes for maps in part.adapter.maps.values() for one in maps if isinstance(one, WholeWeight)]
    running = running_parameters(base) if adapter.of_parameters else {}
    of_parameters = placed(adapter, {name: parameter.shape for name, parameter in running.items()})
    return Saved(adapter, part.kind, shapes[0] if shapes else {}, of_parameters)


@torch.no_grad()
def put(stage: Stage, saved: Saved) -> None:
    """The adapter on those of its modules that the stage owns, and in the place of the weights that it has in full."""
    mine = owned(stage, list(saved.adapter.modules))
    for name, tensor in saved.adapter.full.items():
        _replace(stage, name, tensor)
    pairs = {n: p for n in mine if (p := saved.adapter.pairs.get(n)) and _trains_so(stage, n, saved, p)}
    if saved.kind == MULTIPLICATIVE:
        wrap(stage, list(pairs), lambda name, layer: _multiplicative(layer, pairs[name]))
    else:
        _put_lora(stage, pairs)
    rest = [name for name in mine if name not in pairs]
    wrap(stage, rest, lambda name, layer: Folded(layer, *_folded(layer, saved, name)))
    for name in owned(stage, list(saved.parameters)):
        _put_on_parameter(stage, saved, name)


@contextmanager
def worn(stage: Stage, saved: Saved | None) -> Iterator[None]:
    """Inside, the stage has the adapter, if one is given; afterwards it has the very modules and weights it had before."""
    if saved is None:
        yield
        return
    holders = [name.rpartition(".")[0] for name in saved.parameters]
    modules = {name: stage.model.get_submodule(name) for name in owned(stage, [*saved.adapter.modules, *holders])}
    weights = [(*place, getattr(*place)) for name in saved.adapter.full for place in _places(stage, name)]
    try:
        put(stage, saved)
        yield
    finally:
        for name, module in modules.items():
            stage.model.set_submodule(name, module)
        vars(layers_of_model(stage.model)).pop(
            "peft_config", None
        )  # by which PEFT would take the next one for a second
        for owner, own, weight in weights:
            setattr(owner, own, weight)


def not_beside(saved: Saved) -> str | None:
    """A module whose weight the adapter changes itself, rather than standing beside it; None where there is none."""
    pairs = saved.adapter.pairs
    return next((name for name in saved.adapter.modules if name not in pairs or pairs[name].bias is not None), None)


def _trains_so(stage: Stage, name: str, saved: Saved, pair: Pair) -> bool:
    """Whether training makes such a pair: stock PEANUT leaves a bias out, and lora_bias moves one."""
    biased = getattr(stage.model.get_submodule(name), "bias", None) is not None
    return pair.bias is None and (saved.kind == LORA or saved.adapter.moves_bias or not biased)


def _multiplicative(layer: nn.Module, pair: Pair) -> nn.Module:
    device = next(layer.parameters()).device
    made = MultiplicativeLoRA(layer, len(pair.A), 1.0, 0.0, pair.A.dtype, device, width=len(pair.B))
    made.A.copy_(pair.A)
    made.B.copy_(pair.B)
    made.scaling = pair.scaling
    return made.requires_grad_(False)


def _put_lora(stage: Stage, pairs: dict[str, Pair]) -> None:
    """PEFT's LoRA, of each module's own rank, s and dtype."""
    sizes: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, pair in pairs.items():
        sizes.setdefault((len(pair.A), pair.A.dtype), []).append(name)
    for (rank, dtype), names in sizes.items():
        inject_lora(stage, names, rank, rank, 0.0, dtype, seed=0)
    parameters = trainable(stage)
    for name, pair in pairs.items():
        parameters[f"{name}.A"].copy_(pair.A)
        parameters[f"{name}.B"].copy_(pair.B)
        module: Any = stage.model.get_submodule(name)
        module.scaling["default"] = pair.scaling
        module.requires_grad_(False)


def _put_on_parameter(stage: Stage, saved: Saved, name: str) -> None:
    """PEFT's LoRA of a parameter. UserError where the base is quantised there."""
    one, of = saved.parameters[name], saved.adapter.of_parameters
    assert of is not None, "what is placed was of parameters"
    inject_parameters(stage, [name], one.rank, one.rank, one.A.dtype, seed=0)
    trained = trainable(stage)
    trained[f"{name}.A"].copy_(one.A)
    trained[f"{name}.B"].copy_(one.B)
    wrapper: Any = wrapper_of(stage.model, name)
    wrapper.scaling["default"], _ = of.scaling(name, one.rank)
    wrapper.requires_grad_(False)


def _folded(layer: Any, saved: Saved, name: str) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias with the adapter in them."""
    _check_plain(layer, name)
    device = layer.weight.device
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    for one in saved.adapter.maps.get(name, ()):
        if isinstance(one, WholeWeight):
            weight, bias = replace(one, shapes=saved.shapes, biased=bias is not None).merged(weight, bias)
            continue
        weight = one.on(device)(weight, 0)
        if bias is not None and isinstance(one, RowFactors) and FAMILIES[saved.kind].bias_rule:
            bias = one.on(device)(bias[:, None], 0)[:, 0]
    if (pair := saved.adapter.pairs.get(name)) is not None:
        A, B = pair.A.to(device, torch.float32), pair.B.to(device, torch.float32)
        weight = weight + pair.scaling * (B @ (A @ weight if saved.kind == MULTIPLICATIVE else A))
        if pair.bias is not None:
            moved = pair.scaling * pair.bias.to(device, torch.float32)
            bias = moved if bias is None else bias + moved
    dtype = layer.weight.dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _replace(stage: Stage, name: str, tensor: Tensor) -> None:
    """`tensor` in the place of the parameter, where the stage has it; a tied one is no longer tied."""
    for owner, own in _places(stage, name):
        _check_plain(owner, name)
        there = getattr(owner, own)
        setattr(owner, own, nn.Parameter(tensor.to(there.device, there.dtype), requires_grad=False))


def _check_plain(layer: nn.Module, name: str) -> None:
    """UserError where the weight that is to be another is packed."""
    if isinstance(layer, PackedLinear):
        raise UserError(
            f"the adapter changes the weight of {name} itself, and of a quantised base there is none in 16 bits to change; "
            "leave [quantization], or --base-quant, out"
        )


def _places(stage: Stage, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Where the parameter is in the stage, if it is."""
    if name in dict(stage.model.named_parameters(remove_duplicate=False)):
        module, _, own = name.rpartition(".")
        yield stage.model.get_submodule(module), own
