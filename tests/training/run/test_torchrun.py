"""torchrun instead of DeepSpeed's launcher: the same numbers, a stop of torchrun ends in a saved state, and it resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.builders import ROOT, environment, finish, metrics, only_run, save_model, train, write_config
from tests.training.checkpoint.test_resume import assert_equal, final_state, numbers
from tests.training.run.test_stop import gone


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """`torchrun --standalone --nproc_per_node 2 train.py …` in a session of its own."""
    return subprocess.Popen(
        [
            str(Path(sys.executable).parent / "torchrun"),
            "--standalone",
            "--nproc_per_node",
            "2",
            str(ROOT / "train.py"),
            *arguments,
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def config(folder: Path, base: Path, output: str, steps: int) -> str:
    return str(
        write_config(
            folder / f"{output}.toml",
            model=str(base),
            output_dir=str(folder / output),
            max_steps=steps,
            epochs=1000,
            lora_dropout=0.2,
        )
    )


@pytest.mark.slow
def test_trains_to_the_same_numbers_stops_and_resumes(tmp_path: Path) -> None:
    """All in one, as a launch costs more than its steps: bit-equal to DeepSpeed's launcher, in one go and in two, with
    dropout. A stopped run leaves no process behind, and ends with torchrun's own code.
    """
    base = tmp_path / "base"
    save_model(base)
    long = config(tmp_path, base, "long", 100000)
    launcher = torchrun("--config", long)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and launcher.poll() is None:
        files = list((tmp_path / "long").glob("2*/metrics.jsonl"))
        if files and files[0].read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    ranks = [child.pid for child in psutil.Process(launcher.pid).children(recursive=True)]
    assert len(ranks) >= 2, launcher.communicate()[0]
    os.kill(launcher.pid, signal.SIGTERM)
    assert gone(ranks, 45), "orphans"
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    run = only_run(tmp_path / "long")
    done = max(line["step"] for line in metrics(run))
    assert f"stopped after step {done}; resume with" in output
    assert (run / f"global_step{done}/manifest.json").exists()
    assert not list(run.glob(".staging-*"))

    total = done + 3
    more = f"max_steps={total}"
    finish(torchrun("--config", long, "--set", more, "--resume_from_checkpoint"), 0, 120)
    whole = config(tmp_path, base, "whole", total)
    finish(torchrun("--config", whole), 0, 120)
    deepspeed = config(tmp_path, base, "deepspeed", total)
    train(2, "--config", deepspeed)
    reference = only_run(tmp_path / "deepspeed")
    expected = final_state(str(reference), total)
    assert any(torch.count_nonzero(t) for key, t in expected.items() if key.endswith(".B"))
    for other in (run, only_run(tmp_path / "whole")):
        assert_equal(final_state(str(other), total), expected)
        assert numbers(str(other)) == numbers(str(reference))
