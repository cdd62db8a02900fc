"""What is measured: from an adapter's records on a dataset, and the base's, a number for each unit.

Takes records; gives `Values`, whose mean over units (or tokens) is the figure. lp is the log-probability of a completion,
n its tokens, lp̄ = lp/n; Δ = lp − lp of the base. What others call them, and where theirs differ: docs/evaluation.md.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.records import Record
from pipeline.evaluation.units import Kind

Numbers = NDArray[np.float64]


class Values(NamedTuple):
    """Of each unit a number and its weight, fp64 [N]; the figure is Σ numbers / Σ weights."""

    numbers: Numbers
    weights: Numbers


class Measure(NamedTuple):
    """`better`: 1 where more is better, −1 where less is, 0 where neither. `beside`: it is a comparison with the base
    itself, so the base has none. `counts`: it says of each unit whether it is right."""

    name: str
    of: Callable[[Sequence[Record], Sequence[Record]], Values]
    better: int = 1
    beside: bool = False
    counts: bool = False


# The names of what a light looks at (lights.py).
NLL, COVERAGE = "nll", "mc_coverage"


def measures(kind: Kind, beta: float) -> list[Measure]:
    """Of a kind of dataset, the one that the table shows first. `beta`: of the margin β·(Δ_w − Δ_l)."""
    nll = Measure(NLL, _nll, better=-1)
    if kind == "rows":
        return [nll, Measure("bits_per_byte", _bits_per_byte, better=-1)]
    if kind == "multiple_choice":
        return [Measure("mc_acc", _mc_acc, counts=True), Measure("mc_prob", _mc_prob), Measure(COVERAGE, _mc_coverage)]
    return [
        Measure("pref_acc_mean", _pairs(lambda p: p.mean > 0), counts=True),
        Measure("pref_prob_mean", _pairs(lambda p: 1 / (1 + np.exp(-p.mean)))),
        Measure("pref_acc_sum", _pairs(lambda p: p.sum > 0), counts=True),
        Measure("pref_acc_bytes", _pairs(lambda p: p.bytes > 0), counts=True),
        Measure("reward_acc", _pairs(lambda p: p.sum - p.base_sum > 0), beside=True),
        Measure("margin", _pairs(lambda p: beta * (p.sum - p.base_sum)), beside=True),
        nll,
    ]


class _Pairs(NamedTuple):
    """The chosen's less the rejected's, of all pairs: lp, lp̄, lp by byte; and the base's lp."""

    sum: Numbers
    mean: Numbers
    bytes: Numbers
    base_sum: Numbers


def _pairs(of: Callable[[_Pairs], NDArray]) -> Callable[[Sequence[Record], Sequence[Record]], Values]:
    def values(mine: Sequence[Record], base: Sequence[Record]) -> Values:
        chosen = [record.unit.rows[0] for record in mine]
        rejected = [record.unit.rows[1] for record in mine]
        w, l = np.array([record.logprobs for record in mine]).T  # noqa: E741
        by_token = w / [row.n_targets for row in chosen] - l / [row.n_targets for row in rejected]
        by_byte = w / [max(1, row.n_bytes) for row in chosen] - l / [max(1, row.n_bytes) for row in rejected]
        ref_w, ref_l = np.array([record.logprobs for record in base]).T
        return _each(of(_Pairs(w - l, by_token, by_byte, ref_w - ref_l)))

    return values


def _nll(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    """By token, of the wanted row."""
    lost = np.array([-record.logprobs[record.unit.right] for record in mine])
    return Values(lost, np.array([record.unit.rows[record.unit.right].n_targets for record in mine], np.float64))


def _bits_per_byte(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    lost = np.array([-record.logprobs[0] for record in mine]) / np.log(2)
    return Values(lost, np.array([max(1, record.unit.rows[0].n_bytes) for record in mine], np.float64))


def _mc_acc(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    """Whether the right option is likelier than each other; of options that are equally likely each has its share."""
    shares = []
    for record in mine:
        best = [place for place, value in enumerate(record.logprobs) if value == max(record.logprobs)]
        shares.append(float(record.unit.right in best) / len(best))
    return _each(np.array(shares))


def _mc_prob(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    """The right option's part of what all options have."""
    return _each(
        np.array(
            [np.exp(r.logprobs[r.unit.right] - np.logaddexp.reduce(np.array(r.logprobs, np.float64))) for r in mine]
        )
    )


def _mc_coverage(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    """What all options have together: how sure the model is to answer with one of them."""
    return _each(np.array([np.exp(np.logaddexp.reduce(np.array(r.logprobs, np.float64))) for r in mine]))


def _each(numbers: NDArray) -> Values:
    return Values(np.asarray(numbers, dtype=np.float64), np.ones(len(numbers)))
