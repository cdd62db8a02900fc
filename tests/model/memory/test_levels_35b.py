"""Each level's price at Command-R 35B's dimensions, on fake tensors: performance.md's table within 1 %."""

import itertools

import pytest
import torch
from pipeline.kernels.cross_entropy import LogitTransform
from transformers import CohereConfig

from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.fusion import apply as fusion
from pipeline.model.memory.levels import RecomputeLevel
from pipeline.model.stage import Stage, empty_model
from pipeline.planning.counts.model_cost import model_cost
from pipeline.planning.quantities import ModelCost, Update

pytestmark = pytest.mark.slow  # 20 s of counting

T, RANK, L = 8192, 64, 40
D, V = 8192, 256000
TABLE = {  # bytes per token and layer, GFLOP per token of the whole model
    RecomputeLevel.ADAPTER: (16.5e3, 206.9),
    RecomputeLevel.ATTENTION: (33.2e3, 201.7),
    RecomputeLevel.PROJECTIONS: (82.3e3, 186.0),
    RecomputeLevel.EVERYTHING: (172.4e3, 157.2),
}


@pytest.fixture(scope="module")
def cost() -> ModelCost:
    """Three layers stand for forty: the first with an adapter, one with another before it, the last without."""
    model = empty_model(CohereConfig(num_hidden_layers=3), torch.bfloat16, "sdpa").requires_grad_(False)
    stage = Stage(model, 0, 3).train()
    targets = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    inject_multiplicative(stage, targets, RANK, RANK, 0.0, torch.bfloat16, seed=0)
    fusion.apply(stage, frozenset(fusion.KERNELS))
    return model_cost(
        stage,
        rows=1,
        tokens=T,
        levels=RecomputeLevel,
        training=lambda p: (16 * p.numel(), Update()),
        transform=LogitTransform(before=0.0625),
        on_gpu=True,
    )


def gflop(cost: ModelCost, level: RecomputeLevel) -> float:
    """Of 40 layers: one first, 38 like the second, one last."""
    layers = [cost.layers[0], *[cost.layers[1]] * (L - 2), cost.layers[2]]
    each = sum(c.forward.flops + c.backward.flops + c.levels[level].recomputed.flops for c in layers)
    return (each + cost.head.work.flops) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("level", TABLE, ids=lambda level: level.name)
def test_each_level_has_the_table_s_bytes_and_flops(cost: ModelCost, level: RecomputeLevel) -> None:
    kept, flops = TABLE[level]
    assert cost.layers[1].levels[level].kept_bytes == pytest.approx(kept, rel=0.01)
    assert gflop(cost, level) == pytest.approx(flops, rel=0.01)


def test_whole_layer_recomputation(cost: ModelCost) -> None:
    """16.4 KB. The table's 230.2 GFLOP are the founding run's, whose head made three products; ours makes two."""
    assert cost.layers[1].levels[RecomputeLevel.INPUT].kept_bytes == 2 * D
    third_product = 2 * V * D / 1e9
    assert gflop(cost, RecomputeLevel.INPUT) + third_product == pytest.approx(230.2, rel=0.01)


def test_nothing_is_recomputed_where_everything_is_kept(cost: ModelCost) -> None:
    assert all(c.levels[RecomputeLevel.EVERYTHING].recomputed.flops == 0 for c in cost.layers)


def test_the_first_adapted_layer_s_backward_ends_at_its_adapter(cost: ModelCost) -> None:
    """No product with the layer's weights in backward; gate and up are all it keeps for dA, beside z."""
    first, middle = cost.layers[:2]
    assert first.backward.flops < 0.01 * middle.backward.flops
    assert first.levels[RecomputeLevel.EVERYTHING].kept_bytes == 2 * 2 * 22528 + 2 * RANK


def test_levels_are_worth_their_bytes_in_order(cost: ModelCost) -> None:
    """A level that keeps more never recomputes more."""
    for layer in cost.layers:
        costs = [layer.levels[level] for level in RecomputeLevel]
        assert all(a.kept_bytes <= b.kept_bytes for a, b in itertools.pairwise(costs))
        assert all(a.recomputed.flops >= b.recomputed.flops for a, b in itertools.pairwise(costs))


def test_a_frozen_head_makes_two_products_and_one_block_of_logits(cost: ModelCost) -> None:
    assert cost.head.work.flops == 2 * 2 * V * D
    block = 1024 * V * 2
    assert block < cost.head.working_bytes < 1.3e9
