"""CONTRIBUTING.md: short lists of what to do, of which every path, name and command exists."""

import re

import pytest

from tests.helpers.builders import ROOT
from tests.helpers.docs import missing, spans

SECTIONS = ("Set up", "A family of adapters", "A kernel", "An objective", "A type of dataset")
MOST_POINTS = 9


def sections() -> dict[str, str]:
    """Heading → text of CONTRIBUTING.md."""
    _, *parts = re.split(r"(?m)^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    return {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def points(text: str) -> dict[int, str]:
    """The numbered points of a text."""
    found = re.split(r"(?m)^(\d+)\. ", text)[1:]
    return {int(number): point for number, point in zip(found[::2], found[1::2], strict=True)}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_list_is_short_and_numbered(section: str) -> None:
    numbers = list(points(sections()[section]))
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3 <= len(numbers) <= MOST_POINTS


@pytest.mark.parametrize("section", SECTIONS)
def test_each_point_names_what_is_there(section: str) -> None:
    """A name has to be defined in a file that the same point names."""
    for number, point in points(sections()[section]).items():
        assert spans(point), f"{number}. says no place"
        assert not missing(point), f"{number}."


def test_nothing_else_in_it_is_gone() -> None:
    for heading, text in sections().items():
        assert not missing(text), heading


def test_what_is_gone_is_noticed() -> None:
    assert missing("`pipeline/no_such_room/x.py`")
    assert missing("`make nothing`")
    assert missing("`python no/such/file.py`")
    assert missing("`no_such_name` in `pipeline/console.py`")
    assert missing("`complain`, of no file")
    assert not missing("`complain` in `pipeline/console.py`, `pipeline/<room>/<name>.py`, `make lint`, `git init`")
