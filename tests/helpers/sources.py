"""The project's own Python files, each read and parsed once a process, for tests that read the source."""

import ast
from functools import cache
from pathlib import Path

from tests.helpers.paths import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def path(source: Path) -> str:
    """Of a file, from the root."""
    return source.relative_to(ROOT).as_posix()


@cache
def text(source: Path) -> str:
    """What stands in it."""
    return source.read_text(encoding="utf-8")


@cache
def tree(source: Path) -> ast.Module:
    """Its syntax tree."""
    return ast.parse(text(source))


@cache
def nodes(source: Path) -> tuple[ast.AST, ...]:
    """All of its tree."""
    return tuple(ast.walk(tree(source)))
