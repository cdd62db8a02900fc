"""Several runs beside each other: where their configurations differ, what each came to, and their curves in one picture.

Takes runs' folders; gives lines for the console, and one page with the picture beside it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import UserError, log
from pipeline.files import atomic_file, check_file_free
from pipeline.pages import drawing
from pipeline.publishing.report import pictures
from pipeline.publishing.report.page import environment
from pipeline.publishing.report.read import Run, Series, read

ABSENT = "–"


class Row(NamedTuple):
    """A line of the table: what it is about, and a cell for each run."""

    what: str
    cells: tuple[str, ...]


def compare(folders: Sequence[Path], output: Path | None, *, force: bool) -> None:
    """Show the table; with `output`, also write the page, and its picture as .png beside it.

    UserError, with nothing written, where a folder is no run, or there is only one, or a file is there and `force` is not given.
    """
    if len(folders) < 2:
        raise UserError("one run alone has nothing to be compared with: name two or more")
    for file in (output, output.with_suffix(".png")) if output is not None else ():
        check_file_free(file, replace=force)
    runs = [read(folder) for folder in folders]
    names = names_of(runs)
    rows = [*results(runs), *differences([run.facts.config for run in runs])]
    log(table(names, rows))
    if output is not None:
        figure = pictures.lines(curves(runs, names), "loss")
        svg = drawing.svg(figure, "comparison", "the losses of the runs over their steps")
        page = environment().get_template("comparison.html.j2").render(names=names, rows=rows, svg=svg)
        for file, content in ((output, page.encode()), (output.with_suffix(".png"), drawing.png(figure))):
            with atomic_file(file, replace=force) as unfinished:
                unfinished.write_bytes(content)
        log(f"written: {output}, {output.with_suffix('.png')}")


def names_of(runs: Sequence[Run]) -> list[str]:
    """Each run's folder, with as much of its path as tells it from the others. UserError where two are one."""
    parts = [run.folder.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("a run is named twice")
    length = 1
    while len({one[-length:] for one in parts}) < len(parts):
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def results(runs: Sequence[Run]) -> list[Row]:
    """Steps, losses and speed."""
    sets = list(dict.fromkeys(name for run in runs for name in run.facts.evaluation))
    rows = [Row("steps", tuple(f"{run.facts.step:,}" for run in runs))]
    rows.append(Row("last training loss", tuple(_last(run.series.get("train/loss")) for run in runs)))
    for name in sets:
        least = [min((loss.loss for loss in run.facts.evaluation.get(name, [])), default=None) for run in runs]
        rows.append(Row(f"least loss of {name}", tuple(ABSENT if n is None else f"{n:.4f}" for n in least)))
    rows.append(Row("last tokens/s", tuple(_last(run.series.get("train/tokens_per_s"), ",.0f") for run in runs)))
    return rows


def _last(values: Series | None, form: str = ".4f") -> str:
    return f"{values[-1].value:{form}}" if values else ABSENT


def differences(configs: Sequence[dict[str, Any]]) -> list[Row]:
    """The keys whose values are not the same in all, in the order of the file."""
    flat = [dict(_flat("", config)) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    cells = {key: tuple(_shown(one[key]) if key in one else ABSENT for one in flat) for key in keys}
    return [Row(key, values) for key, values in cells.items() if len(set(values)) > 1]


def _shown(value: Any) -> str:
    """As TOML has it, a text without its quotes. Lists of numbers and texts, numbers and booleans are the same in JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """`optimizer.lr`, `datasets.0.name`: every value by the key that --set takes for it."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        pairs = {str(number): one for number, one in enumerate(value)}.items()
    else:
        return [(prefix, value)]
    return [found for key, inner in pairs for found in _flat(f"{prefix}.{key}".lstrip("."), inner)]


def curves(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Series]:
    """The loss of every evaluation set of every run; where a run evaluated nothing, its training loss."""
    found: dict[str, Series] = {}
    for run, name in zip(runs, names, strict=True):
        tags = [tag for tag in run.series if tag.startswith("eval/") and tag.endswith("/loss")] or ["train/loss"]
        found |= {f"{name}: {tag.split('/')[1]}": run.series[tag] for tag in tags if tag in run.series}
    return found


def table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns under the runs' names, for the console."""
    lines = [("", *names), *((row.what, *row.cells) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names) + 1)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
