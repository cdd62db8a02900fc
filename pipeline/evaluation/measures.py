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
    if kind == "unpaired":
        return [
            Measure("rated_lp_mean", _rated(lambda lp, base, n: lp / n)),
            Measure("reward_acc", _rated(lambda lp, base, n: lp - base, right=True), beside=True),
            Measure("margin", _rated(lambda lp, base, n: beta * (lp - base)), beside=True),
            nll,
        ]
    if kind == "ranked":
        return [
            Measure("rank_acc_mean", _ranked(lambda lp, base, n: _best(lp / n)), counts=True),
            Measure("rank_pairs_mean", _ranked(lambda lp, base, n: _in_order(lp / n))),
            Measure("reward_acc", _ranked(lambda lp, base, n: _best(lp - base)), beside=True),
            Measure("margin", _ranked(lambda lp, base, n: beta * _over_others(lp - base)), beside=True),
            nll,
        ]
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


def _rated(
    of: Callable[[Numbers, Numbers, Numbers], Numbers], right: bool = False
) -> Callable[[Sequence[Record], Sequence[Record]], Values]:
    """Of answers that are good or bad by themselves: a number of lp, the base's and the tokens, its sign turned for bad ones;
    with `right` whether that is above 0."""

    def values(mine: Sequence[Record], base: Sequence[Record]) -> Values:
        sign = np.array([1.0 if record.unit.desirable else -1.0 for record in mine])
        lp, ref = (np.array([record.logprobs[0] for record in records]) for records in (mine, base))
        found = sign * of(lp, ref, np.array([record.unit.rows[0].n_targets for record in mine], np.float64))
        return _each(found > 0 if right else found)

    return values


def _ranked(of: Callable[[Numbers, Numbers, Numbers], float]) -> Callable[[Sequence[Record], Sequence[Record]], Values]:
    """Of answers in order, the best first: a number of their lp, the base's and their tokens, [K] each."""

    def values(mine: Sequence[Record], base: Sequence[Record]) -> Values:
        each = (
            of(np.array(m.logprobs), np.array(b.logprobs), np.array([row.n_targets for row in m.unit.rows], np.float64))
            for m, b in zip(mine, base, strict=True)
        )
        return _each(np.array(list(each)))

    return values


def _best(values: Numbers) -> float:
    """Whether the first is the largest."""
    return float(values[0] > values[1:].max())


def _in_order(values: Numbers) -> float:
    """The part of all pairs of which the earlier has more."""
    return float(np.mean([values[i] > values[j] for i in range(len(values)) for j in range(i + 1, len(values))]))


def _over_others(values: Numbers) -> float:
    """The first less the mean of the others."""
    return float(values[0] - values[1:].mean())


def _nll(mine: Sequence[Record], _: Sequence[Record]) -> Values:
    """By token, of the wanted row; bad answers are not wanted, unless there are no others."""
    some = any(record.unit.desirable for record in mine)
    wanted = np.array([float(record.unit.desirable or not some) for record in mine])
    lost = np.array([-record.logprobs[record.unit.right] for record in mine])
    tokens = np.array([record.unit.rows[record.unit.right].n_targets for record in mine], np.float64)
    return Values(wanted * lost, wanted * tokens)


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
