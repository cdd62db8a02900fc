"""What a command imports before it knows what it is asked for, and for `--check`: counted by modules, not by the clock."""

import subprocess
import sys
from typing import get_args

import pytest

from pipeline.formats import choices
from pipeline.formats.dtypes import DTYPES
from tests.helpers.builders import ROOT, environment

HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "deepspeed",
    "pydantic",
    "rich",
    "pyarrow",
    "tokenizers",
    "matplotlib",
    "scipy",
    "yaml",
)
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
LIGHT_MODULES = (
    "pipeline.commands.arguments",
    "pipeline.console",
    "pipeline.families",
    "pipeline.formats.choices",
    "pipeline.commands.known_models",
    "pipeline.names",
    "pipeline.peft.types",
    "pipeline.training.run.start_times",
    "pipeline.training.run.stop",
    "pipeline.training.start.arguments",
    "pipeline.training.start.launch",
    "pipeline.version",
)


def heavy_after(code: str, modules: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of `modules` a process has imported after `code`."""
    told = f"{code}\nimport sys\nprint('imported:', *[m for m in {modules!r} if m in sys.modules])"
    command = [sys.executable, "-c", told]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    return done.stdout.rpartition("imported:")[2].split()


def test_there_are_scripts() -> None:
    assert {"train.py", "merge_lora.py", "quickstart.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script: str) -> None:
    asked = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
else:
    raise AssertionError("it went on")"""
    assert heavy_after(asked) == []


def test_what_the_command_lines_need_is_light() -> None:
    assert heavy_after("\n".join(f"import {module}" for module in LIGHT_MODULES)) == []


def test_the_choices_are_those_of_the_table() -> None:
    assert tuple(DTYPES) == choices.DTYPE_NAMES
    assert ("keep", *get_args(choices.Dtype)) == choices.OUTPUT_DTYPES
