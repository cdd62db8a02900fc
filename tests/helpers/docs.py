"""What a document names: its code spans, and whether there is what they name."""

import ast
import re
from functools import cache
from pathlib import Path

from tests.helpers.builders import ROOT

COMMANDS = ("git ", "pip ", "pre-commit ", "python ", ".venv/bin/python ")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".json", ".yaml")


def spans(text: str) -> list[str]:
    """What stands between backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@cache
def defined_in(file: Path) -> frozenset[str]:
    """Names that a Python file defines: functions, classes, variables, fields, parameters."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return frozenset(names)


def is_path(span: str) -> bool:
    """Whether the span is meant as a path."""
    return " " not in span and ("/" in span or span.endswith(SUFFIXES))


def exists(span: str) -> bool:
    """A path (`<name>` stands for any), a target of the Makefile, or a command of which every path exists."""
    if span.startswith("make "):
        return re.search(rf"(?m)^{re.escape(span.split()[1])}:", (ROOT / "Makefile").read_text()) is not None
    if span.startswith(COMMANDS):
        return all((ROOT / word).exists() for word in span.split()[1:] if is_path(word))
    return is_path(span) and (ROOT / re.sub(r"/?[^/]*<.*", "", span)).exists()


def missing(text: str) -> list[str]:
    """The spans that name nothing: no path or command (`exists`), no name that one of the text's own Python files defines.

    A string of a list or table of such a file, as a family in a row, is written in quotes: `'hra'`.
    """
    files = [ROOT / span for span in spans(text) if span.endswith(".py") and (ROOT / span).is_file()]
    names = {name for file in files for name in defined_in(file)}
    literals = {literal for file in files for literal in literals_in(file)}
    return [
        span
        for span in spans(text)
        if not (exists(span) or set(span.removesuffix("()").split(".")) <= names or span.strip("'") in literals)
    ]


@cache
def literals_in(file: Path) -> frozenset[str]:
    """Texts that stand in a Python file as literals."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
