"""--profile: a trace of some steps, which changes nothing else. (A real run with it: test_log_file.py.)"""

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.training.run.profiler import StepProfiler


def run(profiler: StepProfiler, steps: int, first: int = 1) -> list[float]:
    """Steps that multiply matrices; their results."""
    torch.manual_seed(0)
    results = []
    for number in range(first, first + steps):
        with profiler.step(number):
            results.append(float((torch.randn(8, 8) @ torch.randn(8, 8)).sum()))
    return results


def events(file: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]


def test_the_steps_after_the_first_are_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, 1, 2)
    run(profiler, steps=5, first=11)
    names = events(tmp_path / "profile/rank-1.json.gz")
    assert [name for name in names if name.startswith("step ")] == ["step 12", "step 13"]
    assert names.count("aten::matmul") == 2
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-1.json.gz"]


def test_a_run_that_is_too_short_leaves_nothing(tmp_path: Path) -> None:
    run(StepProfiler(tmp_path, 0, 2), steps=1)
    assert not list(tmp_path.iterdir())


def test_results_are_those_of_the_run_without_it(tmp_path: Path) -> None:
    assert run(StepProfiler(tmp_path, 0, 2), steps=4) == run(StepProfiler(tmp_path, 0, 0), steps=4)


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file")
    assert len(run(StepProfiler(tmp_path, 0, 1), steps=4)) == 4
    assert "profile/rank-0.json.gz: cannot be written: " in capsys.readouterr().err


def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/.rank-0.json.gz").symlink_to("/dev/full")
    assert len(run(StepProfiler(tmp_path, 0, 1), steps=4)) == 4
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "profile/rank-0.json.gz").exists()
