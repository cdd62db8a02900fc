"""`make gpu-check` at a tiny size on the CPU: every check passes, sees what is wrong, and stops none of the others.

The checks run in this process here; on a GPU each has its own. Real runs of train.py are forks, which have its imports.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import levels, page, quantised, training
from benchmarks.gpu_check.checks import CHECKS, carry_out, failed
from benchmarks.gpu_check.setting import Setting, setting
from pipeline.kernels import dispatch
from tests.golden.runs import import_everything
from tests.helpers import builders


@pytest.fixture
def tiny(tmp_path: Path) -> Setting:
    return setting("cpu", True, tmp_path)


@pytest.mark.parametrize("name", ["kernels", "levels", "quantised", "peer"])
def test_a_check_passes(name: str, tiny: Setting) -> None:
    row = carry_out(name, CHECKS[name].function(), tiny)
    assert row["passed"], row
    assert row["compared"]
    assert row["tolerance"]
    assert json.loads(json.dumps(row)) == row


def test_a_killed_run_goes_on_to_the_bit_and_its_plan_is_measured(tiny: Setting) -> None:
    import_everything()
    resumed = training.killed_and_resumed(tiny, "fork")
    assert resumed.passed, resumed
    assert len(resumed.figures["losses"]) == training.COMPARED
    planned = training.planned(tiny, "fork")
    assert planned.passed, planned
    assert planned.figures["measured_bytes"] > 0


def test_the_budgets_are_under_five_minutes() -> None:
    assert sum(check.budget_s for check in CHECKS.values()) < 300


def test_the_command_carries_on_after_a_failure_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**failed("kernels", "Traceback: it broke"), "seconds": 1.0},
        {**failed("peer", ""), "passed": True, "seconds": 1.0},
    ]
    monkeypatch.setattr(command, "in_a_process", lambda *_: rows.pop(0))
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--device=cpu", "--tiny", "--only", "kernels", "peer", "--out", str(tmp_path)]
    )
    assert command.main() == 1
    assert "FAILED: kernels" in capsys.readouterr().err
    written = json.loads((tmp_path / "gpu_check_the_cpu.json").read_text())
    assert [row["passed"] for row in written["rows"]] == [False, True]
    assert {"mulora-pipe", "torch"} <= set(written["machine"]["versions"])
    text = (tmp_path / "gpu_check_the_cpu.md").read_text()
    assert "FAILED: kernels" in text
    assert "it broke" in text


def test_a_check_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As on a GPU."""
    row = command.in_a_process("kernels", "cpu", True, tmp_path)
    assert row["passed"], row
    assert "| kernels | yes |" in page.page(*_about(), [row])


def test_a_process_that_dies_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    row = command.in_a_process("kernels", "cpu", True, tmp_path)
    assert not row["passed"]
    assert "ended with 1" in row["problem"]
    monkeypatch.setitem(CHECKS, "kernels", CHECKS["kernels"]._replace(budget_s=0.05))
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nsleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    assert "given up after" in command.in_a_process("kernels", "cpu", True, tmp_path)["problem"]


def test_a_gpu_counts_as_checked_where_its_results_are_committed() -> None:
    """The table by which kernels = 'auto' chooses has the CPU, which these tests check, and what a committed file shows."""
    for kind, shown in dispatch.CHECKED.items():
        if kind != "cpu":
            results = json.loads((builders.ROOT / shown).read_text())
            assert kind in results["settings"]["kinds"]
            assert not results["settings"]["tiny"]
            assert {row["name"] for row in results["rows"] if row["passed"]} == {*CHECKS}


def test_what_a_check_raises_is_its_row(tiny: Setting) -> None:
    def broken(_: Setting) -> Any:
        raise ValueError("the reason")

    row = carry_out("kernels", broken, tiny)
    assert not row["passed"]
    assert "the reason" in row["problem"]
    assert row["seconds"] >= 0


def test_one_bit_is_seen() -> None:
    right = {"loss": torch.ones(1), "0.A": torch.ones(64)}
    wrong = torch.ones(64)
    wrong[3] = torch.nextafter(wrong[3], torch.tensor(2.0))
    assert levels.same(right, right)
    assert not levels.same({**right, "0.A": wrong}, right)
    assert not levels.same({"loss": torch.tensor([float("nan")])}, {"loss": torch.tensor([float("nan")])})


def test_a_wrong_scale_is_seen(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantised.bnb.functional.dequantize_4bit
    monkeypatch.setattr(quantised.bnb.functional, "dequantize_4bit", lambda *given: real(*given) * 1.001)
    outcome = quantised.check(tiny)
    assert [row["good"] for row in outcome.figures["schemes"]] == [False, False, True]
    assert not outcome.passed


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert command.main() == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_of_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--tiny", "--out", str(tmp_path)],
        cwd=builders.ROOT,
        env=builders.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu_check_the_cpu.json").read_text())
    assert [row["name"] for row in written["rows"]] == [*CHECKS]


def _about() -> tuple[dict[str, Any], dict[str, Any]]:
    machine = {"when": "now", "versions": {"torch": "2"}, "python": "3", "cpu": "one", "cores": 2}
    return machine, {"device_name": "the CPU", "seconds": 1.0}
