"""What each part of a model costs by a formula of its weights' shapes: the cost by which a plain start is cut.

Takes a model on `meta`; gives floating-point operations per token of a training step, and bytes of weights. Within
milliseconds, and the same wherever the run is started; counting (counts/) knows more and takes seconds.

Operations are two per weight and use. Frozen weights need the gradient of their input only; trained ones that of their
weight as well.
"""

from collections.abc import Collection
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.model.quantized import saved_bytes
from pipeline.model.structure.parts import head_of_model, layers_of_model, parts_of, text_config
from pipeline.planning.cut import Ranges


class Costs(NamedTuple):
    """Per token: forward and backward FLOPs of each layer and of the head; bytes of weights of each, and the embedding's."""

    layers: list[float]
    head: float
    layer_bytes: list[int]
    embedding_bytes: int
    head_bytes: int
    embedding_everywhere: bool = False  # layers need the token ids


def costs(
    model: PreTrainedModel,
    *,
    first_trained: int | None,
    recompute: bool,
    sequence_len: int,
    in_full: Collection[nn.Parameter] = (),
) -> Costs:
    """Count from the modules' shapes (`meta` tensors do).

    `first_trained`: index of the first layer that runs backward, for an adapter's sake or for that of what is trained
    `in_full` beside it. None: all weights train. `recompute`: layers run forward once more in backward. Attention costs
    2·T·(heads × head size) forward (causal); of experts the share that a token uses counts.
    """
    layers, head, trained = layers_of_model(model), head_of_model(model), {id(parameter) for parameter in in_full}
    parts = parts_of(model)
    attention, active_share = (
        2 * sequence_len * _key_width(text_config(model.config)),
        _active_share(text_config(model.config)),
    )

    def of_weights(module: nn.Module) -> float:
        """The gradients of what is trained in full."""
        return 2.0 * sum(p.numel() for p in module.parameters() if id(p) in trained and p.dim() >= 2)

    per_layer = []
    for index, layer in enumerate(layers):
        dense = sum(p.numel() for name, p in layer.named_parameters() if p.dim() >= 2 and ".experts." not in f".{name}")
        experts = sum(p.numel() for name, p in layer.named_parameters() if ".experts." in f".{name}")
        forward = 2 * (dense + experts * active_share) + attention
        runs_backward = first_trained is None or index >= first_trained
        backward = (2 * forward if first_trained is None else forward + of_weights(layer)) if runs_backward else 0
        per_layer.append(float(forward + backward + (forward if recompute and backward else 0)))
    head_flops = 2.0 * sum(p.numel() for p in head.parameters())
    return Costs(
        layers=per_layer,
        head=head_flops * 3 if first_trained is None else head_flops * 2 + of_weights(head),
        layer_bytes=[_bytes(layer) for layer in layers],
        embedding_bytes=sum(_bytes(model.get_submodule(n)) for n in (parts.embedding, *parts.entry)),
        head_bytes=_bytes(head),
        embedding_everywhere=parts.rereads_ids,
    )


def shares(cost: Costs, ranges: Ranges) -> list[float]:
    """Each stage's share of the cost, between 0 and 1."""
    each = [sum(cost.layers[a:b]) + (cost.head if b == len(cost.layers) else 0.0) for a, b in ranges]
    return [c / sum(each) for c in each]


def stage_bytes(cost: Costs, ranges: Ranges) -> list[int]:
    """Bytes of weights on each stage, with the embedding on the first (or on all) and the head on the last."""
    sizes = [sum(cost.layer_bytes[a:b]) for a, b in ranges]
    for stage in range(len(ranges) if cost.embedding_everywhere else 1):
        sizes[stage] += cost.embedding_bytes
    sizes[-1] += cost.head_bytes
    return sizes


def _key_width(config: PretrainedConfig) -> float:
    """Heads × head size, of the layers' mean where they differ: what attention's own work is proportional to."""
    layers = list(getattr(config, "per_layer_config", None) or [config])
    return sum(map(_key_width_of_layer, layers)) / len(layers)


def _key_width_of_layer(layer: PretrainedConfig) -> int:
    heads = getattr(layer, "num_attention_heads", None) or 1
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _active_share(config: PretrainedConfig) -> float:
    """Experts used per token over experts there are; 1 for a dense model."""
    there = (
        getattr(config, "num_local_experts", None)
        or getattr(config, "num_experts", None)
        or getattr(config, "n_routed_experts", None)
    )
    used = getattr(config, "num_experts_per_tok", None)
    return used / there if there and used else 1.0


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters()) - saved_bytes(module)
