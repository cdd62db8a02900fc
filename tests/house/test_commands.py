"""The commands of README.md and docs/: each is one that its script's parser takes.

Which of them run as they stand is tested with their pages: tests/house/test_readme.py and test_samples_docs.py,
tests/evaluation/test_page.py.
"""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.training.start import arguments
from tests.helpers.builders import ROOT, environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# A launcher's own options, which its tests read (tests/house/test_clusters.py), end where the script begins.
LINE = re.compile(r"(?m)^    ((?:python|deepspeed|torchrun)\b[^\n#]*?\b(\w+)\.py\b[^\n#]*)")
MODULE = re.compile(r"(?m)^    python -m ([\w.]+)")


class Command(NamedTuple):
    """`words`: what follows the script."""

    page: str
    script: str
    launched: bool
    words: tuple[str, ...]


def commands() -> list[Command]:
    """All of our scripts', each once."""
    found: dict[Command, None] = {}
    for page in PAGES:
        for line, script in LINE.findall(page.read_text(encoding="utf-8")):
            if script in SCRIPTS:
                words = shlex.split(line)
                begins = words.index(f"{script}.py")
                found[Command(page.name, script, not line.startswith("python"), tuple(words[begins + 1 :]))] = None
    return list(found)


COMMANDS = commands()


def test_there_are_commands_of_every_script_that_a_user_starts() -> None:
    assert {command.script for command in COMMANDS} >= set(SCRIPTS) - {"quickstart", "demo", "doctor"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page} {c.script} {' '.join(c.words)}")
def test_the_script_takes_the_command(command: Command) -> None:
    module = arguments if command.script == "train" else importlib.import_module(command.script)
    words = [word for word in command.words if word != "…"]
    module.parser().parse_args(words)  # SystemExit with what it does not know


def test_modules_and_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module in MODULE.findall(text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), (page.name, module)
        for target in re.findall(r"(?m)^    make (\S+)", text):
            assert re.search(rf"(?m)^{target}:", makefile), (page.name, target)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"quickstart", "demo"}))
def test_help_has_examples(script: str) -> None:
    module = arguments if script == "train" else importlib.import_module(script)
    said = module.parser().format_help()
    (example, *_) = re.findall(rf"(?m)(?:^|examples?: +)(?:\s*)((?:python|deepspeed|torchrun).*{script}\.py.*)$", said)
    assert example
    if script == "train":
        assert "deepspeed --num_gpus 2 train.py" in said
        assert "torchrun --nproc_per_node 2 train.py" in said


def test_options_complete_in_a_shell(tmp_path: Path) -> None:
    """As bash asks for it, by argcomplete's protocol."""
    typed = "train.py --resume"
    asking = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "IFS": "\n", "COMP_TYPE": "9"}
    asking |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said")}
    subprocess.run([sys.executable, "train.py"], cwd=ROOT, env=environment(**asking), check=True, timeout=60)
    assert (tmp_path / "said").read_text().split() == ["--resume_from_checkpoint"]
    assert all(
        "PYTHON_ARGCOMPLETE_OK" in (ROOT / f"{script}.py").read_text()
        for script in set(SCRIPTS) - {"quickstart", "demo"}
    )
