"""What a command imports before it knows what it is asked for, and for `--check`: counted by modules, not by the clock."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from pipeline.data.arrow_files import ArrowFile
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
    "pipeline.training.start.times",
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


def test_reading_the_cache_imports_no_pandas(tmp_path: Path) -> None:
    """It is pyarrow's own `to_numpy` that does, half a second of every start."""
    file = ArrowFile(tmp_path / "a.arrow", pa.schema([("row", pa.list_(pa.int32())), ("n", pa.int64())]))
    for n in (1, 2):
        file.write([pa.array([[1, 2, 3]], pa.list_(pa.int32())), pa.array([n])])
    file.close()
    code = f"""
from pipeline.data.arrow_files import numbers, opened
whole = opened({str(tmp_path / "a.arrow")!r}).read_all()
assert numbers(whole["n"]).tolist() == [1, 2]
assert numbers(whole["row"].chunk(1)[0].values).tolist() == [1, 2, 3]"""
    assert heavy_after(code, ("pandas",)) == []


def test_a_check_leaves_deepspeed_s_engine_out() -> None:
    assert heavy_after("import pipeline.training.start.check", ("deepspeed.runtime.engine", "bitsandbytes")) == []


def test_the_choices_are_those_of_the_table() -> None:
    assert tuple(DTYPES) == choices.DTYPE_NAMES
    assert ("keep", *get_args(choices.Dtype)) == choices.OUTPUT_DTYPES
