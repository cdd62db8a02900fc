"""What a reference that runs in every step adds to a model's cost: it has rows of its own, which run forward alone.

Takes a model's cost for the policy's rows; gives that of both. Everything is per token of the policy, as in `ModelCost`.
"""

from collections.abc import Collection

from pipeline.planning.quantities import LayerCost, ModelCost, Work


def with_reference(
    cost: ModelCost, share: float, *, through: int, tapped: Collection[int], scores: bool, head: bool
) -> ModelCost:
    """`share`: the reference's rows for each of the policy's. It runs layers below `through`, and the head where it `scores`.

    At the output of each layer of `tapped` its states are kept for backward. `head`: whether the policy's head is run.
    """
    layers = [
        _layer(layer, share if index < through else 0.0, cost.hidden_bytes * share if index in tapped else 0.0)
        for index, layer in enumerate(cost.layers)
    ]
    whole = cost.head.work
    # Half of the head's work is the product forward, half that of the hidden state's gradient.
    times = (1 + share / 2 * scores) if head else 0.0
    work = Work(whole.flops * times, whole.elementwise_bytes * times)
    own_head = cost.head._replace(work=work, working_bytes=cost.head.working_bytes if head else 0)
    return cost._replace(layers=layers, head=own_head, reference_bytes=round(cost.hidden_bytes * share))


def _layer(layer: LayerCost, share: float, kept: float) -> LayerCost:
    forward = Work(layer.forward.flops * (1 + share), layer.forward.elementwise_bytes * (1 + share))
    levels = {level: one._replace(kept_bytes=one.kept_bytes + kept) for level, one in layer.levels.items()}
    return layer._replace(forward=forward, levels=levels)
