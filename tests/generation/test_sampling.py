"""Which tokens are left to choose from, against the definitions in fp64."""

import pytest
import torch
from torch import Tensor

from pipeline.generation.sampling import NOT_FINITE, Sampling

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0, -float("inf")])
DRAWS = 1500


def shares(sampling: Sampling, logits: Tensor = LOGITS) -> Tensor:
    """How often each token is chosen."""
    noise = sampling.noise(0, "x")
    return (
        torch.bincount(torch.tensor([sampling.choose(logits, noise) for _ in range(DRAWS)]), minlength=len(logits))
        / DRAWS
    )


def tempered(kept: list[int], temperature: float) -> Tensor:
    masked = torch.full_like(LOGITS, -float("inf"), dtype=torch.float64)
    masked[kept] = LOGITS[kept].double() / temperature
    return masked.softmax(0)


# softmax(LOGITS) is .46 .28 .17 .062 .023 .003; at temperature 3 .28 .24 .20 .14 .10 .05.
CASES = [
    (Sampling(), [0, 1, 2, 3, 4, 5], 1.0),
    (Sampling(temperature=3.0), [0, 1, 2, 3, 4, 5], 3.0),
    (Sampling(top_k=2), [0, 1], 1.0),
    (Sampling(top_p=0.8), [0, 1, 2], 1.0),
    (Sampling(min_p=0.1), [0, 1, 2, 3], 1.0),
    (Sampling(temperature=3.0, min_p=0.1), [0, 1, 2, 3, 4, 5], 3.0),
    (Sampling(temperature=3.0, min_p=0.1, temperature_last=True), [0, 1, 2, 3], 3.0),
    (Sampling(temperature=3.0, top_p=0.8, temperature_last=True), [0, 1, 2], 3.0),
]


@pytest.mark.parametrize(("sampling", "kept", "temperature"), CASES, ids=lambda value: str(value)[:60])
def test_what_is_left_and_how_likely(sampling: Sampling, kept: list[int], temperature: float) -> None:
    right = tempered(kept, temperature)
    found = shares(sampling)
    assert not found[right == 0].any()
    # Five standard deviations of a share.
    assert ((found - right).abs() <= 5 * (right * (1 - right) / DRAWS).sqrt() + 1e-9).all()


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    noise = Sampling(temperature=0).noise(0, "x")
    before = noise.get_state()
    assert Sampling(temperature=0, top_k=1, min_p=0.5).choose(LOGITS.flip(0), noise) == 6
    assert torch.equal(noise.get_state(), before)


def test_noise_is_of_seed_step_and_prompt() -> None:
    def first(seed: int, step: int, prompt: str) -> float:
        return float(torch.rand(1, generator=Sampling(seed=seed).noise(step, prompt)))

    assert first(1, 2, "x") == first(1, 2, "x")
    assert len({first(1, 2, "x"), first(2, 2, "x"), first(1, 3, "x"), first(1, 2, "y")}) == 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_no_token(bad: float, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    assert sampling.choose(torch.tensor([1.0, bad, 0.0]), sampling.noise(0, "x")) == NOT_FINITE
