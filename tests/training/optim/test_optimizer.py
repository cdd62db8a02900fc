"""The step over all stages, in one process: fp32 accumulation, one norm, one coefficient, one rounding, one update."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.console import EXIT_NON_FINITE
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.pipeline_optimizer import NonFiniteError, PipelineOptimizer

BF16 = torch.bfloat16
VALUES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
KINDS = ["adamw_kahan", "adamw", "adamw8bit"]


def test_it_is_freed_when_it_is_let_go() -> None:
    """Hooks on parameters hold no optimizer: autograd would hold it where no garbage collector looks."""
    parameter = nn.Parameter(torch.ones(8))
    optimizer = PipelineOptimizer({"p": parameter}, make_inner("adamw", [{"params": [parameter]}], **VALUES), 0.0)
    parameter.sum().backward()
    optimizer.step()
    left = weakref.ref(optimizer), weakref.ref(parameter)
    del optimizer, parameter
    gc.collect()
    assert [ref() for ref in left] == [None, None]


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients it is given, and changes nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__([{"params": parameters}], {"lr": 0.0})
        self.seen: list[Tensor] = []
        self.steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for p in self.param_groups[0]["params"]]
        self.steps += 1


def recorded(parameters: dict[str, nn.Parameter], clip: float = 0.0) -> tuple[PipelineOptimizer, Recorder]:
    inner = Recorder(list(parameters.values()))
    return PipelineOptimizer(parameters, inner, clip), inner


def parameters(dtype: torch.dtype, *shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for i, shape in enumerate(shapes)}


def micro_batch(parameters: dict[str, nn.Parameter], gradients: list[Tensor]) -> None:
    """A backward that gives each parameter the gradient asked for, in the parameter's dtype."""
    sum(
        ((p * g.to(p.dtype)).sum() for p, g in zip(parameters.values(), gradients, strict=True)), torch.zeros(())
    ).backward()


def test_many_16_bit_gradients_are_summed_in_fp32() -> None:
    """n gradients of about 1: a bf16 sum stops at 256 of them; fp32 is off by at most n·2⁻²⁴ of the sum of sizes."""
    n, own = 2000, parameters(BF16, (40,))
    g = torch.Generator().manual_seed(1)
    gradients = [(torch.rand(40, generator=g) + 0.5).to(BF16) for _ in range(n)]
    optimizer, inner = recorded(own)
    sums: dict[str, Tensor] = {}
    optimizer.on_gradients = lambda found: sums.update({name: t.clone() for name, t in found.items()})
    for gradient in gradients:
        micro_batch(own, [gradient])
        assert own["p0"].grad is None, "freed as soon as it is added"
    optimizer.step()
    exact = torch.stack(gradients).double().sum(0)
    assert sums["p0"].dtype == torch.float32
    assert ((sums["p0"].double() - exact).abs() <= n * 2**-24 * exact).all()
    naive = torch.zeros(40, dtype=BF16)
    for gradient in gradients:
        naive += gradient
    assert ((naive.double() - exact).abs() > 0.5 * exact).all(), "the test would see a bf16 sum"
    # Rounded once, to the nearest bf16 number.
    assert inner.seen[0].dtype == BF16
    assert torch.equal(inner.seen[0], sums["p0"].to(BF16))


def test_parameter_used_twice_in_one_backward_is_counted_once() -> None:
    own = parameters(torch.float32, (4,))
    optimizer, inner = recorded(own)
    (own["p0"].sum() + (2 * own["p0"]).sum()).backward()
    optimizer.step()
    assert inner.seen[0].tolist() == [3.0] * 4


@pytest.mark.parametrize("clip", [0.5, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_clips_as_torch_does(dtype: torch.dtype, clip: float) -> None:
    own = parameters(dtype, (3, 5), (7,), (2, 2, 2))
    g = torch.Generator().manual_seed(1)
    optimizer, inner = recorded(own, clip)
    total = [torch.zeros(p.shape) for p in own.values()]
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=g).to(dtype).float() for p in own.values()]
        micro_batch(own, gradients)
        total = [t + x for t, x in zip(total, gradients, strict=True)]
    optimizer.step()
    copies = [nn.Parameter(torch.zeros_like(t)) for t in total]
    for copy, gradient in zip(copies, total, strict=True):
        copy.grad = gradient
    norm = float(torch.nn.utils.clip_grad_norm_(copies, clip))
    # Norms of 30 numbers in fp32 beside fp64.
    assert optimizer.grad_norm == pytest.approx(norm, rel=30 * 2**-24)
    assert optimizer.clip_coefficient == pytest.approx(min(1.0, clip / (norm + 1e-6)), rel=30 * 2**-24)
    assert (optimizer.clip_coefficient < 1) == (clip < 1e9)
    for found, copy in zip(inner.seen, copies, strict=True):
        assert copy.grad is not None
        # One rounding to the dtype (eps/2), of products that differ by the norms' rounding.
        torch.testing.assert_close(found.float(), copy.grad, rtol=torch.finfo(dtype).eps / 2 + 32 * 2**-24, atol=0)


