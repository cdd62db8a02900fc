"""Figures as people read them: the table of adapters by datasets on the terminal and in Markdown, all of them as CSV.

Takes cells and lights; gives text. Nothing is printed or written here.
"""

import csv
import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from pipeline.evaluation.cells import BASE, ROLES, Cell, Light
from pipeline.evaluation.statistics import POWER, Estimate
from pipeline.foreign import printable

WIDEST = 160
HEADER = (
    "adapter", "dataset", "role", "measure", "better", "value", "low", "high", "delta", "delta_low", "delta_high", "p",
    "detectable", "perplexity_ratio", "rows", "prompts",
)  # fmt: skip


def terminal(found: Sequence[Cell], lights: Sequence[Light], confidence: float, width: int) -> str:
    """The main figure of every adapter on every dataset, at most `width` wide; what it means; the lights."""
    out = io.StringIO()
    console = Console(file=out, width=min(width, WIDEST), color_system=None, highlight=False, emoji=False, markup=False)
    table = Table(show_lines=True)
    table.add_column("")
    datasets = _datasets(found)
    for cell in datasets:
        table.add_column(f"{printable(cell.dataset)}\n{cell.role}\n{cell.measure}")
    for adapter in _adapters(found):
        mine = [_main(found, adapter, cell.dataset) for cell in datasets]
        table.add_row(printable(adapter), *("\n".join(_words(cell)) for cell in mine))
    console.print(table)
    console.print(_legend(confidence))
    for light in lights:
        console.print(_light(light), soft_wrap=True)
    if not lights:
        console.print("no stop-light")
    return out.getvalue().rstrip()


def markdown(found: Sequence[Cell], lights: Sequence[Light], confidence: float, title: str) -> str:
    """The same as a page, with a table of every measure behind it."""
    datasets = _datasets(found)
    head = ["", *(f"{cell.dataset} ({cell.role}), {cell.measure}" for cell in datasets)]
    rows = [
        [adapter, *("<br>".join(_words(_main(found, adapter, cell.dataset))) for cell in datasets)]
        for adapter in _adapters(found)
    ]
    lit = [f"- {_light(light)}" for light in lights] or ["No stop-light."]
    every = [
        [
            cell.adapter,
            cell.dataset,
            cell.role,
            cell.measure,
            *_split_words(cell),
            f"{cell.rows:,}",
            f"{cell.prompts:,}",
        ]
        for cell in found
    ]
    names = ["adapter", "dataset", "role", "measure", "value", "to the base", "p", "detectable", "rows", "prompts"]
    parts = [f"# {title}", _table(head, rows), _legend(confidence), "## Stop-lights", "\n".join(lit)]
    return "\n\n".join([*parts, "## Every measure", _table(names, every)]) + "\n"


def comma_separated(found: Sequence[Cell]) -> str:
    """All cells with all digits; what a cell has not is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for cell in found:
        delta = cell.delta and (cell.delta.value, *(cell.delta.interval or (None, None)))
        what = [cell.adapter, cell.dataset, cell.role, cell.measure, cell.better]
        figures = [cell.figure.value, *(cell.figure.interval or (None, None)), *(delta or (None, None, None))]
        known = [cell.p, cell.detectable, cell.ratio and cell.ratio[0]]
        writer.writerow([*what, *figures, *known, cell.rows, cell.prompts])
    return out.getvalue()


def _legend(confidence: float) -> str:
    return (
        f"[a, b]: {confidence:.0%} of draws of prompts, each with all its rows; the second line is the difference to the base. "
        f"p: if as many prompts got better as worse (with a row a prompt, McNemar's exact test). seen from: the smallest true "
        f"difference that would be told from 0 {POWER:.0%} of the time. No interval where every prompt says the same."
    )


def _light(light: Light) -> str:
    where = f" on {printable(light.dataset)}" if light.dataset else ""
    return f"STOP  {printable(light.adapter)}: {light.what}{where} ({light.why})"


def _adapters(found: Sequence[Cell]) -> list[str]:
    """The base first, wherever it was asked for."""
    names = list(dict.fromkeys(cell.adapter for cell in found))
    return sorted(names, key=lambda name: name != BASE)


def _datasets(found: Sequence[Cell]) -> list[Cell]:
    """The base's main cell of each dataset, in the order of roles."""
    mains = [cell for cell in found if cell.main and cell.adapter == BASE]
    return sorted(mains, key=lambda cell: ROLES.index(cell.role))


def _main(found: Iterable[Cell], adapter: str, dataset: str) -> Cell:
    return next(c for c in found if c.main and (c.adapter, c.dataset) == (adapter, dataset))


def _words(cell: Cell) -> list[str]:
    """Lines of a cell: the figure, and of an adapter the difference to the base and what is known of it."""
    value, delta, p, seen = _split_words(cell)
    known = [f"p {p}"] * bool(p) + [f"seen from {seen}"] * bool(seen)
    return [value, *[delta] * bool(delta), *[", ".join(known)] * bool(known)]


def _split_words(cell: Cell) -> list[str]:
    delta = _estimate(cell.delta, sign="+") if cell.delta else ""
    if cell.ratio is not None:
        delta += f", perplexity ×{cell.ratio[0]:.3f}"
    p = "" if cell.p is None else f"{cell.p:.2g}"
    return [_estimate(cell.figure), delta, p, "" if cell.detectable is None else f"{cell.detectable:.3f}"]


def _estimate(figure: Estimate, sign: str = "") -> str:
    value = f"{figure.value:{sign}.3f}"
    if figure.interval is None:
        return value
    low, high = figure.interval
    return f"{value} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
