"""docs/evaluation.md: its configuration is valid, its command runs as it stands and leaves what the page says."""

import re
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import evaluate_lora
from pipeline.evaluation import cells, measures
from pipeline.evaluation.records import SCHEMA
from tests.helpers.builders import save_model
from tests.helpers.families import by_peft
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"(?m)^`(\S+)`(?: has .*)?:\n\n```\w+\n((?:.*\n)*?)```", PAGE))
COMMAND, TASKS = re.findall(r"(?m)^    python (evaluate_lora\.py .*)$", PAGE)
(LAUNCHED,) = re.findall(r"(?m)^    deepspeed --num_gpus 2 evaluate_lora\.py (.*)$", PAGE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, in a folder with the page's files, a model and an adapter."""
    here = tmp_path_factory.mktemp("page")
    model = save_model(here / "BASE", "qwen2", layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.families.load_model", lambda _: model)
        by_peft(here / "BASE", here / "ADAPTER", "lora")
        for name, text in FILES.items():
            (here / name).write_text(text)
        patch.chdir(here)
        patch.setattr(sys, "argv", shlex.split(COMMAND))
        assert evaluate_lora.main() == 0
    (made,) = (here / "evaluations").glob("2*")
    return made


def test_the_command_leaves_what_the_page_says(folder: Path) -> None:
    for file in folder.iterdir():  # without tasks there is no tasks.parquet
        assert f"`{file.name}`" in PAGE
    assert len(list(folder.iterdir())) == 6
    assert len(pq.read_table(folder / "records.parquet")) == 2 * (3 + 2 + 3 * 2)


def test_the_launched_command_is_one() -> None:
    assert evaluate_lora.parser().parse_args(shlex.split(LAUNCHED)).adapters == ["base", "ADAPTER", "OTHER"]
    assert evaluate_lora.parser().parse_args(shlex.split(TASKS)[1:]).tasks == ["arc_easy", "hellaswag"]


@pytest.mark.parametrize("kind", ["rows", "preference", "unpaired", "ranked", "multiple_choice"])
def test_every_measure_is_on_the_page(kind: measures.Kind) -> None:
    for measure in measures.measures(kind, 0.1):
        assert f"| `{measure.name}` |" in PAGE


def test_columns_and_lights_are_on_the_page() -> None:
    explained = {name for name in SCHEMA.names if f"`{name}`" in PAGE}
    assert explained >= set(SCHEMA.names) - {"adapter", "dataset", "role", "kind", "place", "truncated"}
    for light in (cells.NOT_LEARNT, cells.OPPOSITE, cells.INCOHERENT, cells.INACTIVE):
        assert f"| {light} |" in PAGE
    assert f"{cells.WORST_PERPLEXITY} times" in PAGE
    assert f"below {cells.LEAST_COVERAGE} of" in PAGE
