"""The golden runs (tests/golden/): real runs give what they gave when they were recorded, within rounding.

To the bit they are compared by `make golden`, on one machine before and after a change. Of the tests, those that change a
digest show that the comparison would see it.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.golden.compare import RELATIVE, differences
from tests.golden.runs import RUNS, golden
from tests.helpers.builders import ROOT, environment

QUICK = [name for name, run in RUNS.items() if not run.slow]
SLOW = [name for name, run in RUNS.items() if run.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The digest of a run as it is now; the quick ones, and the slow ones, are carried out together: imports take long."""

    @cache
    def carried_out(names: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("golden")
        command = [sys.executable, "-m", "tests.golden.record", "--output", str(folder), *names]
        done = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    def digest(name: str) -> Any:
        names = tuple(SLOW if RUNS[name].slow else QUICK)
        return json.loads((carried_out(names) / f"{name}.json").read_text())

    return digest


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_run_gives_what_it_gave(name: str, found: Callable[[str], Any]) -> None:
    recorded = golden(name)
    assert recorded is not None, "make golden"
    assert differences(recorded, found(name), RUNS[name].rounding) == []


def test_stages_change_no_number() -> None:
    """What is committed of one, two and three stages is one run, within fp32 rounding."""
    one, *others = (golden(f"multiplicative_{n}") or {} for n in ("1_stage", "2_stages", "3_stages"))
    for other in others:
        assert differences(one, other) == []


def test_what_is_committed_is_what_there_is() -> None:
    assert {file.stem for file in (ROOT / "tests" / "golden").glob("*.json")} == RUNS.keys()


def changed(recorded: dict[str, Any], *path: Any, by: float = 0.0, to: Any = None) -> dict[str, Any]:
    """A copy with one value multiplied by 1 + `by`, or with another."""
    made: Any = copy.deepcopy(recorded)
    *way, last = path
    place = made
    for key in way:
        place = place[key]
    place[last] = place[last] * (1 + by) if to is None else to
    return made  # type: ignore[no-any-return]


WEIGHT = "model.layers.1.mlp.down_proj.weight"
CHANGES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "loss": (("steps", 3, "loss"), {"by": 2e-5}),
    "loss is none": (("steps", 3, "loss"), {"to": float("nan")}),
    "norm": (("steps", 0, "norm"), {"by": -2e-4}),
    "learning rate": (("steps", 2, "lr"), {"by": 1e-9}),
    "evaluation": (("evaluations", 1, "eval/book/loss"), {"by": 2e-5}),
    "evaluated at another step": (("evaluations", 1, "after"), {"to": 3}),
    "a step less": (("steps",), {"to": []}),
    "no evaluation": (("evaluations",), {"to": []}),
    "another size of a change": (("weights", "changed", WEIGHT, "change"), {"by": 3e-3}),
    "another direction": (("weights", "changed", WEIGHT, "along"), {"to": 0.5}),
    "another tensor": (("weights", "changed"), {"to": {}}),
    "one more of the base's": (("weights", "unchanged"), {"to": 32}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_comparison_sees(change: str) -> None:
    recorded = golden("multiplicative_1_stage") or {}
    path, how = CHANGES[change]
    lines = differences(recorded, changed(recorded, *path, **how))
    assert len(lines) == 1
    assert str(path[0]) in lines[0] + "weights"
    assert differences(recorded, recorded) == []


@pytest.mark.parametrize(("key", "place"), [("loss", "steps"), ("norm", "steps")])
def test_rounding_passes(key: str, place: str) -> None:
    recorded = golden("multiplicative_1_stage") or {}
    assert differences(recorded, changed(recorded, place, 1, key, by=RELATIVE[key] / 2)) == []
