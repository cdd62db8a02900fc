"""The drawings of an inspection: figures by layer, gains, eigenvalues in the complex plane, a table of overlaps as shades.

Takes plain numbers and names; gives matplotlib's SVG as an element of the page. A series (`c0`, `c1`, …), an effect and a cell
have the colours of the page's variables of that name, light or dark, and each mark says under the pointer what it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from pipeline.inspection.words import ORDER, complex_number
from pipeline.pages import drawing
from pipeline.pages.drawing import HEIGHT, INK, STYLE, WIDTH

COLOURS = 6  # series of different colours; more than these begin again
VARIABLES = (*(f"c{number}" for number in range(COLOURS)), *map(str, ORDER), "cell")
STAND_INS = {name: f"#0103{number:02x}" for number, name in enumerate(VARIABLES)}  # while it is drawn
FLATTEST = 0.2  # of a plane: half its height beside its width
HIGHEST = 5.4  # inches
SIDE = 3.6  # inches: of the table of shades
LABELLED = 24  # modules that are named beside it
LONGEST_LABEL = 4  # characters of such a name; a layer's number is shorter


@dataclass(frozen=True)
class Point:
    """A point of a plot; `hint` is shown when the pointer rests on it."""

    x: float
    y: float
    hint: str


def by_layer(series: Mapping[str, Sequence[Point]], *, y_name: str, log: bool, lines: bool) -> str:
    """Points of several series over the layers; y from zero, or logarithmic (where points of y ≤ 0 are left out)."""
    kept = {name: [p for p in points if p.y > 0 or not log] for name, points in series.items()}
    largest = max((p.y for points in kept.values() for p in points), default=0.0)
    hints = {}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        for number, points in enumerate(kept.values()):
            drawn = [p for p in points if not log or p.y >= largest * 1e-6]
            hints[f"series{number}"] = _dots(axes, f"series{number}", f"c{number % COLOURS}", drawn, line=lines)
        if any(hints.values()) and log:
            least = min(p.y for points in kept.values() for p in points if p.y >= largest * 1e-6)
            axes.set_yscale("log")
            axes.set_ylim(least / 1.5, largest * 1.5)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if largest > 4 * least else MaxNLocator(5))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        elif any(hints.values()):
            axes.set_ylim(0.0, largest * 1.08 or 1.0)
        else:
            axes.text(0.5, 0.5, "nothing to draw: all are zero", ha="center", transform=axes.transAxes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(y_name)
    return _element(figure, y_name.replace(" ", "-"), f"{y_name} by layer", hints)


def plane(points: Sequence[tuple[complex, str, str]], *, zoomed: bool) -> str:
    """Eigenvalues (λ, effect, hint) in the complex plane, with the circle |1 + λ| = 1; `zoomed`: just around them all.

    In the circle directions shrink, on it they keep their length, outside they grow. Equal scales on both axes.
    """
    values = [value for value, _, _ in points]
    if zoomed:
        reach = 1.15 * max((abs(v) for v in values), default=1.0) or 1.0
        left, right, up = -reach, reach, reach
    else:
        left, right = min([-2.25, *(v.real - 0.2 for v in values)]), max([0.5, *(v.real + 0.2 for v in values)])
        up = max([1.15, *(abs(v.imag) + 0.1 for v in values), FLATTEST * (right - left)])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, min(HIGHEST, WIDTH * 2 * up / (right - left))), layout="constrained")
        axes = figure.subplots()
        axes.add_patch(Circle((-1, 0), 1, fill=False, edgecolor=INK, linestyle="--", alpha=0.6))
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.6)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
        for x, name in () if zoomed else ((-2, "reflect"), (-1, "erase")):
            axes.plot([x], [0], color=INK, marker="|", markersize=10)
            axes.annotate(name, (x, 0), (3, -12), textcoords="offset points")
        hints = {}
        for what, of_effect in groupby(sorted(points, key=lambda one: one[1]), key=lambda one: one[1]):
            dots = [Point(v.real, v.imag, f"λ = {complex_number(v)} {what}. {hint}") for v, _, hint in of_effect]
            hints[what] = _dots(axes, what, what, dots)
        axes.set(xlim=(left, right), ylim=(-up, up), xlabel="Re λ", ylabel="Im λ")
        axes.set_aspect("equal")
    return _element(figure, f"plane{'-near' if zoomed else ''}", "eigenvalues of s·A·B in the complex plane", hints)


def shades(values: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """A square table of values ≥ 0 as shades, the largest the darkest; rows write, columns read. nan is left empty."""
    n, colour = len(names), to_rgba(STAND_INS["cell"])[:3]
    cells = [(i, j, value) for i, row in enumerate(values) for j, value in enumerate(row) if not math.isnan(value)]
    largest = max((value for *_, value in cells), default=0.0) or 1.0
    hints = [f"{names[i]} writes, {names[j]} looks for: |cos| {value:.3f}" for i, j, value in cells]
    every = range(0, n, -(-n // LABELLED))
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(SIDE, SIDE), layout="constrained")
        axes = figure.subplots()
        squares = [Rectangle((j - 0.5, i - 0.5), 1, 1) for i, j, _ in cells]
        shown = [(*colour, value / largest) for *_, value in cells]
        axes.add_collection(PatchCollection(squares, facecolors=shown, edgecolors="none", gid="cells"))
        axes.set_xticks(every, [_short(names[place]) for place in every], rotation=90 if n > LABELLED // 2 else 0)
        axes.set_yticks(every, [_short(names[place]) for place in every])
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), aspect="equal")
        axes.set_xlabel("layer whose first detector reads")
        axes.set_ylabel("layer whose first response writes")
    return _element(figure, "shades", "responses against later detectors", {"cells": hints})


def _short(name: str) -> str:
    first = name.split(" ")[0]
    return drawing.shown(first if len(first) <= LONGEST_LABEL else first[: LONGEST_LABEL - 1] + "…")


def _dots(axes: Axes, gid: str, colour: str, points: Sequence[Point], *, line: bool = False) -> list[str]:
    """Draw points in a group of SVG that is called `gid`; their hints in its order."""
    axes.plot(
        [p.x for p in points],
        [p.y for p in points],
        color=STAND_INS[colour],
        marker="o",
        markersize=4 if line else 3.4,
        linestyle="-" if line else "none",
        linewidth=1.2,
        gid=gid,
    )
    return [p.hint for p in points]


def _element(figure: Figure, name: str, label: str, hints: Mapping[str, Sequence[str]]) -> str:
    """The drawing in the page's colours. `hints`: by the name of a group, what each of its marks says under the pointer."""
    colours = {stand_in: f"var(--{variable})" for variable, stand_in in STAND_INS.items()}
    root = ElementTree.fromstring(drawing.svg(figure, name, label, colours))
    groups = {group.get("id"): group for group in root.iter("g")}
    for gid, said in hints.items():
        group = groups[f"{name}-{gid}"]
        # matplotlib draws equal marks as uses of one, others each as a path.
        marks = [*group.iter("use")] or group.findall("path")
        for mark, hint in zip(marks, said, strict=True):
            ElementTree.SubElement(mark, "title").text = hint
    return ElementTree.tostring(root, encoding="unicode")
