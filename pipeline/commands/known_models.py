"""Which families of models train here, and what of each works, as the tests found it: docs/models.json.

Gives the record and the lines that `train.py --list-models` prints; docs/models.md is made of the same record (docs/models.py).
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

RECORD = Path(__file__).resolve().parents[2] / "docs" / "models.json"
TEXT_HALF = " (text half)"  # behind the name of a family of models for text and images
UNTRIED = "untried"  # the column of a family of which nothing could be tried out
ADAPTERS = ("multiplicative_lora", "lora", "experts")


class Cell(NamedTuple):
    """What a test found: whether it works, None where the family has nothing of the kind; and how well, or why not."""

    works: bool | None
    words: str = ""


Found = dict[str, dict[str, Cell]]  # by family and column

COLUMNS: dict[str, str] = {
    "stages": "cut into 2 and 3 stages, by how much of the largest logit it differs from the uncut model; 0: equal to the bit",
    "multiplicative_lora": "trains on all linear modules of the layers",
    "lora": "trains on all linear modules of the layers",
    "experts": "one multiplicative pair a layer on what a mixture's experts write; none: the family has no such experts",
    "kernels": "which of `kernels` find a place; with them logits and gradients are what they are without",
    "4 bits": "trains over a base in 4 bits, experts included, and computes what the unpacked weights do",
    "fold": "by how much of the largest logit the folded model, run by transformers, differs from the stages with the adapter",
}


def read() -> tuple[dict[str, str], Found]:
    """(versions of the libraries, what was found) of the record."""
    held: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return held["versions"], {
        family: {column: Cell(*cell) for column, cell in cells.items()} for family, cells in held["families"].items()
    }


def trains(cells: dict[str, Cell]) -> bool:
    """Whether a family trains, on however many stages."""
    return any(cell.works for column in ADAPTERS if (cell := cells.get(column)))


def word(cells: dict[str, Cell], column: str) -> str:
    """A cell in a word or two: how well, 'yes', 'no', 'none', or '?' for what no test has been run of."""
    cell = cells.get(column)
    if cell is None:
        return "?"
    if cell.works is None:
        return "none"
    return (cell.words or "yes") if cell.works else "one" if column == "stages" and trains(cells) else "no"


def lines() -> list[str]:
    """The list, family by family, and what is not trained with the reason."""
    versions, found = read()
    those = {family: cells for family, cells in sorted(found.items()) if trains(cells)}
    header = ("family", *COLUMNS)
    rows = [header, *((family, *(word(cells, column) for column in COLUMNS)) for family, cells in those.items())]
    widths = [max(len(row[index]) for row in rows) for index in range(len(header))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [
        f"{len(those)} families, tried as tiny random models with {', '.join(' '.join(of) for of in versions.items())}:",
        "",
        *shown,
        "",
        *(f"{column}: {meaning}" for column, meaning in COLUMNS.items()),
        "one: on one stage only; ?: not tried. Why not, and what is refused: docs/models.md",
    ]


class ShowModels(argparse.Action):
    """`--list-models`: print the list and end."""

    def __init__(self, option_strings: list[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="list the families of models that train, with what works")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Read the record only now."""
        with contextlib.suppress(BrokenPipeError):  # of a pager that was left
            print("\n".join(lines()), flush=True)
        parser.exit()
