"""The learning rate of a step, against torch's schedulers put together as qlora-pipe does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pipeline.training.optim.lr_schedule import learning_rate, warmup_steps

PEAK = 5e-6


def torchs(warmup: int, total: int, shape: str, lowest: float) -> list[float]:
    """The rate of each optimizer step, 0 to total − 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler: LRScheduler
    if shape == "cosine":
        scheduler = CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=lowest)
    else:
        scheduler = ConstantLR(optimizer, factor=1.0)
    if warmup > 0:
        linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
        scheduler = SequentialLR(optimizer, schedulers=[linear, scheduler], milestones=[warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("shape", ["constant", "none", "cosine"])
@pytest.mark.parametrize("lowest", [0.0, 1e-6])
@pytest.mark.parametrize(("warmup", "total"), [(0, 50), (1, 50), (10, 50), (49, 50), (100, 1000)])
def test_rates_are_torchs(warmup: int, total: int, shape: str, lowest: float) -> None:
    ours = [
        learning_rate(step, peak=PEAK, warmup=warmup, total=total, shape=shape, lowest=lowest) for step in range(total)
    ]
    # torch goes from step to step by a recurrence in fp64; a thousand steps of 2⁻⁵³ each, and some.
    assert ours == pytest.approx(torchs(warmup, total, shape, lowest), rel=1e-10, abs=PEAK * 1e-12)


def test_the_founding_warmup() -> None:
    """lr/100 at the first step, lr/100 more at each, lr from the 101st on."""
    rates = [learning_rate(s, peak=PEAK, warmup=100, total=1373, shape="constant", lowest=0.0) for s in range(1373)]
    assert rates[:3] == pytest.approx([5e-8, 5e-8 + 4.95e-8, 5e-8 + 2 * 4.95e-8])
    assert rates[99] < PEAK
    assert set(rates[100:]) == {PEAK}


@given(st.integers(0, 50), st.integers(1, 50), st.sampled_from(["constant", "cosine"]), st.floats(0, PEAK))
def test_rises_to_the_peak_and_falls_to_the_lowest(warmup: int, total: int, shape: str, lowest: float) -> None:
    """Whatever the numbers, warmup longer than the run and steps after its end included."""
    rates = [
        learning_rate(s, peak=PEAK, warmup=warmup, total=total, shape=shape, lowest=lowest)
        for s in range(warmup + total + 10)
    ]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup] == pytest.approx(PEAK)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rates[:warmup])
    at_end = lowest if shape == "cosine" else PEAK
    assert rates[-1] == pytest.approx(at_end, rel=1e-12, abs=PEAK * 1e-12)


@pytest.mark.parametrize(
    ("given", "steps_per_epoch", "steps"),
    [(0, 57, 0), (100, 57, 100), (1, 57, 1), (1.0, 57, 1), (0.1, 57, 5), (0.5, 3, 1), (0.99, 100, 99), (0.001, 57, 0)],
)
def test_warmup_in_steps_or_as_a_fraction_of_an_epoch(given: float, steps_per_epoch: int, steps: int) -> None:
    assert warmup_steps(given, steps_per_epoch) == steps
