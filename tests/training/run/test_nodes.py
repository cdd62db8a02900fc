"""A run over two nodes: two launchers on 127.0.0.1 with working folders of their own and one output folder."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.training.nodes.records import EXCHANGE_S
from tests.helpers import nodes
from tests.helpers.builders import metrics, only_run, train, write_config
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers
from tests.training.run.test_preference_trained import write_rows
from tests.training.run.test_stop import gone


def config(folder: Path, base: Path, output: str, steps: int, **changes: Any) -> str:
    settings = {
        "model": str(base),
        "output_dir": str(folder / output),
        "max_steps": steps,
        "epochs": 1000,
        "lora_dropout": 0.2,
        "after_training": ["merge"],
    }
    return str(write_config(folder / f"{output}.toml", **{**settings, **changes}))


def adapter_of(run: Path, step: int) -> str:
    return sha256((run / f"step{step}" / "adapter_model.safetensors").read_bytes()).hexdigest()


def tensors_in(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def assert_same(run: Path, other: Path, step: int) -> None:
    """Of two runs to this step: adapter, metrics, state and folded model."""
    assert adapter_of(run, step) == adapter_of(other, step)
    assert numbers(str(run)) == numbers(str(other))
    assert_equal(final_state(str(run), step), final_state(str(other), step))
    assert tensors_in(run / "merged") == tensors_in(other / "merged")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The run of three steps on one machine."""
    folder = tmp_path_factory.mktemp("one")
    train(2, "--config", config(folder, base, "one", 3))
    return only_run(folder / "one")


def test_two_torchrun_agents_train_what_one_machine_does(tmp_path: Path, base: Path, one: Path) -> None:
    """The same adapter to the byte, the same state, metrics and folded model; only the first says it."""
    launchers = nodes.agents(tmp_path, "--config", config(tmp_path, base, "two", 3))
    said = nodes.ended(launchers, 400)
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    two = only_run(tmp_path / "two")
    assert_same(two, one, 3)
    assert "done: 3 steps" in said[0]
    assert "done: 3 steps" not in said[1]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {two.name, "dataset_cache"}, (
        "nothing is left beside it"
    )


def test_nodes_with_disks_of_their_own_train_what_one_machine_does(tmp_path: Path, base: Path, one: Path) -> None:
    """A relative output_dir is another folder on each node here. Saved, brought together, stopped; gone on with on one machine,
    and from there on two nodes again, to which it is brought back."""
    path, unfolded = config(tmp_path, base, "apart", 3, output_dir="runs"), ("--set", "after_training=[]")
    first, second = (tmp_path / f"node{node}" / "runs" for node in (0, 1))
    said = nodes.deepspeed(tmp_path, "--config", path, "--set", "max_steps=1", *unfolded)
    assert f"output_dir: {os.uname().nodename} has another disk there than {os.uname().nodename}" in said
    on_one = ("--set", f"output_dir={first}", "--set", "max_steps=2", "--resume_from_checkpoint")
    assert "resumed:  after step 1" in train(2, "--config", path, *unfolded, *on_one)
    assert "resumed:  after step 2" in nodes.deepspeed(tmp_path, "--config", path, "--resume_from_checkpoint")
    apart = only_run(first)
    assert_same(apart, one, 3)
    assert {p.name for p in second.iterdir()} == {apart.name, "dataset_cache"}, "data is prepared once a node"
    assert not [p for p in (second / apart.name).rglob("*") if p.suffix == ".safetensors"], "all has gone to the first"
    assert not [p for folder in (first, apart, second, second / apart.name) for p in folder.glob(".[!l]*")], (
        "left behind"
    )


@pytest.mark.slow
def test_a_run_goes_from_two_nodes_to_one_and_back(tmp_path: Path, base: Path, one: Path) -> None:
    """DeepSpeed's launcher on each node: bit-equal, with dropout, to a run that was never stopped; and so is what is folded."""
    path, unfolded = config(tmp_path, base, "parts", 3), ("--set", "after_training=[]")
    nodes.deepspeed(tmp_path, "--config", path, "--set", "max_steps=1", *unfolded)
    train(2, "--config", path, "--set", "max_steps=2", *unfolded, "--resume_from_checkpoint")
    nodes.deepspeed(tmp_path, "--config", path, "--resume_from_checkpoint")
    assert_same(only_run(tmp_path / "parts"), one, 3)


