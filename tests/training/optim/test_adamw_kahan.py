"""AdamW with a compensated sum: against fp64; against torch-optimi where nothing decays; against torch with decay."""

from collections.abc import Callable
from typing import Any

import optimi
import pytest
import torch
from torch import Tensor

from pipeline.training.optim.adamw_kahan import AdamWKahan, kahan_add

# The founding run's values: a decay of lr·wd = 5e-8 a step.
FOUNDING: dict[str, Any] = {"lr": 5e-6, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
BF16 = torch.bfloat16


def start(n: int = 512, dtype: torch.dtype = BF16) -> Tensor:
    """Weights of both signs from 2⁻⁷ to 2, in `dtype`."""
    g = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(n, generator=g) * 8 - 7)
    return (size * torch.randn(n, generator=g).sign()).to(dtype)


def drift(weights: Tensor, steps: int) -> Tensor:
    """The largest error of weight + compensation after `steps` compensated sums.

    The compensation is at most half a unit in the last place of bf16, 2⁻⁸ of the weight, and each step rounds it twice
    to fp32 (2⁻²⁴ of it): when the change comes in, and when the rounding of the weight does.
    """
    return weights.double().abs() * steps * 2 * 2**-32


def half_ulp(values: Tensor) -> Tensor:
    """Half of the distance between bf16 numbers around fp64 `values`: eight bits of precision."""
    return torch.exp2(torch.floor(torch.log2(values.abs())) - 8)


def assert_as_fp64_says(
    weight: Tensor, compensation: Tensor, exact: Tensor, steps: int, rounding_of_changes: float
) -> None:
    """weight + compensation within the drift, and the bf16 weight the nearest one to that."""
    allowed = drift(exact, steps) + rounding_of_changes
    assert weight.dtype == BF16
    assert compensation.dtype == torch.float32
    assert ((weight.double() + compensation.double() - exact).abs() <= allowed).all()
    assert ((weight.double() - exact).abs() <= half_ulp(exact) + allowed).all()


# The founding run's small steps


def test_a_thousand_updates_of_1e_4() -> None:
    weight, compensation = start(), torch.zeros(512)
    exact = weight.double() + 1000 * float(torch.tensor(1e-4))
    for _ in range(1000):
        kahan_add(weight, compensation, torch.full((512,), 1e-4))
    # Where the sum passes through zero the weight is small and the bound too: take that of the largest it was.
    largest = torch.maximum(exact.abs(), start().double().abs())
    assert ((weight.double() + compensation.double() - exact).abs() <= drift(largest, 1000)).all()
    assert ((weight.double() - exact).abs() <= half_ulp(exact) + drift(largest, 1000)).all()
    plain = start()
    for _ in range(1000):
        plain += 1e-4
    still = plain == start()
    assert still[start().abs() > 2**-5].all(), "without compensation, 1e-4 is below half a unit in the last place"


def test_ten_thousand_decays_of_5e_8() -> None:
    """Through the optimizer, with gradients of zero: only the decay is left. fp64: w·(1 − 5e-8)¹⁰⁰⁰⁰."""
    weight = start().clone().requires_grad_()
    optimizer = AdamWKahan([weight], **FOUNDING)
    for _ in range(10_000):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    exact = start().double() * (1 - 5e-6 * 0.01) ** 10_000
    moved = (start().double() - exact).abs()
    allowed = drift(exact, 10_000)
    assert (allowed < 0.01 * moved).all(), "the bound says something: below 1 % of what decays"
    assert_as_fp64_says(weight.detach(), optimizer.state[weight]["kahan"], exact, 10_000, 0.0)


