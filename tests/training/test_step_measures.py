"""Where a step's time goes, and the gradient's norm by layer. Oracles: a clock of the test's own, norms by hand."""

import math
import time

import pytest
import torch
from torch import nn

from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.step_measures import LayerGradients, StepTimes


def test_a_step_is_divided_by_what_the_engine_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    times = StepTimes()
    with times.part("data"):  # 0 to 1
        pass
    with times.step():  # 2
        times.doing("reading a micro-batch", False)  # 3
        times.doing("between two instructions", True)  # 4
        times.doing("the forward pass", False)  # 5
        times.doing("waiting for gradients", True)  # 6
        times.doing("the backward pass", False)  # 7
        times.doing("the optimizer's update", False)  # 8; ends at 9
    with times.part("evaluation"):  # 10
        times.doing("the forward pass", False)  # belongs to the evaluation
    assert times.taken() == {
        "data": 2.0,
        "other": 2.0,
        "forward": 1.0,
        "wait": 1.0,
        "backward": 1.0,
        "optimizer": 1.0,
        "evaluation": 1.0,
    }
    assert times.taken() == {}


def test_norms_are_of_a_layer_before_clipping() -> None:
    torch.manual_seed(0)
    names = ("model.layers.2.mlp.down_proj.A", "model.layers.2.mlp.down_proj.B", "model.layers.11.x.A", "norm")
    parameters = {name: nn.Parameter(torch.randn(3, 4)) for name in names}
    inner = torch.optim.SGD(parameters.values(), lr=0.1)
    optimizer = PipelineOptimizer(parameters, inner, clip=1e-3)
    layers = LayerGradients(optimizer, every=2)
    for step in (1, 2, 3):
        gradients = {name: torch.randn(3, 4) for name in names}
        for name, parameter in parameters.items():
            (parameter * gradients[name]).sum().backward()
        layers.begin_step()
        optimizer.step()
        found = layers.measured()
        if step != 2:
            assert found == {}
            continue
        two = math.sqrt(sum(gradients[name].double().square().sum().item() for name in names[:2]))
        # Each norm is one fp32 reduction of 12 numbers.
        assert found == pytest.approx(
            {
                "grad_norm/002": two,
                "grad_norm/011": gradients[names[2]].norm().item(),
                "grad_norm/norm": gradients["norm"].norm().item(),
            },
            rel=1e-6,
        )
