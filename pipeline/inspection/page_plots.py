"""The plots of an inspection's page. Takes an `Inspection`; gives figures with their captions and keys."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.families import MULTIPLICATIVE
from pipeline.inspection import plots
from pipeline.inspection.plots import Point
from pipeline.inspection.reading import Inspection, Module
from pipeline.inspection.spectrum import effective_rank, effects
from pipeline.inspection.words import ORDER, number, short_name

ZOOM_BELOW = 0.5  # largest |λ| up to which the plane is shown a second time, just around the eigenvalues
MOST_MODULES = 100  # in the table of shades


class Figure(NamedTuple):
    """A drawing. `keys`: (colour of the page, what has it)."""

    svg: str
    caption: str
    keys: list[tuple[str, str]]


def figures(inspection: Inspection) -> list[Figure]:
    """All figures."""
    series = _series(inspection)
    keys = [(f"c{i % plots.COLOURS}", name) for i, name in enumerate(series)] if len(series) > 1 else []
    found = [
        Figure(
            _by_layer(series, lambda m: [m.spectrum.norm], "‖sBA‖₂", lines=True),
            "The largest gain of each module.",
            keys,
        ),
        Figure(
            _by_layer(series, lambda m: m.spectrum.gains_K.tolist(), "gain", log=True),
            "All gains, the singular values of s·B·A.",
            keys,
        ),
        Figure(
            _by_layer(series, lambda m: [effective_rank(m.spectrum.gains_K)], "effective rank", lines=True),
            "How many directions share a module's work.",
            keys,
        ),
    ]
    if inspection.kind == MULTIPLICATIVE:
        found += _planes(inspection)
    known = inspection.hand_overs_NN.nan_to_num()
    if bool(known.any()) and len(inspection.modules) <= MOST_MODULES:
        names = [short_name(module.name) for module in inspection.modules]
        caption = (
            "How far what a module's first response writes is what a later layer's first detector looks for: |cos|, from 0 "
            f"(empty) to {float(known.max()):.2g} (strongest)."
        )
        found.append(Figure(plots.shades(inspection.hand_overs_NN.tolist(), names), caption, []))
    return found


def _series(inspection: Inspection) -> dict[str, list[Module]]:
    """The modules by what their names have after the layer's number."""
    series: dict[str, list[Module]] = {}
    for module in inspection.modules:
        series.setdefault(short_name(module.name).partition(" ")[2] or module.name, []).append(module)
    return series


def _by_layer(
    series: dict[str, list[Module]],
    values: Callable[[Module], list[float]],
    name: str,
    *,
    log: bool = False,
    lines: bool = False,
) -> str:
    points = {
        which: [
            Point(float(module.layer or 0), value, f"{short_name(module.name)}: {name} {number(value)}")
            for module in modules
            for value in values(module)
        ]
        for which, modules in series.items()
    }
    return plots.by_layer(points, y_name=name, log=log, lines=lines)


def _effects(inspection: Inspection) -> list[tuple[str, str]]:
    """The colours of the effects that occur, with their names."""
    occurring = {what for module in inspection.modules for _, what in effects(module.spectrum)}
    return [(what, what) for what in ORDER if what in occurring]


def _planes(inspection: Inspection) -> list[Figure]:
    """The complex plane with the circle, and close by where all eigenvalues are small."""
    points = [
        (value, str(what), short_name(module.name))
        for module in inspection.modules
        for value, what in effects(module.spectrum)
    ]
    whole = (
        "Eigenvalues λ of s·A·B, all modules. On the circle |1 + λ| = 1 a direction keeps its length; inside it shrinks, at the "
        "centre it is erased, outside it grows; off the axis a plane turns."
    )
    keys = _effects(inspection)
    found = [Figure(plots.plane(points, zoomed=False), whole, keys)]
    largest = max((abs(value) for value, _, _ in points), default=0.0)
    if 0 < largest < ZOOM_BELOW:
        near = "The same, close by. The line through 0 is the circle's edge."
        found.append(Figure(plots.plane(points, zoomed=True), near, keys))
    return found
