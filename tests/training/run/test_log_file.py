"""log.txt in a run's folder, and what --log_level leaves on the terminal."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import console, version
from pipeline.log_file import FILE, LogFile
from tests.helpers.builders import only_run, save_model, train, write_config

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (debug|info|warning|error) rank (\d): (.+)")


@pytest.fixture
def log_file() -> Iterator[LogFile]:
    file = LogFile()
    yield file
    file.close()
    console.TERMINAL.show_from("info")


def lines(folder: Path) -> list[tuple[str, str, str]]:
    """Level, rank and text of every line; each must have them, and the time."""
    matches = [LINE.fullmatch(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
    assert all(matches)
    return [match.groups() for match in matches if match]  # type: ignore[misc]


def test_what_was_said_before_there_is_a_folder_comes_first(tmp_path: Path, log_file: LogFile) -> None:
    console.log("two\n\nlines")
    console.debug("a detail")
    log_file.open(tmp_path)
    console.warn("beware")
    console.complain("it failed")
    assert lines(tmp_path) == [
        ("info", "0", "two"),
        ("info", "0", "lines"),
        ("debug", "0", "a detail"),
        ("warning", "0", "beware"),
        ("error", "0", "it failed"),
    ]


def test_other_ranks_write_their_warnings_and_errors(
    tmp_path: Path, log_file: LogFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file.open(tmp_path)
    console.log("first")
    monkeypatch.setenv("RANK", "3")
    console.log("not said")
    console.warn("beware")
    assert lines(tmp_path) == [("info", "0", "first"), ("warning", "3", "beware")]
    assert capsys.readouterr() == ("first\n", "")


def test_a_resumed_run_appends(tmp_path: Path, log_file: LogFile) -> None:
    log_file.open(tmp_path)
    console.log("before")
    log_file.close()
    again = LogFile()
    again.open(tmp_path)
    console.log("after")
    again.close()
    console.log("when it is over")
    assert [text for *_, text in lines(tmp_path)] == ["before", "after"]


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        ("debug", "debug: d\ni\n", "warning: w\nerror: e\n"),
        ("info", "i\n", "warning: w\nerror: e\n"),
        ("warning", "", "warning: w\nerror: e\n"),
        ("error", "", "error: e\n"),
    ],
)
def test_the_terminal_shows_from_a_level_on_and_the_file_has_all(
    tmp_path: Path, log_file: LogFile, capsys: pytest.CaptureFixture[str], level: str, out: str, err: str
) -> None:
    log_file.open(tmp_path)
    console.TERMINAL.show_from(level)
    for write, text in ((console.debug, "d"), (console.log, "i"), (console.warn, "w"), (console.complain, "e")):
        write(text)
    assert capsys.readouterr() == (out, err)
    assert [level for level, *_ in lines(tmp_path)] == ["debug", "info", "warning", "error"]


def test_a_terminal_that_has_gone_ends_nothing(
    tmp_path: Path, log_file: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when DeepSpeed's launcher is stopped and takes its ssh with it: the run is to save, and its log says that it did."""
    reads, writes = os.pipe()
    os.close(reads)
    log_file.open(tmp_path)
    with open(writes, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        for text in ("step 1", "step 2"):
            console.log(text)
    assert [line[2] for line in lines(tmp_path)] == ["step 1", "step 2"]


def test_an_error_that_python_prints_is_in_the_file_only(
    tmp_path: Path, log_file: LogFile, capsys: pytest.CaptureFixture[str]
) -> None:
    log_file.open(tmp_path)
    with pytest.raises(ZeroDivisionError):
        console.run_command(lambda: 1 // 0)
    assert [line[2] for line in lines(tmp_path)][-1] == "ZeroDivisionError: integer division or modulo by zero"
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_leaves_one_line(tmp_path: Path, log_file: LogFile) -> None:
    log_file.open(tmp_path)
    with console.progress("reading", 1000) as advance:
        for _ in range(1000):
            advance(1)
    assert re.fullmatch(r"reading: [\d.]+ s", lines(tmp_path)[0][2])
    assert len(lines(tmp_path)) == 1


def test_names_of_others_begin_no_line(tmp_path: Path, log_file: LogFile) -> None:
    log_file.open(tmp_path)
    console.log("a\r\x1b[2J\u2028b\ud800")
    assert [line[2] for line in lines(tmp_path)] == [r"a\r\x1b[2J\u2028b\ud800"]


def test_a_full_disk_ends_no_run(tmp_path: Path, log_file: LogFile, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).symlink_to("/dev/full")
    log_file.open(tmp_path)
    console.log("it goes on")
    assert capsys.readouterr() == ("it goes on\n", "")


def test_a_file_that_cannot_be_written_is_a_warning(
    tmp_path: Path, log_file: LogFile, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE).mkdir()
    log_file.open(tmp_path)
    console.log("it goes on")
    shown = capsys.readouterr()
    assert shown.out == "it goes on\n"
    assert re.fullmatch(r"warning: .*/log.txt: cannot write there: .*; the run goes on without it\n", shown.err)


def test_half_a_line_is_ended_before_the_next(
    tmp_path: Path, log_file: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_file.open(tmp_path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    console.log("there was room for a part of it")
    monkeypatch.undo()
    console.log("there is room again")
    torn, whole = (tmp_path / FILE).read_text().splitlines()
    assert len(torn) == 9
    assert LINE.fullmatch(whole)


@pytest.mark.slow
def test_a_run_that_shows_warnings_only_and_goes_on(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    config = write_config(
        tmp_path / "c.toml",
        model=str(tmp_path / "base"),
        output_dir=str(tmp_path / "runs"),
        max_steps=2,
    )
    output = train(2, "--config", str(config), "--log_level", "warning", "--profile", "1")
    assert not re.search("^(step|stages|data)", output, re.M)
    run = only_run(tmp_path / "runs")
    first = lines(run)
    texts = [text for level, rank, text in first if (level, rank) == ("info", "0")]
    for begins in ("stages: ", "data: ", "run: ", "step 2/2 ", "profile: "):
        assert any(text.startswith(begins) for text in texts), begins
    details = [text for level, rank, text in first if (level, rank) == ("debug", "0")]
    assert details[0] == f"version:  {version.NAME} {version.full()}"
    assert "train.py" in details[1]
    assert details[1].endswith("--log_level warning --profile 1")
    assert {path.name for path in (run / "profile").iterdir()} == {"rank-0.json.gz", "rank-1.json.gz"}
    output = train(2, "--config", str(config), "--set", "max_steps=3", "--resume_from_checkpoint")
    assert "step 3/3 " in output
    assert lines(run)[: len(first)] == first
    assert any(text.startswith("step 3/3 ") for *_, text in lines(run)[len(first) :])
