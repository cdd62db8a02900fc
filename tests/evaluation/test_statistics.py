"""Intervals that hold the truth as often as they say, tests that equal their closed form, effects that were planted."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import comb

from pipeline.evaluation.statistics import Estimate, by_prompt, detectable, estimate, sign_test

PROMPTS, REPETITIONS = 60, 200


def interval(values: np.ndarray, prompts: np.ndarray, seed: int = 0) -> Estimate:
    sums, counts = by_prompt(values, prompts), by_prompt(np.ones(len(values)), prompts)
    return estimate(sums, counts, resamples=300, confidence=0.95, seed=seed)


def drawn(generator: np.random.Generator, mean: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values around `mean` with an effect of the prompt as large as a row's, and the prompt, of 1 to 5 rows, of each."""
    prompts = np.repeat(np.arange(PROMPTS), generator.integers(1, 6, PROMPTS))
    return mean + generator.normal(size=PROMPTS)[prompts] + generator.normal(size=len(prompts)), prompts


def holds(figure: Estimate, truth: float) -> bool:
    assert figure.interval is not None
    return figure.interval[0] <= truth <= figure.interval[1]


def test_an_interval_by_prompts_holds_the_truth_and_one_by_rows_does_not() -> None:
    """Of 200 draws a right 95 % interval holds it in 190 ± 3 (one standard deviation); four of these below is 0.89."""
    generator = np.random.default_rng(0)
    by_prompts = by_rows = 0
    for repetition in range(REPETITIONS):
        values, prompts = drawn(generator)
        by_prompts += holds(interval(values, prompts, repetition), 0.0)
        by_rows += holds(interval(values, np.arange(len(values)), repetition), 0.0)
    assert 0.89 < by_prompts / REPETITIONS < 0.99
    assert by_rows / REPETITIONS < 0.85


def test_an_effect_that_was_planted_is_found_and_none_where_there_is_none() -> None:
    values, prompts = drawn(np.random.default_rng(1), mean=0.8)
    assert not holds(interval(values, prompts), 0.0)
    assert holds(interval(values - 0.8, prompts), 0.0)


def test_an_interval_is_scipys_over_prompts() -> None:
    """By rows that are drawn with their prompts here, one resample at a time, and scipy's percentile interval of a plain mean."""
    values, prompts = drawn(np.random.default_rng(6))
    found = interval(values, np.arange(len(values)))
    one = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=300, confidence_level=0.95, rng=np.random.default_rng(0)
    )
    assert found.interval == pytest.approx(tuple(one.confidence_interval), rel=1e-12)
    assert found.error == pytest.approx(float(one.standard_error), rel=1e-12)
    rows = [np.flatnonzero(prompts == prompt) for prompt in range(PROMPTS)]
    places, means = np.random.default_rng(0).integers(0, PROMPTS, (300, PROMPTS)), []
    for draw in places:
        means.append(values[np.concatenate([rows[prompt] for prompt in draw])].mean())
    assert interval(values, prompts).interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(5, 0), (9, 3), (4, 4)])
def test_the_sign_test_is_scipys(better: int, worse: int) -> None:
    differences = np.array([0.5] * better + [-2.0] * worse + [0.0] * 3)
    assert sign_test(differences) == stats.binomtest(better, better + worse).pvalue


def test_the_figure_is_the_mean_over_rows() -> None:
    values, prompts = drawn(np.random.default_rng(2))
    assert interval(values, prompts).value == pytest.approx(values.mean(), abs=1e-12)


def test_the_order_of_rows_changes_nothing() -> None:
    values, prompts = drawn(np.random.default_rng(3))
    order = np.random.default_rng(4).permutation(len(values))
    one, other = interval(values, prompts), interval(values[order], prompts[order])
    assert one.interval == pytest.approx(other.interval, abs=1e-12)


@pytest.mark.parametrize("values", [np.zeros(9), np.full(9, 0.1), np.arange(3.0)], ids=["zero", "alike", "one prompt"])
def test_without_variance_there_is_no_interval(values: np.ndarray) -> None:
    prompts = np.zeros(3) if len(values) == 3 else np.arange(9) // 2
    assert interval(values, prompts) == Estimate(pytest.approx(values.mean()), None, None)
    assert detectable(None, 0.95) is None


@pytest.mark.parametrize(("better", "worse"), [(5, 0), (0, 7), (9, 3), (4, 4), (1, 0), (30, 12)])
def test_the_sign_test_is_mcnemars_in_its_closed_form(better: int, worse: int) -> None:
    """p = 2·Σ_{k ≤ min} C(n, k) / 2ⁿ, at most 1, of the n pairs of answers that differ."""
    differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 11)
    n, least = better + worse, min(better, worse)
    closed = min(1.0, 2 * sum(comb(n, k, exact=True) for k in range(least + 1)) / 2**n)
    assert sign_test(differences) == pytest.approx(closed, rel=1e-12)


def test_without_a_difference_p_is_one() -> None:
    assert sign_test(np.zeros(5)) == 1.0


def test_the_detectable_difference_is_detected_as_often_as_it_says() -> None:
    """Means of 60 prompts around the detectable one: 80 % of their intervals are off 0."""
    assert detectable(1.0, 0.95) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    seen = detectable(1 / math.sqrt(PROMPTS), 0.95)
    assert seen is not None
    generator, found = np.random.default_rng(5), 0
    for repetition in range(REPETITIONS):
        values = seen + generator.normal(size=PROMPTS)
        found += not holds(interval(values, np.arange(PROMPTS), repetition), 0.0)
    assert 0.7 < found / REPETITIONS < 0.9
