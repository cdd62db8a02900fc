"""One seed of benchmarks/preference.py: what preference training does on a task whose answer is known."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.helpers.builders import ROOT, environment

Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """By run and dataset."""
    out = tmp_path_factory.mktemp("planted")
    command = [sys.executable, "-m", "benchmarks.preference", "--seeds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "preference.json").read_text())["rows"]
    return {(row["run"], row["dataset"]): row for row in found}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_base_prefers_neither_style(rows: Rows) -> None:
    for dataset in ("train", "test", "ood", "unrelated"):
        assert 0.3 < rows["base", dataset]["pref_acc_mean"] < 0.7, dataset


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", ["sigmoid", "ipo"])
def test_what_is_learnt_holds_for_new_prompts_and_for_topics_that_were_not_trained(rows: Rows, run: str) -> None:
    trained = rows[run, "train"]
    assert trained["pref_acc_mean"] > 0.95
    assert trained["pref_acc_mean_delta"][1] > 0.2, "the interval's lower end"
    assert trained["pref_acc_mean_p"] < 1e-6
    assert {"did not learn", "learned the opposite", "inactive"}.isdisjoint(trained["lights"])
    assert rows[run, "test"]["pref_acc_mean"] > 0.9
    assert rows[run, "ood"]["pref_acc_mean"] > 0.9
    assert abs(rows[run, "unrelated"]["pref_acc_mean"] - rows["base", "unrelated"]["pref_acc_mean"]) < 0.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_labels_turned_round_and_a_fiftieth_of_the_rate_are_lit(rows: Rows) -> None:
    turned = rows["sigmoid, labels inverted", "train"]
    assert turned["pref_acc_mean"] < 0.05
    assert "learned the opposite" in turned["lights"]
    slow = rows["sigmoid, a fiftieth of the rate", "train"]
    assert "did not learn" in slow["lights"]
    assert abs(slow["pref_prob_mean"] - rows["base", "train"]["pref_prob_mean"]) < 0.1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_reroute_alone_makes_chosen_answers_incoherent_and_retain_keeps_them(rows: Rows) -> None:
    base, alone, held = (rows[run, "train"] for run in ("base", "reroute alone", "reroute, retain × 1"))
    assert alone["lp_w"] < base["lp_w"] - 1
    assert "incoherent" in alone["lights"]
    assert abs(held["lp_w"] - base["lp_w"]) < 0.2
    assert "incoherent" not in held["lights"]
    assert held["pref_acc_mean"] > 0.95, "and what is rejected falls all the same"