def test_no_clipping_at_zero() -> None:
    own = parameters(torch.float32, (4,))
    optimizer, inner = recorded(own, clip=0.0)
    micro_batch(own, [torch.full((4,), 1e6)])
    optimizer.step()
    assert optimizer.clip_coefficient == 1.0
    assert inner.seen[0].tolist() == [1e6] * 4
    assert optimizer.grad_norm == pytest.approx(2e6)


def test_steps_do_not_leak_into_each_other() -> None:
    own = parameters(torch.float32, (4,))
    optimizer, inner = recorded(own)
    for size in (1.0, 2.0):
        micro_batch(own, [torch.full((4,), size)])
        optimizer.step()
        assert inner.seen[0].tolist() == [size] * 4
        assert own["p0"].grad is None
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    assert inner.seen[0].tolist() == [0.0] * 4
    assert optimizer.completed_steps == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw"])
def test_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    own = parameters(BF16, (6,), (3, 3))
    inner = make_inner(kind, [{"params": list(own.values())}], **VALUES)
    optimizer = PipelineOptimizer(own, inner, 1.0)
    micro_batch(own, [torch.ones(p.shape) for p in own.values()])
    optimizer.step()
    weights = {name: p.detach().clone() for name, p in own.items()}
    state = [{key: value.clone() for key, value in inner.state[p].items()} for p in own.values()]
    micro_batch(own, [torch.full((6,), bad), torch.ones(3, 3)])
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    assert caught.value.exit_code == EXIT_NON_FINITE
    assert optimizer.completed_steps == 1
    assert all(torch.equal(p, weights[name]) for name, p in own.items())
    for p, kept in zip(own.values(), state, strict=True):
        assert all(torch.equal(inner.state[p][key], value) for key, value in kept.items())


@pytest.mark.parametrize("kind", KINDS)
def test_stage_without_parameters_steps(kind: str) -> None:
    optimizer = PipelineOptimizer({}, make_inner(kind, [{"params": []}], **VALUES), 1.0)
    optimizer.set_lr(1e-3)
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    assert optimizer.clip_coefficient == 1.0
    assert optimizer.completed_steps == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_each_optimizer_makes_adams_first_step(kind: str, dtype: torch.dtype) -> None:
    """The first step is −lr·sign(g) and the decay, whatever the gradient's size; 8-bit moments begin at 4096 values."""
    own = parameters(dtype, (8192,))
    before = own["p0"].detach().clone()
    optimizer = PipelineOptimizer(own, make_inner(kind, [{"params": list(own.values())}], **VALUES), 0.0)
    optimizer.set_lr(0.05)
    gradient = torch.randn(8192, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradient = torch.where(gradient.abs() < 0.1, 0.1, gradient)  # beside which eps is nothing
    micro_batch(own, [gradient])
    optimizer.step()
    expected = before.double() * (1 - 0.05 * 0.01) - 0.05 * gradient.double().sign()
    # The weight is rounded after the decay and after the update. torch's moments are in the weight's dtype, too: six
    # roundings of the update, for m, v, √v, its correction, eps and the quotient. 1e-5: eps beside gradients of 0.1.
    unit = torch.finfo(dtype).eps / 2
    allowed = 2 * unit * (before.double().abs() + 0.05) + 0.05 * (6 * unit + 1e-5)
    assert ((own["p0"].double() - expected).abs() <= allowed).all()
    if kind == "adamw8bit":
        assert optimizer.inner.state[own["p0"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_finds_a_minimum(kind: str) -> None:
    """½‖p − goal‖² from a distance of at most 1.5, in 200 steps whose rates fall from 0.1 to 0 and add up to 10."""
    own = {"p": nn.Parameter(torch.zeros(64, 64))}
    goal = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).clamp(-1.5, 1.5)
    optimizer = PipelineOptimizer(
        own, make_inner(kind, [{"params": [own["p"]]}], **{**VALUES, "weight_decay": 0.0}), 0.0
    )
    for step in range(200):
        optimizer.set_lr(0.1 * (1 - step / 200))
        (0.5 * (own["p"] - goal).square().sum()).backward()
        optimizer.step()
    assert (own["p"] - goal).abs().max() < 0.05