def test_thousand_updates_through_the_optimizer() -> None:
    """A constant gradient of 1 is an update of lr/(√v + eps) a step, with the moments that the optimizer holds."""
    weight = start().abs().add(1).clone().requires_grad_()
    exact = weight.detach().double()
    optimizer = AdamWKahan([weight], lr=1e-4, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        exact -= fp64_update(optimizer.state[weight], 1e-4, 1e-6)
    assert (optimizer.state[weight]["exp_avg"].float() - 1).abs().max() <= 2**-7
    # Each change is a quotient of fp32 numbers: four roundings of 2⁻²⁴.
    assert_as_fp64_says(weight.detach(), optimizer.state[weight]["kahan"], exact, 1000, 1000 * 1e-4 * 4 * 2**-24)
    assert (exact < start().abs().double() + 1 - 0.09).all(), "it moved by a tenth"


def fp64_update(
    state: dict[str, Tensor], lr: float, eps: float, mean: str = "exp_avg", square: str = "exp_avg_sq"
) -> Tensor:
    return lr * state[mean].double() / (state[square].double().sqrt() + eps)


# optimi, where nothing decays


def trained(
    make: Callable[[Tensor], Any],
    dtype: torch.dtype,
    steps: int,
    each: Callable[[Any, Tensor], None] | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Any]:
    """The weight and the optimizer after `steps` with the same random gradients, in `dtype`, for every optimizer."""
    weight = start(dtype=dtype).clone().requires_grad_()
    optimizer = make(weight)
    g = torch.Generator().manual_seed(1)
    size = torch.exp2(torch.randn(weight.shape, generator=g) * 3)  # gradients of very different sizes
    for _ in range(steps):
        weight.grad = ((torch.randn(weight.shape, generator=g) + 0.3) * size).to(rounded_to or dtype).to(dtype)
        optimizer.step()
        if each:
            each(optimizer, weight)
    return weight.detach(), optimizer


def ours(weight_decay: float = 0.0, lr: float = 1e-3) -> Callable[[Tensor], AdamWKahan]:
    return lambda p: AdamWKahan([p], lr=lr, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay)


def theirs(weight_decay: float = 0.0, lr: float = 1e-3) -> Callable[[Tensor], Any]:
    return lambda p: optimi.AdamW(
        [p], lr=lr, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay, foreach=False, triton=False
    )


def fp32_rounding(steps: int) -> float:
    """Relative to 2, the largest weight: each step rounds the decayed and the updated weight, 2⁻²⁴ each; twice over."""
    return steps * 4 * 2**-24 * 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_equals_optimi(weight_decay: float) -> None:
    ours_weight, _ = trained(ours(weight_decay), torch.float32, 100)
    theirs_weight, _ = trained(theirs(weight_decay), torch.float32, 100)
    assert (ours_weight - start(dtype=torch.float32)).abs().mean() > 1e-3
    torch.testing.assert_close(ours_weight, theirs_weight, rtol=0, atol=fp32_rounding(100))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_equals_torch_with_decay(weight_decay: float) -> None:
    """lr·wd decouples as torch's does; torch corrects the bias after the moments instead of in the betas.

    A step is lr·m/√v with |m| ≤ √v·10 or so (β₁ = 0.9, β₂ = 0.99) and relative errors of the moments of some 2⁻²⁴ each:
    a hundred steps of 1e-3 add less than the rounding of the weights does.
    """
    ours_weight, _ = trained(ours(weight_decay), torch.float32, 100)
    torchs, _ = trained(
        lambda p: torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay),
        torch.float32,
        100,
    )
    torch.testing.assert_close(ours_weight, torchs, rtol=0, atol=fp32_rounding(100))