def wait_for_steps(output: Path, has_failed: Callable[[], object]) -> None:
    """Until the run in `output` has done some."""
    deadline = time.monotonic() + 400
    while not [f for f in output.glob("2*/metrics.jsonl") if f.read_text().count("\n") >= 2]:
        assert not (said := has_failed()), said
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_stop_of_either_agent_saves_and_leaves_no_orphan(
    tmp_path: Path, base: Path, node: int, number: signal.Signals
) -> None:
    launched = nodes.warm_agents(tmp_path, "--config", config(tmp_path, base, "runs", 100000))
    wait_for_steps(tmp_path / "runs", lambda: "error: " in (said := launched.said()) and said)
    run = only_run(tmp_path / "runs")
    below = [psutil.Process(agent).children() for agent in launched.launchers]
    ranks = [child.pid for children in below for child in children if child.pid not in launched.launchers]
    assert len(ranks) == 2
    os.kill(launched.launchers[node], number)
    assert gone(ranks, 45), "orphans"
    _, said = launched.ended(60)
    done = max(line["step"] for line in metrics(run))
    assert f"stopped after step {done}; resume with\n  torchrun --nnodes 2 --nproc-per-node 1 " in said
    assert "  # on each of the 2 nodes" in said
    assert (run / f"global_step{done}/manifest.json").exists()
    assert not list(run.glob(".staging-*"))


def under_way(tmp_path: Path, base: Path, *options: str) -> tuple[list[subprocess.Popen[str]], list[int], Path]:
    """Two agents whose run has done some steps; the ids of their processes, by node; the run's folder."""
    launchers = nodes.agents(tmp_path, "--config", config(tmp_path, base, "runs", 100000), options=options)
    wait_for_steps(tmp_path / "runs", lambda: [one.communicate() for one in launchers if one.poll() is not None])
    ranks = [child.pid for launcher in launchers for child in psutil.Process(launcher.pid).children(recursive=True)]
    assert len(ranks) == 2
    return launchers, ranks, only_run(tmp_path / "runs")


@pytest.mark.slow
def test_a_rank_killed_on_one_node_is_named_on_the_other(tmp_path: Path, base: Path) -> None:
    launchers, ranks, _ = under_way(tmp_path, base)
    time.sleep(3 * EXCHANGE_S)  # until then the other node has it that this one was starting
    os.kill(ranks[1], signal.SIGKILL)
    assert gone(ranks, 45), "orphans"
    said = nodes.ended(launchers, 60)
    assert f"rank 0: lost rank 1 on {os.uname().nodename} (process {ranks[1]}): step " in said[0], said[0]


