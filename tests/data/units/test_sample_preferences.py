"""datasets/sample_preferences: each pair is one answer in metric units and in others, and no question is in two files."""

import json
import re

from tests.helpers.builders import ROOT

FOLDER = ROOT / "datasets" / "sample_preferences"
METRIC = re.compile(r"metre|kilogram|grams|litre|Celsius|hectare|\bbar\b")
OTHERS = re.compile(r"mile|feet|inch|pound|ounce|yard|cups|gallon|Fahrenheit|acre")


def pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_pair_is_one_answer_in_two_systems_of_units() -> None:
    sets = [pairs(name) for name in ("metric_measures", "metric_measures_new", "metric_measures_elsewhere")]
    assert [len(rows) for rows in sets] == [40, 16, 16]
    for row in (row for rows in sets for row in rows):
        assert METRIC.search(row["chosen"]), row
        assert OTHERS.search(row["rejected"]), row
        assert not METRIC.search(row["rejected"]), row
        assert not OTHERS.search(row["chosen"]), row
    assert len({row["prompt"] for rows in sets for row in rows}) == 72, "no question is in two of them"
    trained = " ".join(row["chosen"] for row in sets[0])
    assert not re.search(r"Celsius|litre|hectare", trained), "what is elsewhere is in no pair"
