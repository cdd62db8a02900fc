"""Trackers beside metrics.jsonl. Oracle: a tracker of accelerate's own protocol that writes down what it is told."""

import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import PartialState, tracking

from pipeline.console import UserError
from pipeline.training import trackers
from pipeline.training.metrics import Metrics
from pipeline.training.trackers import Trackers, flat
from tests.helpers.builders import metrics, only_run, save_model, train, write_config

SAMPLE = {"prompt": "p", "text": "t", "tokens": 3, "stopped": True}


class Notes(tracking.GeneralTracker):
    """Keeps what it is told, and fails where it is told to."""

    name = "wandb"
    requires_logging_directory = False
    main_process_only = False
    made: ClassVar[list["Notes"]] = []

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.project, self.options, self.told, self.fails = run_name, options, list[Any](), False
        Notes.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        if self.options.get("key") == "wrong":
            raise ValueError("no login")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.fails:
            raise OSError("the network is gone")
        self.told.append((step, values))
        tracking.logger.debug("as accelerate's own trackers do, for which its state has to be there")

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.told.append((name, columns, data, step))

    def finish(self) -> None:
        self.told.append("finished")


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch) -> "list[Notes]":
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notes)
    monkeypatch.setattr(Notes, "made", [])
    PartialState._reset_state()
    return Notes.made


def test_a_tracker_gets_what_the_file_gets(tmp_path: Path) -> None:
    run = tmp_path / "20261129_12-00-00"
    run.mkdir()
    config = {"lora_rank": 4, "optimizer": {"lr": 1e-5}, "datasets": [{"name": "é"}], "peft": None, "epochs": True}
    told = Trackers(["wandb"], {"wandb": {"tags": ["books"]}}, "project", run, config)
    written = Metrics(run, 0, True, told)
    written.log(1, {"train/loss": 2.5})
    written.samples(1, [SAMPLE])
    written.close()
    (tracker,) = Notes.made
    assert tracker.project == "project"
    assert tracker.options["tags"] == ["books"]
    assert (tracker.options["name"], tracker.options["id"]) == (run.name, run.name)
    assert tracker.told == [
        {"lora_rank": 4, "optimizer.lr": 1e-5, "datasets": '[{"name": "é"}]', "epochs": True},
        (1, {"train/loss": 2.5}),
        ("samples", ["step", "prompt", "text", "stopped", "tokens"], [[1, "p", "t", True, 3]], 1),
        (1, {"samples/stopped": 1.0}),
        "finished",
    ]
    assert [line["step"] for line in metrics(run)] == [1, 1]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = Trackers(["wandb"], {}, "project", tmp_path, {})
    Notes.made[0].fails = True
    written = Metrics(tmp_path, 0, True, told)
    written.log(1, {"train/loss": 2.5})
    written.log(2, {"train/loss": 2.4})
    written.close()
    assert capsys.readouterr().err.count("the tracker 'wandb' gets nothing more: the network is gone") == 1
    assert len(metrics(tmp_path)) == 2


def test_a_tracker_that_does_not_begin_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trackers: 'wandb' does not begin: no login"):
        Trackers(["wandb"], {"wandb": {"key": "wrong"}}, "project", tmp_path, {})


def test_other_processes_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    Trackers(["wandb"], {}, "project", tmp_path, {}).log(1, {"train/loss": 1.0})
    assert not Notes.made


def test_a_package_that_is_missing_is_named_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"trackers: 'trackio' needs the package trackio"):
        trackers.check(["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", types.ModuleType("trackio"))
    trackers.check(["trackio"])


def test_nested_keys_are_one_name() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1]}, "e": None, "f": "x"}) == {"a.b.c": 1, "a.d": "[1]", "f": "x"}


def test_accelerate_s_state_sets_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trackers(["wandb"], {}, "project", tmp_path, {})
    assert (PartialState().device.type, PartialState().is_main_process) == ("cpu", True)


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: a run over two stages and its resumption are in its own files, one run's."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.undo()
    save_model(tmp_path / "base")
    toml = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        trackers=["wandb"],
        tracker_project="style",
        samples={"prompts": ["The salt"], "every_steps": 2, "max_new_tokens": 4},
    )
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(Path(wandb.__file__).parents[1])}
    said = train(2, "--config", str(toml), "--set", "max_steps=2", **offline)
    assert "trackers: wandb, in the project style" in said
    assert "gets nothing more" not in said
    run = only_run(tmp_path / "runs")
    said = train(2, "--config", str(toml), "--set", "max_steps=4", "--resume_from_checkpoint", **offline)
    assert "gets nothing more" not in said
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run.name}.wandb"] * 2, "two parts of one run"
    told = [losses_in(file) for file in files]
    assert [sorted(part) for part in told] == [[1, 2], [3, 4]]
    assert {**told[0], **told[1]} == {line["step"]: line["train/loss"] for line in metrics(run) if "train/loss" in line}


def losses_in(file: Path) -> dict[int, float]:
    """By step, what a file of wandb's has as train/loss: protobuf in the records of LevelDB's log, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts, found = file.read_bytes(), 7, b"", {}
    while at < len(content):
        if 32768 - at % 32768 < 7:  # no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in values:
                found[int(values["_step"])] = float(values["train/loss"])
    return found
