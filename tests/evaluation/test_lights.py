"""Figures against their formulas on drawn log-probabilities, and the lights: each lit by what it is for, and by nothing else."""

from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.evaluation import cells
from pipeline.evaluation.cells import Cell, Light, Rules
from pipeline.evaluation.records import Scored, records
from pipeline.evaluation.scoring import Score
from pipeline.evaluation.units import Row, Unit, UnitSet

RULES = Rules(resamples=400, confidence=0.95, seed=0, beta=0.1)
N = 120


def pairs(seed: int = 0, role: str = "in-sample", name: str = "train") -> UnitSet:
    """Pairs of 2 to 9 tokens, two of a prompt."""
    generator = np.random.default_rng(seed)
    units = []
    for number in range(N):
        lengths = generator.integers(2, 10, 2).tolist()
        rows = tuple(Row([0] * (n + 1), [(1, n + 1)], 3 * n) for n in lengths)
        units.append(Unit(f"prompt {number // 2}", f"{name} {number}", f"{name}:{number}", rows))
    return UnitSet(name, "preference", role, units)


def logprobs(data: UnitSet, seed: int = 1) -> np.ndarray:
    """Of the base, [N, 2]: each token about −1.5."""
    noise = np.random.default_rng(seed).normal(-1.5, 0.2, (N, 2))
    return noise * [[row.n_targets for row in unit.rows] for unit in data.units]


def scored(adapter: str, data: UnitSet, values: np.ndarray) -> Scored:
    return Scored(adapter, None, data, records(data, [Score(float(v), False) for v in values.ravel()]))


def lit(scores: Sequence[Scored]) -> list[Light]:
    return cells.lights(scores, cells.cells(scores, RULES))


def moved(data: UnitSet, values: np.ndarray, chosen: float, rejected: float) -> np.ndarray:
    """Each token of the chosen and of the rejected completion likelier by so much."""
    return values + np.array([[chosen, rejected]]) * [[row.n_targets for row in unit.rows] for unit in data.units]


def test_the_figures_are_those_of_their_formulas() -> None:
    data = pairs()
    base, mine = logprobs(data), logprobs(data, seed=2)
    found = {
        c.measure: c
        for c in cells.cells([scored("base", data, base), scored("a", data, mine)], RULES)
        if c.adapter == "a"
    }
    n = np.array([[row.n_targets for row in unit.rows] for unit in data.units])
    mean, delta = mine / n, mine - base
    right = {
        "pref_acc_sum": (mine[:, 0] > mine[:, 1]).mean(),
        "pref_acc_mean": (mean[:, 0] > mean[:, 1]).mean(),
        "pref_prob_mean": (1 / (1 + np.exp(mean[:, 1] - mean[:, 0]))).mean(),
        "pref_acc_bytes": (mean[:, 0] > mean[:, 1]).mean(),  # every token has three bytes
        "reward_acc": (delta[:, 0] > delta[:, 1]).mean(),
        "margin": 0.1 * (delta[:, 0] - delta[:, 1]).mean(),
        "nll": -mine[:, 0].sum() / n[:, 0].sum(),
    }
    assert {name: cell.figure.value for name, cell in found.items()} == pytest.approx(right, abs=1e-12)
    moved_by = right["nll"] + base[:, 0].sum() / n[:, 0].sum()
    nll = found["nll"]
    assert nll.delta is not None
    assert nll.delta.value == pytest.approx(moved_by, abs=1e-12)
    assert nll.ratio is not None
    assert nll.ratio[0] == pytest.approx(np.exp(moved_by))
    assert (nll.rows, nll.prompts) == (N, N // 2)


def test_the_base_is_not_compared_with_itself() -> None:
    data = pairs()
    found = cells.cells([scored("base", data, logprobs(data))], RULES)
    assert {c.measure for c in found}.isdisjoint({"reward_acc", "margin"})
    assert all(cell.delta is None for cell in found)


@pytest.mark.parametrize(
    ("chosen", "rejected", "wanted"),
    [
        (0.1, -0.6, []),
        (-0.1, -0.8, []),  # the chosen falls too, and less than a fifth
        (-0.6, 0.1, ["learned the opposite", "incoherent"]),
        (0.1, 0.1, ["did not learn"]),
        (-0.6, -0.6, ["did not learn", "incoherent"]),
        (0.0, 0.0, ["inactive"]),
    ],
)
def test_each_light_is_lit_by_its_own(chosen: float, rejected: float, wanted: list[str]) -> None:
    data = pairs()
    base = logprobs(data)
    found = lit([scored("base", data, base), scored("a", data, moved(data, base, chosen, rejected))])
    assert [light.what for light in found] == wanted


def test_inverted_labels_light_the_opposite() -> None:
    """What makes one half of the answers likelier is right by the labels, and wrong by the labels turned round."""
    data = pairs()
    base = logprobs(data)
    learnt = moved(data, base, 0.1, -0.6)
    turned = UnitSet("train", "preference", "in-sample", [u._replace(rows=u.rows[::-1]) for u in data.units])
    assert lit([scored("base", data, base), scored("a", data, learnt)]) == []
    (light,) = (
        one
        for one in lit([scored("base", turned, base[:, ::-1]), scored("a", turned, learnt[:, ::-1])])
        if one.what != "incoherent"
    )
    assert light.what == "learned the opposite"
    assert light.dataset == "train"


def test_rows_that_were_not_trained_on_need_not_be_learnt() -> None:
    data = pairs(role="ood", name="elsewhere")
    base = logprobs(data)
    assert lit([scored("base", data, base), scored("a", data, moved(data, base, 0.01, 0.01))]) == []


def test_one_prompt_proves_nothing() -> None:
    data = pairs()
    one = UnitSet("train", "preference", "in-sample", [u._replace(prompt="the only") for u in data.units])
    base = logprobs(data)
    assert lit([scored("base", one, base), scored("a", one, moved(data, base, 0.0, 0.5))]) == []


def main_cells(found: list[Cell], adapter: str) -> Cell:
    return next(c for c in found if c.main and c.adapter == adapter)


def test_a_base_that_is_right_already_leaves_no_interval() -> None:
    data = pairs()
    base = moved(data, np.zeros((N, 2)), -1.0, -2.0)
    found = cells.cells([scored("base", data, base), scored("a", data, moved(data, base, 0.1, 0.0))], RULES)
    mine = main_cells(found, "a")
    assert mine.delta is not None
    assert (mine.delta.value, mine.delta.interval, mine.detectable, mine.p) == (0, None, None, 1.0)
