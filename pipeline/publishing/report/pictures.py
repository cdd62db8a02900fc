"""The pictures of a report, drawn by matplotlib: lines over steps, norms by module, memory by stage.

Takes series of numbers; gives figures, which pipeline/pages/drawing.py makes part of a page. Needs no display.
"""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.names import natural_order
from pipeline.pages.drawing import COLOURS, HEIGHT, STYLE, WIDTH, shown
from pipeline.publishing.report.read import Series

MOST_POINTS = 1500  # of one line: more cannot be told apart
LABELLED = 24  # modules of the picture of norms that are named


def lines(series: Mapping[str, Series], y_label: str, *, logarithmic: bool = False) -> Figure:
    """Each of `series` over the steps, by its name; those of few values with a dot at each."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            points = thinned(values)
            colour, marker = COLOURS[number % len(COLOURS)], "o" if len(points) <= 30 else ""
            axes.plot(
                [v.step for v in points],
                [v.value for v in points],
                label=shown(name),
                color=colour,
                marker=marker,
                markersize=3,
                linewidth=1.3,
                gid=f"line{number}",
            )
        if not series:
            axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(y_label)
        if len(series) > 1:
            axes.legend()
    return figure


def norms(by_module: Mapping[str, Series]) -> Figure:
    """‖B·A‖ of every module (rows) over the steps (columns), in colour."""
    modules = sorted(by_module, key=natural_order)
    steps = sorted({value.step for found in by_module.values() for value in found})
    places = {step: place for place, step in enumerate(steps)}
    grid = np.full((len(modules), len(steps)), np.nan)
    for row, module in enumerate(modules):
        for value in by_module[module]:
            grid[row, places[value.step]] = value.value
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, max(HEIGHT, 0.16 * min(len(modules), 60))), layout="constrained")
        axes = figure.subplots()
        mesh = axes.pcolormesh(steps, np.arange(len(modules)), grid, cmap="viridis", rasterized=True, shading="nearest")
        labelled = np.unique(np.linspace(0, len(modules) - 1, min(LABELLED, len(modules))).round().astype(int))
        axes.set_yticks(labelled, [shown(modules[place]) for place in labelled])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        bar = figure.colorbar(mesh, ax=axes)
        bar.set_label("‖B·A‖")
    return figure


def memory(stages: Sequence[tuple[float, float]]) -> Figure:
    """(planned, measured) GiB of every stage, side by side."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(stages))
        for offset, label, column in ((-0.2, "planned", 0), (0.2, "measured", 1)):
            axes.bar(places + offset, [stage[column] for stage in stages], 0.38, label=label, color=COLOURS[column])
        axes.set_xticks(places, [f"stage {place}" for place in places])
        axes.set_ylabel("GiB at the peak")
        figure.legend(loc="outside upper right", ncols=2)  # the bars leave no room
    return figure


def thinned(values: Series) -> Series:
    """At most MOST_POINTS of `values`, the last one among them: means over as many equal stretches, each at its last step."""
    width = -(-len(values) // MOST_POINTS) or 1
    stretches = [values[start : start + width] for start in range(0, len(values), width)]
    return [s[-1]._replace(value=sum(v.value for v in s) / len(s)) for s in stretches]
