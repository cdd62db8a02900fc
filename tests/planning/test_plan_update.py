"""What the optimizer's update takes on a device: real updates counted, and where the planner puts it: beside weights and
optimizer state, in place of activations."""

import pytest
import torch
from pipeline.kernels.cross_entropy import LogitTransform
from torch import nn
from transformers import CohereConfig

from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage, empty_model
from pipeline.planning.counts.counting import Counter
from pipeline.planning.counts.model_cost import model_cost
from pipeline.planning.quantities import HeadCost, LayerCost, LevelCost, ModelCost, Rates, Shape, Update, Work, together
from pipeline.planning.solve import solve
from pipeline.training.optim.inner import bytes_per_parameter, make_inner, update_bytes_per_parameter
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer

RATES = Rates(1.0, 2.0, 4.0, 0.5, 1.0, "test")
LITTLE = 4096  # bytes: step counts, norms and their like


@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw"])
def test_an_update_takes_what_the_planner_counts(kind: str, dtype: torch.dtype, on_gpu: bool) -> None:
    """Storages that a second step has alive at most, and all that stands, by a dispatch mode that sees each operation.

    What torch's AdamW does on a GPU by itself, and here where it is told to, is one operation over all parameters.
    """
    sizes = [(300, 100), (300, 100), (100,)]
    parameters = {f"p{i}": nn.Parameter(torch.randn(size, dtype=dtype)) for i, size in enumerate(sizes)}
    inner = make_inner(
        kind, [{"params": [*parameters.values()]}], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
    )
    for group in inner.param_groups:
        group.update({"foreach": on_gpu} if kind == "adamw" else {})
    optimizer = PipelineOptimizer(parameters, inner, clip=1.0)

    def step() -> None:
        for parameter in parameters.values():
            parameter.square().sum().backward()
        with Counter() as counter:
            optimizer.step()
            found.append(counter.take()[1])

    found: list[int] = []
    step()
    step()
    every, one = update_bytes_per_parameter(kind, dtype.itemsize, on_gpu)
    counted = together(Update(p.numel() * every, p.numel() * one) for p in parameters.values())
    assert found[1] == pytest.approx(sum(counted), abs=LITTLE)
    standing = sum(t.nbytes for t in (*parameters.values(), *optimizer.held_tensors()))
    total = sum(p.numel() for p in parameters.values()) * bytes_per_parameter(kind, dtype.itemsize)
    assert standing == pytest.approx(total, abs=LITTLE)


def test_each_part_of_a_model_has_its_update_and_its_gradients_one_after_another() -> None:
    """All is trained; sizes by hand. A layer's backward has few of its weights' gradients at a time, not all."""
    config = CohereConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
    )
    stage = Stage(empty_model(config, torch.bfloat16, "sdpa"), 0, 2).train()
    cost = model_cost(
        stage,
        rows=1,
        tokens=2,
        levels=[RecomputeLevel.EVERYTHING],
        transform=LogitTransform(),
        on_gpu=False,
        training=lambda p: (16 * p.numel(), Update(2 * p.numel(), 12 * p.numel())),
    )
    layer, words = 4 * 64 * 64 + 3 * 64 * 128 + 64, 100 * 64
    assert [c.update for c in cost.layers] == [Update(2 * layer, 12 * 64 * 128)] * 2
    assert (cost.embedding_update, cost.embedding_gradient_bytes) == (Update(2 * words, 12 * words), 2 * words)
    assert cost.head.update == Update(2 * (words + 64), 12 * words)
    assert [c.trained_bytes for c in cost.layers] == [16 * layer] * 2
    assert all(2 * 64 * 128 < 2 * c.working_bytes < layer for c in cost.layers)


def alike(update: Update, n: int = 4) -> ModelCost:
    """Layers that keep 1, 2 or 3 bytes per token and recompute for 2, 1 and 0 seconds; nothing else takes memory."""
    three = (RecomputeLevel.INPUT, RecomputeLevel.ATTENTION, RecomputeLevel.EVERYTHING)
    levels = {level: LevelCost(kept, Work(3 - kept)) for kept, level in enumerate(three, 1)}
    each = LayerCost(10, 0, Work(1), Work(1), levels, 0, update)
    return ModelCost([each] * n, 0, 0, HeadCost(0, 0, Work(0.0), 0), 0, 0)


def test_an_update_takes_the_place_of_activations_and_none_beside_them() -> None:
    """Forty bytes of weights and twelve of kept tensors: as much again is free for the update, and one byte more is not."""
    shape, everything = Shape(1, 1, 1), [ActivationPolicy(RecomputeLevel.EVERYTHING)] * 4
    for update, of_update in ((Update(), 0), (Update(3, 0), 12), (Update(2, 4), 12)):
        (stage,) = (plan := solve(alike(update), [52], RATES, shape, 0)).stages
        assert plan.fits
        assert stage.keeping == everything
        assert (stage.total_bytes, stage.update_bytes, stage.headroom_bytes) == (52, of_update, 0)
    plan = solve(alike(Update(2, 5)), [52], RATES, shape, 100)
    assert not plan.fits, "keeping less is no help, nor is the host"
    assert plan.stages[0].headroom_bytes == -1, "keeping less is no help, nor is the host"


def test_an_update_decides_where_the_cut_is() -> None:
    """The first two layers' updates together do not fit one device; by time the cut would be behind the two."""
    heavy, light = alike(Update(20, 0)).layers[0], alike(Update()).layers[0]
    model = alike(Update())._replace(layers=[heavy, heavy, light, light])
    devices, shape = [45, 50], Shape(1, 1, 2)
    assert [s.end for s in solve(alike(Update()), devices, RATES, shape, 0).stages] == [2, 4]
    plan = solve(model, devices, RATES, shape, 0)
    assert plan.fits
    assert [s.end for s in plan.stages] == [1, 4]


def test_an_embedding_s_gradient_is_beside_the_micro_batches_still_in_flight() -> None:
    """Two in flight on the first stage, one of them gone: 20 of weights, 6 kept, and the gradient."""
    shape = Shape(1, 2, 2)
    for gradient, total in ((0, 32), (6, 32), (7, 33), (50, 76)):
        model = alike(Update())._replace(embedding_gradient_bytes=gradient)
        plan = solve(
            model,
            [100, 100],
            RATES,
            shape,
            0,
            ranges=[(0, 2), (2, 4)],
            keeping=ActivationPolicy(RecomputeLevel.EVERYTHING),
        )
        assert [s.total_bytes for s in plan.stages] == [total, 26]
    tied = alike(Update())._replace(embedding_gradient_bytes=50, tied=True)
    assert solve(tied, [200], RATES, Shape(1, 2, 1), 0).stages[0].total_bytes == 40 + 2 * 50
