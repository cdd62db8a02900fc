"""configs/recipes/: each is a configuration, stands in the table, and is what the planner chooses. Oracle: the planner."""

import re
from pathlib import Path

import pytest

from docs import recipes
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.planning import devices
from tests.helpers.builders import ROOT

FILES = sorted(recipes.RECIPES.glob("*.toml"))
NAMES = {f"{machine}-{size}-{kind}" for machine in recipes.MACHINES for size in recipes.MODELS for kind in recipes.DATA}


def test_there_are_recipes_of_every_machine_size_and_kind() -> None:
    assert {file.stem for file in FILES} <= NAMES
    for part in (*recipes.MACHINES, *recipes.MODELS, *recipes.DATA):
        assert any(part in file.stem for file in FILES), part


def test_every_recipe_is_a_configuration_and_stands_in_the_table() -> None:
    page = recipes.PAGE.read_text(encoding="utf-8")
    linked = re.findall(r"\(\.\./configs/recipes/(\S+)\.toml\)", page)
    assert sorted(linked) == [file.stem for file in FILES]
    assert page.count("–") >= len(NAMES) - len(FILES)
    for file in FILES:
        config = loading.load(str(file))
        machine = file.stem.partition("-")[0]
        assert len(devices.parse(recipes.MACHINES[machine])) % config.pipeline_stages == 0
        assert file.read_text(encoding="utf-8").startswith("#:schema ../schema.json\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", recipes.MODELS)
def test_every_recipe_is_what_the_planner_chooses(tmp_path: Path, size: str) -> None:
    folder = recipes.saved(size, tmp_path)
    for machine in recipes.MACHINES:
        for kind in recipes.DATA:
            file = recipes.RECIPES / f"{machine}-{size}-{kind}.toml"
            try:
                text, _ = recipes.made(machine, size, kind, folder)
            except UserError:
                assert not file.exists(), f"{file.name}: nothing fits"
                continue
            assert text == file.read_text(encoding="utf-8"), file.name


def test_the_page_is_named_by_the_readme() -> None:
    assert "docs/recipes.md" in (ROOT / "README.md").read_text(encoding="utf-8")
