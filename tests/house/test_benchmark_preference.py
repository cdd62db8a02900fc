"""What preference training does where the answer is known: the record of benchmarks/preference.py, and one seed run anew.

docs/preference.md has its tables from the record; what it says of them in words is held to here, for every seed.
"""

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import preference as benchmark
from benchmarks.planted import VOCABULARY
from docs import preference as docs
from tests.helpers.builders import ROOT, environment

Rows = dict[tuple[str, str], dict[str, Any]]  # of one seed, by run and dataset
FAILED = {"did not learn", "learned the opposite", "inactive"}


def by_seed(result: dict[str, Any]) -> list[Rows]:
    found: dict[int, Rows] = {}
    for row in result["rows"]:
        found.setdefault(row["seed"], {})[row["run"], row["dataset"]] = row
    return list(found.values())


@pytest.fixture(
    scope="module",
    params=["recorded", pytest.param("run", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def seeds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    """Of the record all seeds; of a run one."""
    if request.param == "recorded":
        return by_seed(json.loads((docs.RESULTS / "preference.json").read_text(encoding="utf-8")))
    out = tmp_path_factory.mktemp("planted")
    command = [sys.executable, "-m", "benchmarks.preference", "--seeds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return by_seed(json.loads((out / "preference.json").read_text()))


def test_the_page_has_the_tables_of_the_records() -> None:
    text = docs.PAGE.read_text(encoding="utf-8")
    assert docs.page(text) == text, "run python -m docs.preference"


def test_the_record_is_of_five_seeds_and_of_all_that_is_run() -> None:
    result = json.loads((docs.RESULTS / "preference.json").read_text(encoding="utf-8"))
    seeds = by_seed(result)
    assert len(seeds) == result["settings"]["seeds"] == 5
    wanted = {(run, dataset) for run in ("base", *benchmark.variants()) for dataset in benchmark.ROLES}
    assert all(set(rows) == wanted for rows in seeds)
    assert result["settings"].items() >= benchmark.USUAL._asdict().items()


def test_the_base_prefers_neither_style(seeds: list[Rows]) -> None:
    for rows in seeds:
        for dataset in benchmark.ROLES:
            assert 0.3 < rows["base", dataset]["pref_acc_mean"] < 0.7, dataset


@pytest.mark.parametrize("run", ["sigmoid", "ipo"])
def test_what_is_learnt_holds_for_new_prompts_and_for_topics_that_were_not_trained(seeds: list[Rows], run: str) -> None:
    for rows in seeds:
        trained = rows[run, "train"]
        assert trained["pref_acc_mean"] > 0.95
        assert trained["pref_acc_mean_delta"][1] > 0.2, "the interval's lower end"
        assert trained["pref_acc_mean_p"] < 1e-6
        assert FAILED.isdisjoint(trained["lights"])
        assert rows[run, "test"]["pref_acc_mean"] > 0.9
        assert rows[run, "ood"]["pref_acc_mean"] > 0.9
        assert abs(rows[run, "unrelated"]["pref_acc_mean"] - rows["base", "unrelated"]["pref_acc_mean"]) < 0.2
        assert trained["lp_w"] < rows["base", "train"]["lp_w"], "chosen answers become less likely, too"
        assert "incoherent" in trained["lights"]


def test_labels_turned_round_are_lit(seeds: list[Rows]) -> None:
    for rows in seeds:
        turned = rows["sigmoid, labels inverted", "train"]
        assert turned["pref_acc_mean"] < 0.05
        assert "learned the opposite" in turned["lights"]


def test_at_a_fiftieth_of_the_rate_next_to_nothing_happens(seeds: list[Rows]) -> None:
    """Pairs whose answers are about as likely tip over all the same, so accuracy may move."""
    slow = [rows["sigmoid, a fiftieth of the rate", "train"] for rows in seeds]
    assert sum("did not learn" in row["lights"] for row in slow) > len(slow) / 2
    for row in slow:
        assert abs(row["pref_prob_mean_delta"][0]) < 0.01


def test_reroute_alone_makes_chosen_answers_incoherent_in_most_seeds_and_retain_keeps_them(seeds: list[Rows]) -> None:
    lit = ["incoherent" in rows["reroute alone", "train"]["lights"] for rows in seeds]
    assert sum(lit) > len(lit) / 2
    for rows in seeds:
        base, held = (rows[run, "train"] for run in ("base", "reroute, retain × 1"))
        assert abs(held["lp_w"] - base["lp_w"]) < 0.2
        assert "incoherent" not in held["lights"]
        assert held["pref_acc_mean"] > 0.95
        assert held["lp_l"] < base["lp_l"] - 1, "what is rejected falls all the same"
        assert "incoherent" in rows["reroute, retain × 1", "unrelated"]["lights"], "and so it does elsewhere"


def test_circuit_breakers_break_what_they_should_and_leave_the_rest(seeds: list[Rows]) -> None:
    chance = -math.log(len(VOCABULARY))
    for rows in seeds:
        for dataset in docs.BROKEN:
            assert rows["circuit breakers", dataset]["lp_w"] < chance
            assert rows["circuit breakers", dataset]["nll_delta"][1] > 1, "the interval's lower end"
        for dataset in docs.KEPT:
            assert rows["circuit breakers", dataset]["nll_delta"][2] < math.log(1.2), "the interval's upper end"
            assert "incoherent" not in rows["circuit breakers", dataset]["lights"]
            assert rows["circuit breakers, retain × 0", dataset]["nll_delta"][1] > 1, "it is retain that keeps them"


def test_with_retained_rows_of_the_topics_to_be_broken_the_terms_are_at_odds(seeds: list[Rows]) -> None:
    for rows in seeds:
        for dataset in benchmark.ROLES:
            row = rows["circuit breakers, retain of the same topics", dataset]
            assert row["lp_w"] > -math.log(len(VOCABULARY)), dataset
            assert "incoherent" in row["lights"], dataset


def test_smollm_learns_the_preference_and_stays_coherent() -> None:
    result = json.loads((docs.RESULTS / "preference_smollm.json").read_text(encoding="utf-8"))
    found = {(row["dataset"], row["measure"]): row for row in result["rows"] if row["adapter"] == "adapter"}
    assert found["trained", "pref_acc_mean"]["value"] * 40 == pytest.approx(39)
    assert found["other_quantities", "pref_acc_mean"]["value"] * 16 == pytest.approx(13, abs=0.01)
    for dataset in ("trained", "new_questions", "other_quantities"):
        assert found[dataset, "pref_acc_mean"]["delta_low"] > 0, dataset
    for dataset in ("trained", "new_questions"):  # the chosen answers
        assert found[dataset, "nll"]["delta_high"] < 0, dataset
    assert result["settings"]["lights"] == []
    assert 0.05 < math.expm1(found["other_answers", "nll"]["delta"]) < 0.07
