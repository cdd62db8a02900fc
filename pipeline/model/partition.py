"""Which decoder layers each stage owns.

Takes the cost of each layer, of the embedding and of the head; gives one contiguous range of layers per stage, balanced
so that the slowest stage is as fast as can be (the pipeline runs at its pace), or the user's own split, checked.

Costs are floating-point operations per token of a training step, counted as two per weight and use. Frozen weights need
the gradient of their input only; trained ones that of their weight as well.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from pipeline.console import UserError
from pipeline.model.quantized import saved_bytes


class Costs(NamedTuple):
    """Per token: forward and backward FLOPs of each layer and of the head; bytes of weights of each, and the embedding's."""

    layers: list[float]
    head: float
    layer_bytes: list[int]
    embedding_bytes: int
    head_bytes: int


def costs(
    base: nn.Module,
    head: nn.Module,
    *,
    first_adapted: int | None,
    recompute: bool,
    sequence_len: int,
    key_width: float,
    active_share_of_experts: float = 1.0,
    in_full: Collection[nn.Parameter] = (),
) -> Costs:
    """Count from the modules' shapes (`meta` tensors do).

    `first_adapted`: index of the first layer that runs backward, for an adapter's sake or for that of what is trained
    `in_full` beside it. None: all weights train. `recompute`: layers run forward once more in backward. Attention costs
    2·T·key_width forward (causal).
    """
    trained = {id(parameter) for parameter in in_full}

    def of_weights(module: nn.Module) -> float:
        """The gradients of what is trained in full."""
        return 2.0 * sum(p.numel() for p in module.parameters() if id(p) in trained and p.dim() >= 2)

    per_layer = []
    for index, layer in enumerate(base.layers):  # type: ignore[arg-type]
        dense = sum(p.numel() for name, p in layer.named_parameters() if p.dim() >= 2 and ".experts." not in f".{name}")
        experts = sum(p.numel() for name, p in layer.named_parameters() if ".experts." in f".{name}")
        forward = 2 * (dense + experts * active_share_of_experts) + 2 * sequence_len * key_width
        trained_below = first_adapted is None or index >= first_adapted
        backward = (2 * forward if first_adapted is None else forward + of_weights(layer)) if trained_below else 0
        per_layer.append(float(forward + backward + (forward if recompute and backward else 0)))
    head_flops = 2.0 * sum(p.numel() for p in head.parameters())
    return Costs(
        layers=per_layer,
        head=head_flops * 3 if first_adapted is None else head_flops * 2 + of_weights(head),
        layer_bytes=[_bytes(layer) for layer in base.layers],  # type: ignore[union-attr]
        embedding_bytes=_bytes(base.embed_tokens),  # type: ignore[arg-type]
        head_bytes=_bytes(head),
    )


def split(cost: Costs, n_stages: int) -> list[tuple[int, int]]:
    """Contiguous ranges [first, end) that minimise the largest stage cost; ties go to the split with the smallest spread.

    Exact, by dynamic programming over (stage, first layer): once for the largest cost, once for the sum of squares among
    splits that do not exceed it. Raises UserError with fewer layers than stages.
    """
    n = len(cost.layers)
    check_possible(None, n_stages, n)
    prefix = [0.0]
    for flops in cost.layers:
        prefix.append(prefix[-1] + flops)

    def stage_cost(first: int, end: int) -> float:
        return prefix[end] - prefix[first] + (cost.head if end == n else 0.0)

    def cheapest(add: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
        """Least total and its stages' ends, where `add` puts a stage's cost to the total of those before it."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the end of the stages so far
        for stage in range(1, n_stages + 1):
            ends = [n] if stage == n_stages else range(stage, n - (n_stages - stage) + 1)
            best = {
                end: min((add(c, stage_cost(a, end)), (*cuts, end)) for a, (c, cuts) in best.items() if a < end)
                for end in ends
            }
        return best[n]

    slowest, _ = cheapest(max)
    _, cuts = cheapest(lambda total, c: total + c * c if c <= slowest else math.inf)
    return list(zip((0, *cuts[:-1]), cuts, strict=True))


def explicit(layers_per_stage: list[int], n_layers: int) -> list[tuple[int, int]]:
    """The user's own split as ranges; UserError if it does not add up."""
    check_possible(layers_per_stage, len(layers_per_stage), n_layers)
    ends = [sum(layers_per_stage[: i + 1]) for i in range(len(layers_per_stage))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def check_possible(layers_per_stage: list[int] | None, n_stages: int, n_layers: int) -> None:
    """UserError where the model has fewer layers than stages, or another number than `layers_per_stage` adds up to."""
    if n_stages > n_layers:
        raise UserError(
            f"pipeline_stages = {n_stages}: the model has only {n_layers} decoder layers, and each stage needs one"
        )
    if layers_per_stage and sum(layers_per_stage) != n_layers:
        raise UserError(
            f"layers_per_stage = {layers_per_stage} adds up to {sum(layers_per_stage)} layers, but the model has {n_layers}"
        )


def shares(cost: Costs, ranges: list[tuple[int, int]]) -> list[float]:
    """Each stage's share of the cost, between 0 and 1."""
    each = [sum(cost.layers[a:b]) + (cost.head if b == len(cost.layers) else 0.0) for a, b in ranges]
    return [c / sum(each) for c in each]


def stage_bytes(cost: Costs, ranges: list[tuple[int, int]]) -> list[int]:
    """Bytes of weights on each stage, with the embedding on the first and the head on the last."""
    sizes = [sum(cost.layer_bytes[a:b]) for a, b in ranges]
    sizes[0] += cost.embedding_bytes
    sizes[-1] += cost.head_bytes
    return sizes


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters()) - saved_bytes(module)
