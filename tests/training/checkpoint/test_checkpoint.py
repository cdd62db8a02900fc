"""The commit protocol: a checkpoint is whole or not there, damage is noticed, the next older one is taken."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline.console import EXIT_CHECKPOINT, EXIT_DISK_FULL
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.checkpoint import retention
from pipeline.training.checkpoint.manifest import FORMAT, CheckpointError
from tests.helpers.builders import ROOT
from tests.helpers.checkpoints import facts


def save(run: Path, step: int, world: int = 2) -> Path:
    """A checkpoint by `world` processes, each played by a thread: they meet only through the folder."""
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            tensors = {
                f"weights/{rank}": torch.full((1000,), float(step)),
                f"rng/{rank}/cpu": torch.zeros(8, dtype=torch.uint8),
            }
            checkpoint.save(run, "launch", rank, world, step, tensors, facts(world))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return checkpoint.folder_of(run, step)


def test_a_checkpoint_holds_every_process_s_tensors(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    manifest = checkpoint.verify(folder)
    assert (manifest["step"], manifest["rows"], set(manifest["files"])) == (
        7,
        3,
        {"rank-0.safetensors", "rank-1.safetensors"},
    )
    tensors = {key: value() for key, value in checkpoint.read(folder, manifest)}
    assert set(tensors) == {"weights/0", "weights/1", "rng/0/cpu", "rng/1/cpu"}
    assert torch.equal(tensors["weights/1"], torch.full((1000,), 7.0))
    assert not list(tmp_path.glob(".*"))


def damage(folder: Path, how: str) -> None:
    shard = folder / "rank-1.safetensors"
    if how == "a flipped bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "cut short":
        os.truncate(shard, 100)
    elif how == "shards swapped":
        other = folder / "rank-0.safetensors"
        first, second = other.read_bytes(), shard.read_bytes()
        other.write_bytes(second)
        shard.write_bytes(first)
    elif how == "a shard missing":
        shard.unlink()
    else:
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-20])


@pytest.mark.parametrize("how", ["a flipped bit", "cut short", "shards swapped", "a shard missing", "half a manifest"])
def test_damage_is_noticed_and_the_next_older_one_taken(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 2)
    damage(save(tmp_path, 4), how)
    folder, manifest = checkpoint.find(tmp_path, newest_run=False)
    assert (folder.name, manifest["step"]) == ("global_step2", 2)
    assert "global_step4" in capsys.readouterr().err
    with pytest.raises(CheckpointError) as refused:
        checkpoint.find(tmp_path / "global_step4", newest_run=False)
    assert refused.value.exit_code == EXIT_CHECKPOINT


def test_resuming_never_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "20260101_00-00-00").mkdir()
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        checkpoint.find(tmp_path, newest_run=True)


def test_the_newest_run_that_has_a_checkpoint_is_taken_and_other_folders_are_not(tmp_path: Path) -> None:
    save(tmp_path / "20260101_00-00-00", 9)
    (tmp_path / "20260102_00-00-00").mkdir()
    (tmp_path / "zzz_notes").mkdir()
    assert checkpoint.find(tmp_path, newest_run=True)[0] == tmp_path / "20260101_00-00-00" / "global_step9"


def test_one_process_s_failure_fails_all_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    write = checkpoint._write_shard

    def full_disk(staging: Path, rank: int, *rest: object) -> None:
        if rank == 1:
            raise OSError(28, "No space left on device")
        write(staging, rank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_write_shard", full_disk)
    errors: list[CheckpointError] = []

    def one(rank: int) -> None:
        try:
            checkpoint.save(tmp_path, "launch", rank, 2, 4, {"x": torch.zeros(3)}, facts(2))
        except CheckpointError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert EXIT_DISK_FULL in {error.exit_code for error in errors}
    assert checkpoint.find(tmp_path, newest_run=False)[1]["step"] == 2


def test_a_later_step_supersedes_one_that_waits(tmp_path: Path) -> None:
    """A watcher saving step 2 must not wait for a peer whose main thread is already saving step 3."""
    (tmp_path / ".staging-3-launch").mkdir(parents=True)
    with pytest.raises(checkpoint.Superseded):
        checkpoint.save(tmp_path, "launch", 1, 2, 2, {"x": torch.zeros(3)}, facts(2))


def test_what_killed_saves_left_behind_is_cleared(tmp_path: Path) -> None:
    """Unfinished checkpoints and adapters go, and what a killed pruning had begun to remove; whole ones stay."""
    save(tmp_path, 3, world=1)
    for name in ("step3", ".staging-4-launch", ".step4.partial-0a1b2c3d", ".trash-step1-0"):
        (tmp_path / name).mkdir()
    retention.clear_rubbish(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"global_step3", "step3"}


def test_pruning_keeps_the_newest_and_ignores_other_names(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step, world=1)
        (tmp_path / f"step{step}").mkdir()
    (tmp_path / "steps_by_hand").mkdir()
    retention.prune(tmp_path, "global_step", 2)
    retention.prune(tmp_path, "step", -1)
    assert {p.name for p in tmp_path.iterdir()} == {
        "global_step10",
        "global_step100",
        "step9",
        "step10",
        "step100",
        "steps_by_hand",
    }


KILLED = """
import sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from pipeline.training.checkpoint import commit as checkpoint, retention
from tests.helpers.checkpoints import facts
run = Path({run!r})
retention.clear_rubbish(run)
step = max([n for n, _ in retention.numbered(run, "global_step")], default=0)
while True:
    step += 1
    checkpoint.save(run, "x", 0, 1, step, {{"w": torch.full((200_000,), float(step))}}, facts(1))
    retention.prune(run, "global_step", 2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_only_whole_checkpoints(tmp_path: Path) -> None:
    """What was reported as saved is there, verifies, and holds its own step's values; disk use stays at keep + 1."""
    run = tmp_path / "run"
    run.mkdir()
    generator = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED.format(root=str(ROOT), run=str(run))], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(generator.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *(int(line) for line in process.stdout.read().split() if line.isdigit())])
        process.wait()
        folder, manifest = checkpoint.find(run, newest_run=False)
        assert manifest["step"] >= reported
        for _, value in checkpoint.read(folder, manifest):
            assert torch.all(value() == manifest["step"])
        for _, each in retention.numbered(run, "global_step"):
            checkpoint.verify(each)
        assert len(list(run.iterdir())) <= 4  # two kept, one new, and one staging or trash folder


def test_no_pickle_is_written_or_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == FORMAT
