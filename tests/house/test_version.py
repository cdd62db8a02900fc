"""Our version is said in one place, and what is written says it, with the commit where that is known."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from pipeline import version
from pipeline.training.run import record
from tests.helpers.builders import ROOT, environment

SCRIPTS = (
    "train.py",
    "doctor.py",
    "new_config.py",
    "merge_lora.py",
    "export_lora.py",
    "make_adapter.py",
    "inspect_lora.py",
    "generate.py",
    "evaluate_lora.py",
    "compare_runs.py",
)


def git(tree: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=tree, env={**os.environ, **identity}, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("content")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "the first")
    git(tmp_path, "tag", "v9")  # a tag's name is not the commit's
    return tmp_path


def test_a_checkout_says_its_commit_and_whether_files_differ(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert version.commit_of(checkout) == commit
    (checkout / "untracked").write_text("")
    assert version.commit_of(checkout) == commit
    (checkout / "file").write_text("changed")
    assert version.commit_of(checkout) == f"{commit}.dirty"


def test_nothing_is_said_of_what_is_no_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = checkout / "a copy in a repository of others"
    copy.mkdir()
    assert version.commit_of(copy) == ""
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))  # as git sets it for its hooks
    (copy / ".git").mkdir()
    assert not version.commit_of(copy).endswith("dirty")
    monkeypatch.setenv("PATH", "")
    assert version.commit_of(checkout) == ""


def test_git_that_hangs_is_left(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(version, "GIT_TIMEOUT_S", 0.2)
    began = time.monotonic()
    assert version.commit_of(checkout) == ""
    assert time.monotonic() - began < 10


def test_it_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "commit_of", lambda tree: "0123456789ab.dirty")
    version.full.cache_clear()
    assert version.full() == f"{version.VERSION}+g0123456789ab.dirty"
    monkeypatch.setattr(version, "commit_of", lambda tree: pytest.fail("asked twice"))
    version.full()
    version.full.cache_clear()


def test_the_form_is_that_of_python_s_packages() -> None:
    from packaging.version import Version

    assert str(Version(version.full())) == version.full()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.VERSION)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_says_it(script: str) -> None:
    command = [sys.executable, str(ROOT / script), "--version"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{version.NAME} {version.full()}\n"), done.stderr


def test_every_script_with_a_command_line_is_asked() -> None:
    assert {path.name for path in ROOT.glob("*.py") if "run_command(" in path.read_text()} == set(SCRIPTS)


def test_runs_and_checkpoints_say_it_beside_the_libraries() -> None:
    assert record.versions()[version.NAME] == version.full()
    assert record.versions()["torch"] == metadata.version("torch")


def test_benchmarks_say_it(tmp_path: Path) -> None:
    from benchmarks.record import write

    machine = json.loads(write("x", {}, [], tmp_path).read_text())["machine"]
    assert machine["versions"][version.NAME] == version.full()
