"""What figures of rows say of more rows like them: intervals, the exact test of pairs, the difference that would be seen.

Takes a number and a weight for each row, and which rows share a prompt; gives plain numbers. Rows of one prompt stand or fall
together, so what is drawn again is prompts, with all their rows: by rows, an interval that claims 95 % holds the truth less
often (`tests/evaluation/test_statistics.py` counts it).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

POWER = 0.8  # of the detectable difference: the chance that it would be seen
DRAWN_AT_ONCE = 2**22  # numbers of a batch of resamples: 32 MiB
SAME = 1e-12  # of figures in fp64: what differs by less is one figure

Numbers = NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean over rows, its interval and its standard error; None where all prompts say the same, or there is only one."""

    value: float
    interval: tuple[float, float] | None
    error: float | None


def by_prompt(values: ArrayLike, prompts: ArrayLike) -> Numbers:
    """Sums of `values` [N] over the rows of each prompt, fp64 [P], in the order of the sorted prompts [N]."""
    _, places = np.unique(np.asarray(prompts), return_inverse=True)
    return np.bincount(places, weights=np.asarray(values, dtype=np.float64)).astype(np.float64)


def estimate(sums: Numbers, counts: Numbers, *, resamples: int, confidence: float, seed: int) -> Estimate:
    """Σ sums / Σ counts with its percentile interval, over bootstrap draws of prompts (Efron & Tibshirani 1993, ch. 13).

    `sums`, `counts`: of each prompt's rows, fp64 [P]. For a difference of two models give the difference of their sums: both
    are then drawn at the same prompts.
    """
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Estimate(value, None, None)
    drawn = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, DRAWN_AT_ONCE // len(sums)),
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    if np.ptp(drawn.bootstrap_distribution) <= SAME * max(1.0, abs(value)):
        return Estimate(value, None, None)
    low, high = drawn.confidence_interval
    return Estimate(value, (float(low), float(high)), float(drawn.standard_error))


def sign_test(differences: Numbers) -> float:
    """Two-sided p of as many prompts better and worse as in `differences` [P], if either were as likely; 1 where none differs.

    With one row a prompt and differences of right answers that is McNemar's test in its exact form (1947).
    """
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(stats.binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0


def detectable(error: float | None, confidence: float) -> float | None:
    """The smallest true difference that an interval of so large a standard error would tell from 0, with a chance of POWER."""
    if error is None:
        return None
    return float((stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(POWER)) * error)
