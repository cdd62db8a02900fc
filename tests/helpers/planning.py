"""Command-R 35B's cost by formula, for tests of the planner: performance.md's figures, not those of our own counting."""

import bisect
import itertools
from collections.abc import Callable
from typing import Any

from pipeline.model.memory.levels import RecomputeLevel
from pipeline.planning.cut import Choice, Ranges
from pipeline.planning.quantities import HeadCost, LayerCost, LevelCost, ModelCost, Rates, Work

D, F, V, L, RANK = 8192, 22528, 256000, 40, 64
P_LAYER = 4 * D * D + 3 * D * F  # 822 M: key width is D
GIB = 2**30

# What is kept (bytes per token and layer), and what 39 layers then execute per token in all (FLOPs).
KEPT = {
    RecomputeLevel.INPUT: 16.4e3,
    RecomputeLevel.ADAPTER: 16.5e3,
    RecomputeLevel.ATTENTION: 33.2e3,
    RecomputeLevel.PROJECTIONS: 82.3e3,
    RecomputeLevel.EVERYTHING: 172.4e3,
}
TOTAL = {
    RecomputeLevel.INPUT: 230.2e9,
    RecomputeLevel.ADAPTER: 206.9e9,
    RecomputeLevel.ATTENTION: 201.7e9,
    RecomputeLevel.PROJECTIONS: 186.0e9,
    RecomputeLevel.EVERYTHING: 157.2e9,
}

A6000 = Rates(0.7 * 154.8e12, 0.85 * 768e9, 24e9, 24e9, 24e9, "test")


def command_r(tokens: int = 8192, *, fused: bool = True) -> ModelCost:
    """bf16, a multiplicative adapter of rank 64 on all layers but the last."""
    attention = 2 * tokens * D
    forward_bytes, backward_bytes = (2.6e9, 4.5e9) if fused else (14.3e9, 24.3e9)  # of a layer at 8192 tokens
    forward = Work(2 * P_LAYER + attention + 4 * D * RANK, forward_bytes / 8192)
    backward = Work(2 * P_LAYER + 2.5 * attention + 8 * D * RANK, backward_bytes / 8192)
    levels = {
        level: LevelCost(
            KEPT[level],
            Work(
                (TOTAL[level] - TOTAL[RecomputeLevel.EVERYTHING]) / (L - 1),
                forward.elementwise_bytes * (level < RecomputeLevel.EVERYTHING),
            ),
        )
        for level in RecomputeLevel
    }
    working = 3 * 2 * F + 4 * 2 * D  # gradients of gate, up and their product; of the hidden state on its way
    adapter = 2 * RANK * D * (2 + 4 + 2 + 4 + 4)  # bf16, its fp32 sum, two moments, Kahan's term
    layer = LayerCost(2 * P_LAYER, adapter, forward, backward, levels, working)
    first = layer._replace(backward=Work(6 * D * RANK))
    head = HeadCost(2 * V * D, 0, Work(4 * V * D), int(1.3e9))
    # Its first layer's backward ends at its adapter: it keeps z, and nothing is computed again.
    first = first._replace(levels={level: LevelCost(2.0 * RANK, Work(0.0)) for level in RecomputeLevel})
    return ModelCost(
        [first, *[layer] * (L - 2), layer._replace(trained_bytes=0)], 2 * V * D, 0, head, 2 * D, 0, tied=True
    )


def split_by_every_range(
    choices: Callable[[int, int, int], list[Choice[Any]]],
    n_layers: int,
    n_stages: int,
    host_bytes: float,
    ranges: Ranges | None,
    may_fall_at: int = 0,
) -> list[tuple[int, int, Choice[Any]]] | None:
    """What `cut.best_split` finds, by a look at every range of layers of every stage."""
    of_stages: list[dict[int, list[tuple[int, list[Choice[Any]]]]]] = []  # by the beginning of the stage's layers
    for stage, of_stage in enumerate([[one] for one in ranges] if ranges else _every_cut(n_layers, n_stages)):
        of_stages.append({})
        for first, end in of_stage:
            if of_cut := choices(stage, first, end):
                of_stages[-1].setdefault(first, []).append((end, of_cut))

    def within(limit: float) -> tuple[float, float, list[int], list[Choice[Any]]] | None:
        best: dict[int, tuple[float, float, list[int], list[Choice[Any]]]] = {0: (0.0, 0.0, [0], [])}
        for of_stage in of_stages:
            longer: dict[int, tuple[float, float, list[int], list[Choice[Any]]]] = {}
            for first, (host, squares, ends, chosen) in best.items():
                for end, of_cut in of_stage.get(first, ()):
                    if choice := next((c for c in of_cut if c.value <= limit), None):
                        added = (host + choice.host_bytes, squares + choice.value**2, [*ends, end], [*chosen, choice])
                        if end not in longer or added[:3] < longer[end][:3]:
                            longer[end] = added
            best = longer
        return best[n_layers] if n_layers in best and best[n_layers][0] <= host_bytes else None

    limits = sorted({c.value for of in of_stages for each in of.values() for _, of_cut in each for c in of_cut})
    at = bisect.bisect_left(limits, True, key=lambda limit: within(limit) is not None)
    if at == len(limits) or (best := within(limits[at])) is None:
        return None
    return [(first, end, choice) for (first, end), choice in zip(itertools.pairwise(best[2]), best[3], strict=True)]


def _every_cut(n_layers: int, n_stages: int) -> list[Ranges]:
    """For each stage, the ranges that leave at least one layer to every other stage."""
    return [
        [
            (a, b)
            for a in ([0] if stage == 0 else range(stage, n_layers))
            for b in range(a + 1, n_layers - (n_stages - stage - 1) + 1)
            if stage < n_stages - 1 or b == n_layers
        ]
        for stage in range(n_stages)
    ]
