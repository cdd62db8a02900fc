"""PEFT's types with trained tensors that several modules share: VBLoRA's bank, UniLoRA's vector, TinyLoRA's vectors.

Takes PEFT's layers of some of an adapter's modules, and the shapes of all of them in the model's order; gives the layers what
they have where all modules are together: the indices that are dealt out over all, projections by a module's place, which vector
is whose. Imported by layers.py alone.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.unilora import UniLoraModel
from torch import Tensor, nn

Shape = tuple[int, int]  # D_out, D_in
Layers = Mapping[str, Any]


def settle(layers: Layers, peft_type: str, config: Any, shapes: Mapping[str, Shape], adapter: str) -> None:
    """As the layers are among all modules, of `shapes`; `adapter`: PEFT's name of it."""
    if peft_type == "UNILORA":
        _deal_indices(layers, config, shapes, adapter)
    if peft_type == "TINYLORA":
        _take_places(layers, config, list(shapes), adapter)


def held(layer: Any, peft_type: str, adapter: str) -> dict[str, nn.Parameter]:
    """What a layer shares with others, by its name in an adapter."""
    if peft_type == "VBLORA":
        return {"vblora_vector_bank": layer.vblora_vector_bank[adapter]}
    if peft_type == "UNILORA":
        return {"unilora_theta_d": layer.unilora_theta_d[adapter]}
    key = layer._tinylora_v_key[adapter]
    return {f"tinylora_v.{key}": layer.tinylora_v[adapter][key]}


def own(layer: Any, peft_type: str, config: Any, adapter: str) -> dict[str, Tensor]:
    """What a layer has for itself, trained or frozen, by its names in a file."""
    if peft_type == "VBLORA":
        return {name: getattr(layer, name)[adapter].detach() for name in ("vblora_logits_A", "vblora_logits_B")}
    if peft_type == "UNILORA":
        return {}
    names = ["tinylora_A", "tinylora_B", *(["tinylora_P"] if config.save_projection else [])]
    return {name: getattr(layer, name)[adapter] for name in names}


@torch.no_grad()
def draw(
    layers: Layers, peft_type: str, config: Any, drawn: Callable[[str], AbstractContextManager[None]], adapter: str
) -> None:
    """The start, each tensor from a generator of its name's own (`drawn`), so that it does not depend on which layers there
    are."""
    for name, layer in layers.items():
        if peft_type == "VBLORA":
            with drawn(name):
                layer.reset_vblora_logits(adapter, config.init_logits_std)
        for own_name, parameter in held(layer, peft_type, adapter).items():
            with drawn(own_name):
                _start(parameter, peft_type, config)


def _start(parameter: nn.Parameter, peft_type: str, config: Any) -> None:
    if peft_type == "VBLORA":
        nn.init.uniform_(parameter, -config.init_vector_bank_bound, config.init_vector_bank_bound)
    elif peft_type == "UNILORA" and config.init_weights:
        nn.init.uniform_(parameter, -config.init_theta_d_bound, config.init_theta_d_bound)
    elif peft_type == "UNILORA":
        nn.init.normal_(parameter)
    elif config.init_weights == "uniform":
        nn.init.uniform_(parameter, -config.init_v_bound, config.init_v_bound)
    else:
        nn.init.zeros_(parameter)


def _deal_indices(layers: Layers, config: Any, shapes: Mapping[str, Shape], adapter: str) -> None:
    """UniLoRA's: balanced over all numbers of all modules' A and B, in the model's order
    (`UniLoraModel._assign_unilora_indices_and_scales`)."""
    counts = {name: config.r * (rows + columns) for name, (rows, columns) in shapes.items()}
    indices = UniLoraModel.generate_index(sum(counts.values()), config.theta_d_length, config.proj_seed)
    used = torch.bincount(indices, minlength=config.theta_d_length)
    factors = torch.where(used > 0, used.float().rsqrt(), 0.0)
    first = 0
    for name, (_, columns) in shapes.items():
        if name in layers:
            layer, of_A = layers[name], config.r * columns
            for held_as, start, end in (("A", 0, of_A), ("B", of_A, counts[name])):
                buffer = getattr(layer, f"unilora_indices_{held_as}")
                buffer[adapter] = indices[first + start : first + end].view(buffer[adapter].shape).clone()
            scales = [factors[getattr(layer, f"unilora_indices_{letter}")[adapter]] for letter in "AB"]
            layer.update_scaling(adapter, *scales)
        first += counts[name]


def _take_places(layers: Layers, config: Any, names: list[str], adapter: str) -> None:
    """TinyLoRA's: a module's place among all says its projections and which vector it shares
    (`TinyLoraModel._create_and_replace`)."""
    groups = max(1, round(len(names) * (1.0 - config.weight_tying)))
    size = max(1, len(names) // groups)
    vectors: dict[str, nn.Parameter] = {}
    for place, name in enumerate(names):
        if name not in layers:
            continue
        layer, key = layers[name], str(min(place // size, groups - 1))
        before = layer.tinylora_v[adapter][layer._tinylora_v_key[adapter]]
        vectors.setdefault(key, nn.Parameter(torch.empty_like(before)))
        layer._layer_idx, layer._tinylora_v_key[adapter] = place, key
        layer._init_projection(adapter, config.u, config.projection_seed)
        device = layer.tinylora_A[adapter].device
        layer.tinylora_P[adapter] = layer.tinylora_P[adapter].to(device)
    next(iter(layers.values())).tinylora_v[adapter] = nn.ParameterDict(vectors)  # one module of all layers