def test_bf16_is_as_close_to_fp64_as_optimi() -> None:
    """The truth is Adam in fp64 from the same bf16 gradients, by torch. Ours keeps optimi's mean, a better mean square and
    a better sum; the sum alone is held against the fp64 sum of lr·m/(√v + eps) of the moments it had."""
    truth, exact_optimizer = trained(
        lambda p: torch.optim.AdamW([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0),
        torch.float64,
        300,
        rounded_to=BF16,
    )
    followed = {"sum": start().double()}

    def follow(optimizer: Any, weight: Tensor) -> None:
        followed["sum"] = followed["sum"] - fp64_update(optimizer.state[weight], 1e-3, 1e-6)

    our_weight, our_optimizer = trained(ours(), BF16, 300, follow)
    their_weight, their_optimizer = trained(theirs(), BF16, 300)
    ours_, theirs_ = (next(iter(o.state.values())) for o in (our_optimizer, their_optimizer))
    assert torch.equal(ours_["exp_avg"], theirs_["exp_avg"])
    # torch corrects the bias of v at the end, optimi in its betas: after 300 steps 1 − 0.99³⁰⁰ lies between the two.
    v = next(iter(exact_optimizer.state.values()))["exp_avg_sq"] / (1 - 0.99**300)
    assert (ours_["exp_avg_sq"] - v).norm() <= (theirs_["exp_avg_sq"].double() - v).norm()
    our_sum = our_weight.double() + ours_["kahan"].double()
    their_sum = their_weight.double() + theirs_["kahan_comp"].double()
    assert (our_sum - truth).norm() <= (their_sum - truth).norm()
    # 300 changes of at most 1e-2 with four fp32 roundings, and the drift of the largest weight.
    bound = 300 * 1e-2 * 4 * 2**-24 + float(drift(torch.tensor(3.0), 300))
    assert (our_sum - followed["sum"]).norm() / 512**0.5 <= bound


def test_the_mean_square_of_a_bf16_weight_comes_down_again() -> None:
    """β₂ = 0.999, gradients of 1 and then of 0.1: v falls from 1 to 0.01 + 0.99·e⁻³ in 3000 steps. In bf16 it would not."""
    weight = torch.ones(4, dtype=BF16, requires_grad=True)
    optimizer = AdamWKahan([weight], lr=1e-6, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for step in range(6000):
        weight.grad = torch.full_like(weight, 1.0 if step < 3000 else 0.125)
        optimizer.step()
    started = 1 - 0.999**3000  # debiased betas: v is a weighted mean of squares whose weights sum to 1
    ended = 1 - 0.999**6000
    expected = (started * 0.999**3000 + (1 - 0.999**3000) * 0.125**2) / ended
    assert torch.allclose(optimizer.state[weight]["exp_avg_sq"], torch.tensor(expected), rtol=6000 * 2**-23)


def test_bf16_with_decay_follows_fp64_where_optimi_does_not_decay() -> None:
    """At the founding run's lr and decay. optimi 0.3.3 multiplies the bf16 weight by 1 − 5e-8, which is 1."""
    lr, wd = FOUNDING["lr"], FOUNDING["weight_decay"]
    exact = {"sum": start().double()}

    def follow(optimizer: Any, weight: Tensor) -> None:
        exact["sum"] = exact["sum"] * (1 - lr * wd) - fp64_update(optimizer.state[weight], lr, 1e-6)

    weight, optimizer = trained(ours(wd, lr), BF16, 1000, follow)
    found = weight.double() + optimizer.state[next(iter(optimizer.state))]["kahan"].double()
    allowed = drift(exact["sum"].abs() + 0.05, 1000) + 1000 * lr * 10 * 4 * 2**-24
    assert ((found - exact["sum"]).abs() <= allowed).all()
    decayed = start().double().abs() * 1000 * lr * wd
    assert (allowed < 0.1 * decayed).float().mean() > 0.5, "the bound sees the decay of most weights"

    plain, decaying = (trained(theirs(decay, lr), BF16, 200)[0] for decay in (0.0, wd))
    assert torch.equal(plain, decaying), "optimi has mended its decay: it can be the oracle here too"


# State


def test_state_is_lean_and_steps_without_gradient_are_none() -> None:
    low, full, idle = start().requires_grad_(), start(dtype=torch.float32).requires_grad_(), start().requires_grad_()
    optimizer = AdamWKahan([{"params": [low, full, idle]}], **FOUNDING)
    low.grad, full.grad = torch.ones_like(low), torch.ones_like(full)
    before = idle.detach().clone()
    optimizer.step()
    assert {k: v.dtype for k, v in optimizer.state[low].items()} == {
        "step": torch.int64,
        "exp_avg": BF16,
        "exp_avg_sq": torch.float32,
        "kahan": torch.float32,
    }
    assert optimizer.state[full]["kahan"].dtype == torch.float32  # 1 − lr·wd rounds in fp32 too
    assert idle not in optimizer.state
    assert torch.equal(idle, before)


def test_gradients_are_left_as_they_are() -> None:
    weight = start().requires_grad_()
    weight.grad = torch.randn(512, generator=torch.Generator().manual_seed(0)).to(BF16)
    before = weight.grad.clone()
    AdamWKahan([weight], **FOUNDING).step()
    assert torch.equal(weight.grad, before)


def test_groups_have_their_own_rate() -> None:
    fast, slow = (start(dtype=torch.float32).requires_grad_() for _ in range(2))
    optimizer = AdamWKahan([{"params": [fast], "lr": 1e-2}, {"params": [slow]}], **{**FOUNDING, "weight_decay": 0.0})
    fast.grad, slow.grad = torch.ones_like(fast), torch.ones_like(slow)
    optimizer.step()
    moved = [float((start(dtype=torch.float32) - p.detach()).mean()) for p in (fast, slow)]
    # The first update of Adam is lr·g/(|g| + eps); fp32 weights up to 2 round it to 2⁻²⁴.
    assert abs(moved[0] - 1e-2) < 1e-7
    assert abs(moved[1] - 5e-6) < 1e-7
