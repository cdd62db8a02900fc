"""The house: a family of adapters is its row, one module that trains it and its maps of a weight, and is named nowhere else."""

import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module

import pytest

from pipeline.artifacts.adapter import read
from pipeline.artifacts.adapter.family_maps import MAPS, MAPS_OF_PAIRS
from pipeline.config.schema import Config
from pipeline.families import CONFIGURED, FAMILIES, KINDS, Family, saved
from pipeline.model import adapters
from pipeline.peft.types import LOCAL, PEFT
from pipeline.training.stage.families import INJECTORS
from tests.helpers.sources import path
from tests.house.test_one_home import PACKAGE, texts

MODULES = [import_module(f"{adapters.__name__}.{file.name}") for file in pkgutil.iter_modules(adapters.__path__)]
# 'lora' and 'multiplicative_lora' are also kinds of saved pairs: not searched.
# 'peft' is the package's name too.
NAMES = {name for name in FAMILIES if name not in (*KINDS, PEFT)}
NAMES |= {row.peft_type for row in FAMILIES.values()} - {""}
NAMES |= {stored for row in FAMILIES.values() for stored in row.tensors.values()}
NAMED_IN = (
    "pipeline/families.py",
    "pipeline/peft/types.py",
    "pipeline/model/adapters/",
    "pipeline/artifacts/adapter/family_maps.py",
)


def lacking(rows: Mapping[str, Family]) -> list[str]:
    """What the families of the table lack: one line for each thing."""
    found = []
    for name, row in rows.items():
        served = [module for module in MODULES if name in getattr(module, "INJECTORS", ())]
        if len(served) != 1 or INJECTORS.get(name) is not served[0].INJECTORS[name]:
            found.append(f"{name}: no one module of pipeline/model/adapters/ puts it into a stage")
        if row.saved_as not in ("", *rows) or (row.saved_as and rows[row.saved_as].saved_as):
            found.append(f"{name}: saved as {row.saved_as}, which is not a row with a form of its own")
        elif not row.saved_as and name not in (*KINDS, *MAPS, *MAPS_OF_PAIRS, PEFT):
            found.append(f"{name}: no maps of a weight")
    return found


def test_every_family_has_its_module_and_its_maps() -> None:
    assert lacking(FAMILIES) == []


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"name": "made_up", "saved_as": ""}, ["no one module", "no maps"]),
        ({"name": "made_up", "saved_as": "lora"}, ["no one module"]),
        ({"name": "made_up", "saved_as": "moslora"}, ["no one module", "saved as moslora"]),
        ({"name": "control_adapter", "saved_as": ""}, ["no maps"]),
    ],
)
def test_a_row_that_lacks_one_of_them_is_reported(changes: dict[str, str], missing: list[str]) -> None:
    row = replace(FAMILIES["control_adapter"], **changes)
    found = lacking({**FAMILIES, row.name: row})
    assert len(found) == len(missing)
    assert all(line.startswith(f"{row.name}: {what}") for line, what in zip(found, missing, strict=True))


def test_nothing_is_served_that_has_no_row() -> None:
    assert set(INJECTORS) == set(FAMILIES)
    assert {*KINDS, *MAPS, *MAPS_OF_PAIRS, PEFT} == {saved(row).name for row in FAMILIES.values()}


def test_every_saved_form_can_be_read() -> None:
    """Its type in PEFT has types of keys and words for its tensors."""
    types = {saved(row).peft_type for row in FAMILIES.values()} - {""}
    assert types == set(read.EXPECTED)
    assert types <= set(read.SCHEMAS)


def test_what_has_a_family_of_its_own_is_no_type_of_pefts_beside_it() -> None:
    """But PEANUT, which is a multiplicative adapter where it is linear."""
    types = {saved(row).peft_type for row in FAMILIES.values()} - {""}
    assert types & LOCAL.keys() == {saved(FAMILIES["multiplicative_lora"]).peft_type}


def test_every_configured_family_is_a_value_of_the_schema() -> None:
    assert set(Config.model_json_schema()["properties"]["adapter_type"]["enum"]) == set(CONFIGURED)


def test_a_family_is_named_in_its_places_only() -> None:
    elsewhere = [source for source in PACKAGE if not path(source).startswith(NAMED_IN)]
    found = [(path(source), found) for source in elsewhere if (found := NAMES & set(texts(source)))]
    assert not found, "what a family is, ask pipeline.families"