@pytest.mark.slow
@pytest.mark.parametrize("disks", ["shared", "apart"])
def test_what_a_run_does_beside_its_steps(tmp_path: Path, base: Path, disks: str) -> None:
    """Evaluations, samples, saves, the fold and an export after the training: all as one machine does them."""
    settings = {
        "eval_steps": 2,
        "eval_before_first_step": True,
        "save_every_n_epochs": 1,
        "samples": {"prompts": ["The salt was", "He came"], "every_steps": 2, "max_new_tokens": 8, "seed": 3},
        "after_training": ["merge", "export:peft"],
    }
    of_two = {"output_dir": "runs"} if disks == "apart" else {}
    nodes.deepspeed(tmp_path, "--config", config(tmp_path, base, "two", 4, **settings, **of_two))
    train(2, "--config", config(tmp_path, base, "one", 4, **settings))
    one = only_run(tmp_path / "one")
    two = only_run(tmp_path / ("node0/runs" if disks == "apart" else "two"))
    assert numbers(str(two)) == numbers(str(one))
    assert {"eval/book/loss", "samples/stopped", "train/loss"} <= {key for line in metrics(two) for key in line}
    assert (two / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
    for folder in ("step4", "best_loss", "merged", "peft"):
        assert tensors_in(two / folder) == tensors_in(one / folder), folder


@pytest.mark.slow
@pytest.mark.parametrize("disks", ["shared", "apart"])
def test_a_step_that_hangs_on_one_node_is_saved_by_both(tmp_path: Path, base: Path, disks: str) -> None:
    """While the main threads wait in the step, from the others: the last completed step, from which the run goes on."""
    of_two = {"output_dir": "runs"} if disks == "apart" else {}
    path = config(tmp_path, base, "two", 5, hang_timeout_minutes=0.05, **of_two)
    launchers = nodes.agents(tmp_path, "--config", path, script="tests/workers/faulty_train.py", FAULT="step-hang:3")
    said = nodes.ended(launchers, 240)
    host = os.uname().nodename
    assert f"rank 1 hangs:\n  rank 1 on {host} (process " in said[0]
    assert "stopped after step 2; resume with" in said[0]
    nodes.deepspeed(tmp_path, "--config", path, "--resume_from_checkpoint")
    train(2, "--config", config(tmp_path, base, "one", 5))
    two = only_run(tmp_path / ("node0/runs" if disks == "apart" else "two"))
    assert adapter_of(two, 5) == adapter_of(only_run(tmp_path / "one"), 5)


@pytest.mark.slow
def test_disks_apart_torchrun_s_restart_goes_on_and_a_stop_is_not_restarted(tmp_path: Path, base: Path) -> None:
    """A rank of the other node is killed after a checkpoint, later its launcher is told to stop."""
    settings = {"save_steps": 2, "checkpoint_on_save": True, "output_dir": "runs"}
    path = config(tmp_path, base, "two", 100000, **settings)
    launchers = nodes.agents(tmp_path, "--config", path, options=("--max-restarts", "2"))
    first = tmp_path / "node0" / "runs"
    wait_for(lambda: list(first.glob("2*/global_step*/manifest.json")))
    run = only_run(first)
    killed = psutil.Process(launchers[1].pid).children(recursive=True)[0]
    killed.kill()
    wait_for(lambda: not killed.is_running() and psutil.Process(launchers[1].pid).children(recursive=True))
    done = max(line["step"] for line in metrics(run))
    wait_for(lambda: max((line["step"] for line in metrics(run)), default=0) > done + 2)
    ranks = [child.pid for one in launchers for child in psutil.Process(one.pid).children(recursive=True)]
    os.kill(launchers[1].pid, signal.SIGTERM)
    assert gone(ranks, 60), "orphans"
    said = nodes.ended(launchers, 60)
    assert said[0].count("resumed:  after step ") == 1
    last = max(line["step"] for line in metrics(run))
    assert f"stopped after step {last}; resume with\n  torchrun --nnodes 2 " in said[0]
    assert (run / f"global_step{last}/manifest.json").exists()
    assert only_run(first) == run, "one run"


def wait_for(true: Callable[[], Any], within_s: float = 240) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


@pytest.mark.slow
@pytest.mark.parametrize("what", ["full fine-tuning", "a start to compare with"])
def test_disks_apart_all_that_a_run_keeps_is_on_the_first(tmp_path: Path, base: Path, one: Path, what: str) -> None:
    """Whole models, and what the reference said before the first step, which a resumption reads: as one machine has them."""
    settings: dict[str, Any] = {"full_fine_tune": True}
    settings |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform"))
    if what != "full fine-tuning":
        write_rows(tmp_path)
        rows = {"dataset_type": "preference", "dataset_path": str(tmp_path / "preference.jsonl"), "sequence_len": 64}
        settings = {
            "datasets": [{"name": "pairs", **rows}],
            "objective": {"type": "preference", "loss_type": "sigmoid", "reference": {"model": "start"}},
            "init_adapter": str(one / "step3"),
        }
    path = config(tmp_path, base, "two", 4, output_dir="runs", after_training=[], **settings)
    nodes.deepspeed(tmp_path, "--config", path, "--set", "max_steps=2")
    assert "resumed:  after step 2" in nodes.deepspeed(tmp_path, "--config", path, "--resume_from_checkpoint")
    train(2, "--config", config(tmp_path, base, "one", 4, after_training=[], **settings))
    first, second = (tmp_path / f"node{node}" / "runs" for node in (0, 1))
    two, whole = only_run(first), only_run(tmp_path / "one")
    assert tensors_in(two / "step4") == tensors_in(whole / "step4")
    assert numbers(str(two)) == numbers(str(whole))
    assert_equal(final_state(str(two), 4), final_state(str(whole), 4))
    assert not list((second / two.name).rglob("*.safetensors"))
    kept = [{file.name: file.read_bytes() for file in run.glob("reference-*.arrow")} for run in (two, whole)]
    assert kept[0] == kept[1]
    assert bool(kept[0]) == (what != "full fine-tuning")
    assert not list(second.rglob("reference-*.arrow"))


@pytest.mark.slow
def test_a_start_says_what_crosses_the_network_and_how_fast_it_is(tmp_path: Path, base: Path) -> None:
    """Measured, or as given; a pipeline that is within a node, though its replica is on the other, crosses nothing."""
    path = config(tmp_path, base, "two", 1, activation_checkpointing="auto", after_training=[])
    measured = " ".join(nodes.deepspeed(tmp_path, "--config", path).split())
    assert (found := re.search(r"Between nodes: ([\d.e+]+) Gbit/s measured at this start", measured)), measured
    assert float(found[1]) > 0
    given = nodes.deepspeed(tmp_path, "--config", path, "--set", "link_gbit_per_s=2.5")
    assert "Between nodes: 2.5 Gbit/s as link_gbit_per_s says" in " ".join(given.split())
    within = nodes.deepspeed(tmp_path, "--config", path, "--set", "output_dir=within", per_node=2)
    assert "2 replica(s)" in within
    assert "Between nodes" not in within, within
