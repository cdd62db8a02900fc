"""What the documents for those who change the code say is so: paths and names in CONTRIBUTING.md, architecture.md and the walk."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import pipeline
from tests.helpers.builders import ROOT

SECTIONS = ("Set up", "A family of adapters", "A kernel", "An objective", "A type of dataset")
COMMANDS = ("git ", "pip ", "pre-commit ", "python ", ".venv/bin/python ")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".json", ".yaml")


def contributing() -> dict[str, str]:
    """Heading → text of CONTRIBUTING.md."""
    _, *sections = re.split(r"(?m)^## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    return {heading: text for heading, _, text in (section.partition("\n") for section in sections)}


def items(text: str) -> dict[int, str]:
    """The numbered points of a text."""
    found = re.split(r"(?m)^(\d+)\. ", text)[1:]
    return {int(number): item for number, item in zip(found[::2], found[1::2], strict=True)}


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def is_path(span: str) -> bool:
    return " " not in span and ("/" in span or span.endswith(SUFFIXES))


@cache
def defined_in(file: Path) -> frozenset[str]:
    """Names that a Python file defines: functions, classes, variables, fields, parameters."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return frozenset(names)


def wrong(item: str) -> list[str]:
    """The spans of a point that name nothing: a path that is not there, a name that none of the point's files defines."""
    paths = [span for span in spans(item) if is_path(span)]
    files = [ROOT / path for path in paths if path.endswith(".py") and (ROOT / path).is_file()]
    names = {name for file in files for name in defined_in(file)}
    return [span for span in spans(item) if not (exists(span) or set(span.removesuffix("()").split(".")) <= names)]


def exists(span: str) -> bool:
    """A path (`<name>` stands for any), a target of the Makefile, or a command of which every path exists."""
    if span.startswith("make "):
        return re.search(rf"(?m)^{re.escape(span.split()[1])}:", (ROOT / "Makefile").read_text()) is not None
    if span.startswith(COMMANDS):
        return all((ROOT / word).exists() for word in span.split()[1:] if is_path(word))
    place = ROOT / re.sub(r"/?[^/]*<.*", "", span)
    return is_path(span) and place.exists()


@pytest.mark.parametrize("section", SECTIONS)
def test_each_list_is_numbered_and_names_what_is_there(section: str) -> None:
    points = items(contributing()[section])
    assert list(points) == list(range(1, len(points) + 1)) and len(points) >= 3
    for number, item in points.items():
        assert not wrong(item), f"{section}, {number}"
        assert spans(item), f"{section}, {number} says no place"


def test_contributing_has_these_lists_and_nothing_in_it_is_gone() -> None:
    assert set(SECTIONS) <= contributing().keys()
    for heading, text in contributing().items():
        assert not wrong(text), heading


def test_this_test_notices_what_is_gone() -> None:
    assert wrong("`pipeline/no_such_room/x.py`") and wrong("`make nothing`") and wrong("`python no/such/file.py`")
    assert wrong("`no_such_name` in `pipeline/console.py`") and wrong("`complain`, of no file")
    assert not wrong("`complain` in `pipeline/console.py`, `pipeline/<room>/<name>.py`, `make lint`, `git init`")


def test_the_paths_of_the_architecture_exist() -> None:
    """As they are from the root, or within pipeline/ without its name; `a/b.name` is `name` in a/b.py."""
    for span in spans((ROOT / "docs/architecture.md").read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w.]+(/[\w.]+)+/?", span) and not span.startswith(("output_dir/", "bnb/")):
            assert any(is_there(root / span) for root in (ROOT, ROOT / "pipeline")), span


def is_there(path: Path) -> bool:
    if path.exists() or path.with_name(f"{path.name}.py").exists():
        return True
    module, _, name = path.name.partition(".")
    file = path.with_name(f"{module}.py")
    return file.exists() and name.split(".")[0] in defined_in(file)


def test_the_walk_names_what_is_there() -> None:
    lines = re.findall(r"(?m)^    ([a-z_]+(?:\.\w+)+|[a-z_]+)  +\S", pipeline.__doc__ or "")
    assert len(lines) > 12
    for dotted in lines:
        path = Path(pipeline.__path__[0])
        parts = dotted.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        if parts:
            file = path / f"{parts.pop(0)}.py"
            assert file.exists(), dotted
            assert set(parts) <= defined_in(file), dotted


def test_the_tree_of_the_readme_has_every_room() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("\n## ")[0]
    named = set(re.findall(r"\S+", tree))
    rooms = {f"{path.name}/" for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists()}
    modules = {path.name for path in (ROOT / "pipeline").glob("*.py")} | {path.name for path in ROOT.glob("*.py")}
    assert not {name for name in rooms | modules if name not in {word.rstrip(",") for word in named}}
