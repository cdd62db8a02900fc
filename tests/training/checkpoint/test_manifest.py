"""A manifest that was changed, by a flipped bit or by hand, is refused, and the next older checkpoint is taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.checkpoint import manifest
from pipeline.training.checkpoint.manifest import CheckpointError
from tests.helpers.checkpoints import facts


def save(run: Path, step: int) -> Path:
    tensors = {"weights/m.A": torch.full((4,), float(step), dtype=torch.bfloat16), "rng/0/cpu": torch.zeros(8)}
    return checkpoint.save(run, "launch", 0, 1, step, tensors, facts(1))


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Flips that change nothing are those of a letter's case in a number's exponent or in an escape."""
    folder = save(tmp_path, 4)
    file = folder / "manifest.json"
    good, content = manifest.verify(folder), file.read_bytes()
    refused = 0
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            try:
                assert manifest.verify(folder) == good, (position, bit)
            except CheckpointError:
                refused += 1
    assert refused > 7.9 * len(content)


def as_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda file: file.write_text(change(file.read_text()))


def with_value(*path: str | int, value: Any) -> Callable[[Path], None]:
    """Set a value and let the digest be right, as a program would that knows no better."""

    def change(file: Path) -> None:
        content = json.loads(file.read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        content["digest"] = manifest.digest(content)
        file.write_text(json.dumps(content))

    return change


def without(key: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = json.loads(file.read_text())
        del content[key]
        content["digest"] = manifest.digest(content)
        file.write_text(json.dumps(content))

    return change


def other_number(key: str) -> Callable[[Path], None]:
    """The number by 2 larger, everything else as it was."""
    return lambda file: file.write_text(
        json.dumps((content := json.loads(file.read_text())) | {key: content[key] + 2}, indent=1)
    )


DAMAGE = {
    "rows": other_number("rows"),
    "step": other_number("step"),
    "epoch": other_number("epoch"),
    "a list": as_text(lambda _: "[]"),
    "a number": as_text(lambda _: "3"),
    "null": as_text(lambda _: "null"),
    "empty": as_text(lambda _: ""),
    "not JSON": as_text(lambda text: text[:-20]),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()),
    "deep": as_text(lambda _: '{"a":' * 100_000 + "1" + "}" * 100_000),
    "a long number": as_text(lambda text: text.replace('"rows": 3', '"rows": ' + "3" * 5000)),
    **{f"no {key}": without(key) for key in [*facts(1), "step", "files", "format"]},
    "files of a list": with_value("files", value=[]),
    "no files": with_value("files", value={}),
    "a file outside": with_value("files", value={"../x.safetensors": {"sha256": "0" * 64, "size": 1}}),
    "a size of text": with_value("files", "rank-0.safetensors", "size", value="12"),
    "a negative step": with_value("step", value=-4),
    "a step of true": with_value("step", value=True),
    "another step": with_value("step", value=5),
    "rows of 3.0": with_value("rows", value=3.0),
    "rows of NaN": with_value("rows", value=float("nan")),
    "NaN": with_value("best_loss", value=float("nan")),
    "trained of text": with_value("trained", value="m.A"),
    "trained of numbers": with_value("trained", value=[1]),
    "config of text": with_value("config", value="x"),
    "no optimizer": with_value("config", value={}),
    "optimizer of text": with_value("config", "optimizer", value="adamw"),
    "another layout": with_value("layout", value=[2, 1]),
    "a layout of three": with_value("layout", value=[1, 1, 1]),
    "an unknown key": with_value("more", value=1),
    "format 4": with_value("format", value=4),
    "format of text": with_value("format", value="3"),
    "format 2 with a digest": with_value("format", value=2),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a loop of links": lambda file: (file.unlink(), file.symlink_to(file)),
    "a folder for a shard": lambda file: ((shard := file.with_name("rank-0.safetensors")).unlink(), shard.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_of_every_kind_passes_over_to_the_older_checkpoint(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 2)
    DAMAGE[how](save(tmp_path, 4) / "manifest.json")
    assert checkpoint.find(tmp_path, newest_run=False)[0].name == "global_step2"
    said = capsys.readouterr().err
    assert "global_step4" in said
    assert "trying the next older" in said
    assert len(said) < 600
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path / "global_step4", newest_run=False)


def test_a_name_of_another_step_is_refused(tmp_path: Path) -> None:
    """Or renaming a folder would put a run elsewhere; a copy under a name of one's own is welcome."""
    folder = save(tmp_path, 4)
    backup = folder.rename(tmp_path / "before_the_storm")
    assert checkpoint.find(backup, newest_run=False)[1]["step"] == 4
    renamed = backup.rename(tmp_path / "global_step6")
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 4"):
        checkpoint.find(renamed, newest_run=False)


def test_the_format_before_is_read_and_what_it_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As 961307d wrote it: the same without a digest."""
    folder = save(tmp_path, 4)
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps({**content, "format": 2}, indent=1))
    assert checkpoint.find(tmp_path, newest_run=False)[1]["rows"] == 3
    assert "no digest" in capsys.readouterr().err
    shard = folder / "rank-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="does not match"):
        checkpoint.find(folder, newest_run=False)


@pytest.mark.parametrize("how", ["a flipped bit", "of another step", "a list"])
def test_a_damaged_note_of_another_process_is_refused_at_once(tmp_path: Path, how: str) -> None:
    staging = tmp_path / ".staging-4-launch"
    staging.mkdir()
    note = staging / "rank-1.json"
    (staging / "rank-1.safetensors").write_bytes(b"12")
    manifest.write(note, {"step": 3, "sha256": "0" * 64, "size": 2, "facts": facts(2)})
    if how != "of another step":
        note.write_text("[]" if how == "a list" else note.read_text().replace('"size": 2', '"size": 3'))
    with pytest.raises(CheckpointError, match=r"rank-1"):
        checkpoint.save(tmp_path, "launch", 0, 2, 4, {"x": torch.zeros(3)}, facts(2))
    assert not list(tmp_path.glob("global_step*"))
    assert not (staging / "rank-0.safetensors").exists()
