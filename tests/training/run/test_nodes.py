"""A run over two nodes: two launchers on 127.0.0.1 with working folders of their own and one output folder."""

import os
import signal
import subprocess
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import nodes
from tests.helpers.builders import ROOT, finish, metrics, only_run, train, write_config
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers
from tests.training.run.test_stop import gone


def config(folder: Path, base: Path, output: str, steps: int, **changes: Any) -> str:
    settings = {"model": str(base), "output_dir": str(folder / output), "max_steps": steps, "epochs": 1000}
    return str(write_config(folder / f"{output}.toml", **{**settings, "lora_dropout": 0.2, **changes}))


def adapter_of(run: Path, step: int) -> str:
    return sha256((run / f"step{step}" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_two_torchrun_agents_train_what_one_machine_does(tmp_path: Path, base: Path) -> None:
    """The same adapter to the byte, the same state and metrics; only the first says it."""
    launchers = nodes.agents(tmp_path, "--config", config(tmp_path, base, "two", 3))
    said = nodes.ended(launchers, 400)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    train(2, "--config", config(tmp_path, base, "one", 3))
    two, one = (only_run(tmp_path / name) for name in ("two", "one"))
    assert adapter_of(two, 3) == adapter_of(one, 3)
    assert numbers(str(two)) == numbers(str(one))
    assert_equal(final_state(str(two), 3), final_state(str(one), 3))
    assert "done: 3 steps" in said[0]
    assert "done: 3 steps" not in said[1]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {two.name, "dataset_cache"}, (
        "nothing is left beside it"
    )


@pytest.mark.slow
def test_a_run_goes_from_two_nodes_to_one_and_back(tmp_path: Path, base: Path) -> None:
    """DeepSpeed's launcher on each node: bit-equal, with dropout, to a run that was never stopped; and so is what is folded."""
    path, whole = (config(tmp_path, base, name, 6, save_steps=6) for name in ("parts", "whole"))
    nodes.deepspeed(tmp_path, "--config", path, "--set", "max_steps=2")
    train(2, "--config", path, "--set", "max_steps=4", "--resume_from_checkpoint")
    nodes.deepspeed(tmp_path, "--config", path, "--resume_from_checkpoint")
    train(2, "--config", whole)
    parts, uncut = (only_run(tmp_path / name) for name in ("parts", "whole"))
    assert_equal(final_state(str(parts), 6), final_state(str(uncut), 6))
    assert numbers(str(parts)) == numbers(str(uncut))
    assert adapter_of(parts, 6) == adapter_of(uncut, 6)
    for run in (parts, uncut):
        merge = ("--input", str(base), "--lora", str(run / "step6"), "--output", str(run / "merged"))
        finish(subprocess.Popen(["python", str(ROOT / "merge_lora.py"), *merge], text=True), 0, 120)
    first, second = (sorted((run / "merged").glob("*.safetensors")) for run in (parts, uncut))
    assert first
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def under_way(tmp_path: Path, base: Path, *options: str) -> tuple[list[subprocess.Popen[str]], list[int], Path]:
    """Two agents whose run has done some steps; the ids of their processes, by node; the run's folder."""
    launchers = nodes.agents(tmp_path, "--config", config(tmp_path, base, "runs", 100000), options=options)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert not [said for launcher in launchers if launcher.poll() is not None for said in launcher.communicate()]
        files = list((tmp_path / "runs").glob("2*/metrics.jsonl"))
        if files and files[0].read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    ranks = [child.pid for launcher in launchers for child in psutil.Process(launcher.pid).children(recursive=True)]
    assert len(ranks) == 2
    return launchers, ranks, only_run(tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_stop_of_either_agent_saves_and_leaves_no_orphan(
    tmp_path: Path, base: Path, node: int, number: signal.Signals
) -> None:
    launchers, ranks, run = under_way(tmp_path, base)
    os.kill(launchers[node].pid, number)
    assert gone(ranks, 45), "orphans"
    said = nodes.ended(launchers, 60)
    done = max(line["step"] for line in metrics(run))
    assert f"stopped after step {done}; resume with\n  torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 " in said[0]
    assert "  # on each of the 2 nodes, each with its own --node-rank" in said[0]
    assert (run / f"global_step{done}/manifest.json").exists()
    assert not list(run.glob(".staging-*"))


@pytest.mark.slow
def test_a_rank_killed_on_one_node_is_named_on_the_other(tmp_path: Path, base: Path) -> None:
    launchers, ranks, _ = under_way(tmp_path, base)
    os.kill(ranks[1], signal.SIGKILL)
    assert gone(ranks, 45), "orphans"
    said = nodes.ended(launchers, 60)
    assert f"rank 0: lost rank 1 on {os.uname().nodename} (process {ranks[1]}): step " in said[0]


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, base: Path) -> None:
    """A relative output_dir is another folder on each node here."""
    path = config(tmp_path, base, "runs", 2, output_dir="runs")
    nodes_said = nodes.deepspeed(tmp_path, "--config", path, expect=2)
    assert "output_dir = 'runs' is not one folder on all nodes" in nodes_said


@pytest.mark.slow
def test_torchrun_s_restart_goes_on_from_the_newest_checkpoint(tmp_path: Path, base: Path) -> None:
    """A rank is killed after a checkpoint; both agents start theirs again, in the same run's folder, with the same numbers."""
    settings = {"save_steps": 2, "checkpoint_on_save": True}
    launchers = nodes.agents(
        tmp_path, "--config", config(tmp_path, base, "runs", 40, **settings), options=("--max-restarts", "2")
    )
    deadline = time.monotonic() + 400
    while not list((tmp_path / "runs").glob("2*/global_step*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(psutil.Process(launchers[1].pid).children(recursive=True)[0].pid, signal.SIGKILL)
    said = nodes.ended(launchers, 240)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    assert said[0].count("resumed:  after step ") == 1
    train(2, "--config", config(tmp_path, base, "whole", 40, **settings))
    runs, whole = (only_run(tmp_path / name) for name in ("runs", "whole"))
    assert_equal(final_state(str(runs), 40), final_state(str(whole), 40))
    assert numbers(str(runs)) == numbers(str(whole))


@pytest.mark.slow
def test_replicas_lie_across_nodes_and_pipelines_within(tmp_path: Path, base: Path) -> None:
    """Two stages, two replicas: the same numbers as on one machine, where the ranks are in the other order."""
    said = nodes.deepspeed(tmp_path, "--config", config(tmp_path, base, "two", 3), per_node=2)
    train(4, "--config", config(tmp_path, base, "one", 3))
    two, one = (only_run(tmp_path / name) for name in ("two", "one"))
    assert adapter_of(two, 3) == adapter_of(one, 3), said
    assert numbers(str(two)) == numbers(str(one))
    assert_equal(final_state(str(two), 3), final_state(str(one), 3))
