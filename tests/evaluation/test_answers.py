"""Unpaired and ranked answers: which rows are scored, and the figures by their formulas on drawn log-probabilities."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation import cells
from pipeline.evaluation.cells import Cell, Rules
from pipeline.evaluation.records import Scored, records
from pipeline.evaluation.scoring import Score
from pipeline.evaluation.units import Kind, UnitSet, units_of_answers
from tests.data.units.test_units import stored

RULES = Rules(resamples=200, confidence=0.95, seed=0, beta=0.1)
N, RANKS = 40, 4


def data(path: Path, kind: Kind) -> UnitSet:
    """Answers of 1 to 4 words, two units of a prompt; every third unpaired one is bad."""
    words = [f" {'x' * (1 + n % 4)}{n}" for n in range(5 * N)]
    rows: list[dict[str, Any]] = []
    for n in range(N):
        answers = ["".join(words[RANKS * n + k : RANKS * n + k + 1 + (n + k) % 4]) for k in range(RANKS)]
        unit = {"answers": answers} if kind == "ranked" else {"completion": answers[0], "label": n % 3 > 0}
        rows.append({"prompt": f"p{n // 2}", **unit})
    store = stored(path, rows, kind, ranks=RANKS)
    return UnitSet("set", kind, "in-sample", units_of_answers(store, lambda ids: "x" * len(ids)))


def figures(units: UnitSet, seed: int = 0) -> tuple[dict[str, Cell], np.ndarray, np.ndarray, np.ndarray]:
    """An adapter's cells by measure; its lp, the base's, and the tokens, [N, K]."""
    n = np.array([[row.n_targets for row in unit.rows] for unit in units.units], np.float64)
    draw = np.random.default_rng(seed)
    base, mine = (draw.normal(-1.5, 0.4, n.shape) * n for _ in range(2))
    scored = [
        Scored(name, None, units, records(units, [Score(float(v), False) for v in lp.ravel()]))
        for name, lp in (("base", base), ("a", mine))
    ]
    return {cell.measure: cell for cell in cells.cells(scored, RULES) if cell.adapter == "a"}, mine, base, n


def test_of_unpaired_answers_the_answer_alone_is_scored(tmp_path: Path) -> None:
    units = data(tmp_path, "unpaired")
    assert {len(unit.rows) for unit in units.units} == {1}
    assert [unit.desirable for unit in units.units] == [n % 3 > 0 for n in range(N)]
    assert len({unit.prompt for unit in units.units}) == N // 2
    found, mine, base, n = figures(units)
    good = np.array([unit.desirable for unit in units.units])
    sign = np.where(good, 1, -1)
    lp, ref, n = mine[:, 0], base[:, 0], n[:, 0]
    right = {
        "rated_lp_mean": (sign * lp / n).mean(),
        "reward_acc": (sign * (lp - ref) > 0).mean(),
        "margin": 0.1 * (sign * (lp - ref)).mean(),
        "nll": -lp[good].sum() / n[good].sum(),
    }
    assert {name: cell.figure.value for name, cell in found.items()} == pytest.approx(right)
    assert found["rated_lp_mean"].main


def test_bad_answers_by_themselves_have_a_loss(tmp_path: Path) -> None:
    units = data(tmp_path, "unpaired")
    bad = UnitSet("set", "unpaired", "test", [unit for unit in units.units if not unit.desirable])
    found, mine, _, n = figures(bad)
    assert found["nll"].figure.value == pytest.approx(-mine.sum() / n.sum())


def test_ranked_answers_are_right_where_the_best_is_the_likeliest(tmp_path: Path) -> None:
    units = data(tmp_path, "ranked")
    assert {len(unit.rows) for unit in units.units} == {RANKS}
    found, mine, base, n = figures(units)
    mean, delta = mine / n, mine - base
    in_order = [[row[i] > row[j] for i, j in combinations(range(RANKS), 2)] for row in mean]
    right = {
        "rank_acc_mean": (mean.argmax(axis=1) == 0).mean(),
        "rank_pairs_mean": np.mean(in_order),
        "reward_acc": (delta.argmax(axis=1) == 0).mean(),
        "margin": 0.1 * (delta[:, 0] - delta[:, 1:].mean(axis=1)).mean(),
        "nll": -mine[:, 0].sum() / n[:, 0].sum(),
    }
    assert {name: cell.figure.value for name, cell in found.items()} == pytest.approx(right)
    assert found["rank_acc_mean"].p is not None
    assert found["rank_acc_mean"].main
