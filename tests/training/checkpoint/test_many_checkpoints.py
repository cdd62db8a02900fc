"""A folder with a thousand checkpoints: what finding the newest and pruning the rest ask of the disk, counted, not timed."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoint import commit, retention
from tests.helpers.checkpoints import facts

WATCHED = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir")
asked: Counter[str] | None = None


def count(event: str, arguments: tuple[Any, ...]) -> None:
    if asked is not None and event in WATCHED and "global_step" in str(arguments[0]):
        asked[event] += 1


sys.addaudithook(count)  # which stays as long as the process: it does nothing where nobody counts


def counted(do: Any, *arguments: Any) -> Counter[str]:
    global asked
    asked = Counter()
    try:
        do(*arguments)
        return asked
    finally:
        asked = None


def folder(where: Path, checkpoints: int) -> Path:
    """So many whole checkpoints; but for the newest, copies by name only, of which nothing else may be looked at."""
    for step in range(1, checkpoints):
        (where / f"global_step{step}").mkdir(parents=True)
        (where / f"global_step{step}" / "manifest.json").write_text("{}")
    commit.save(where, "launch", 0, 1, checkpoints, {"weights/m.A": torch.ones(3)}, facts(1))
    return where


@pytest.mark.parametrize("what", ["finding", "pruning"])
def test_the_cost_of_a_thousand_checkpoints_is_linear(tmp_path: Path, what: str) -> None:
    costs = {}
    for n in (100, 1000):
        run = folder(tmp_path / str(n), n)
        do = (lambda run=run: commit.find(run, newest_run=False)) if what == "finding" else None
        costs[n] = counted(do or (lambda run=run: retention.prune(run, "global_step", 1)))
        assert (run / f"global_step{n}").is_dir()
    if what == "finding":
        assert costs[1000] == costs[100], "the newest alone is opened"
        assert costs[100]["open"] <= 4  # the manifest, and the shard, which is hashed
    else:
        assert sorted(p.name for p in (tmp_path / "1000").glob("*global_step*")) == ["global_step1000"]
        assert costs[100]["os.rmdir"] == 99, "something is counted"
        for event, number in costs[1000].items():
            assert number * 99 <= costs[100][event] * 999, f"{event} grows faster than the checkpoints that go"
