"""Plots as inline SVG: figures by layer, gains, eigenvalues in the complex plane, a table of overlaps as shades.

Takes plain numbers and names; gives SVG elements as text, well-formed, coloured through CSS classes (`s0`, `s1`, … for
series, an effect's name for eigenvalues), so that the page's light and dark colours hold for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise

from pipeline.inspection.words import complex_number, minus

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
CHARACTER = 7.2  # of a label's text: a wide one's width
LONGEST_LABEL = 4  # characters of a name beside the table of shades; a layer's number is shorter
FLATTEST = 0.2  # of a plane: half its height beside its width
SMALLEST_SIDE = 240  # of the table of shades: the axes' names are as long
COLOURS = 6  # series of different colours; more than these begin again


@dataclass(frozen=True)
class Point:
    """A point of a plot; `hint` is shown when the pointer rests on it."""

    x: float
    y: float
    hint: str


@dataclass(frozen=True)
class _Frame:
    """The range of the axes, and how it falls on the drawing. `log`: y is drawn by its logarithm."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT
    log: bool = False

    @cached_property
    def y_labels(self) -> dict[float, str]:
        return labels(_powers(*self.y) if self.log else ticks(*self.y))

    @cached_property
    def left(self) -> float:
        """Where the plot begins: beside the numbers of the y axis and its name."""
        return max(LEFT, 26 + CHARACTER * max(map(len, self.y_labels.values()), default=0))

    def at_x(self, value: float) -> float:
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - self.left - RIGHT)

    def at_y(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (*self.y, value))
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def by_layer(series: dict[str, list[Point]], *, y_name: str, log: bool, lines: bool) -> str:
    """Points of several series over the layers; y from zero, or logarithmic (where points of y ≤ 0 are left out)."""
    kept = {name: [p for p in points if p.y > 0 or not log] for name, points in series.items()}
    every = [point for points in kept.values() for point in points]
    if not every:
        return _svg(
            WIDTH, 40, f"{y_name}: nothing to draw", [_label(WIDTH / 2, 24, "nothing to draw: all are zero", "middle")]
        )
    x_ends = (min(p.x for p in every) - 0.6, max(p.x for p in every) + 0.6)
    largest, smallest = max(p.y for p in every), min(p.y for p in every)
    y_ends = (max(smallest, largest * 1e-6) / 1.5, largest * 1.5) if log else (0.0, largest * 1.08 or 1.0)
    frame = _Frame(x_ends, y_ends, log=log)
    parts = _axes(frame, "layer", y_name, whole_x=True)
    for index, points in enumerate(kept.values()):
        colour = f"s{index % COLOURS}"
        shown = [p for p in points if p.y >= y_ends[0]]
        if lines and len(shown) > 1:
            path = " ".join(f"{frame.at_x(p.x):.1f},{frame.at_y(p.y):.1f}" for p in shown)
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        parts += [_dot(frame, p, colour, 3.2 if lines else 2.4) for p in shown]
    return _svg(WIDTH, HEIGHT, f"{y_name} by layer", parts)


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
    inner = WIDTH - RIGHT - _Frame((left, right), (-up, up)).left
    height = min(640, round(inner * 2 * up / (right - left)) + TOP + BOTTOM)
    middle, half = (left + right) / 2, up * inner / (height - TOP - BOTTOM)
    frame = _Frame((middle - half, middle + half), (-up, up), height=height)
    unit = frame.at_x(1) - frame.at_x(0)
    clip = f"clip{'z' if zoomed else 'w'}"
    parts = [
        f'<clipPath id="{clip}">{_box(frame, "clip")}</clipPath>',
        *_axes(frame, "Re λ", "Im λ"),
        f'<g clip-path="url(#{clip})">',
        f'<circle class="unit" cx="{frame.at_x(-1):.1f}" cy="{frame.at_y(0):.1f}" r="{unit:.1f}"/>',
        _line(frame.at_x(0), TOP, frame.at_x(0), height - BOTTOM, "zero"),
        _line(frame.left, frame.at_y(0), WIDTH - RIGHT, frame.at_y(0), "zero"),
    ]
    if not zoomed:
        for x, name in ((-2, "reflect"), (-1, "erase")):
            x_at, y_at = frame.at_x(x), frame.at_y(0)
            parts.append(_line(x_at, y_at - 7, x_at, y_at + 7, "mark"))
            if unit > CHARACTER * len("reflect"):
                parts.append(_label(x_at + 4, y_at + 18, name, "start"))
    parts += [
        _dot(frame, Point(v.real, v.imag, f"λ = {complex_number(v)} {what}. {hint}"), what, 3.4)
        for v, what, hint in points
    ]
    return _svg(WIDTH, height, "eigenvalues of s·A·B in the complex plane", [*parts, "</g>"])


def shades(values: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    """A square table of values ≥ 0 as shades, the largest the darkest; rows write, columns read. nan is left empty."""
    n = len(names)
    shown = [
        short if len(short := name.split(" ")[0]) <= LONGEST_LABEL else short[: LONGEST_LABEL - 1] + "…"
        for name in names
    ]
    largest = max((value for row in values for value in row if not math.isnan(value)), default=0.0) or 1.0
    cell = max(5.0, min(22.0, (WIDTH - LEFT - RIGHT) / n), SMALLEST_SIDE / n)
    side = round(cell * n)
    widest = max(22.0, CHARACTER * max(map(len, shown)) + 4)
    down, across = math.ceil(11 / cell), math.ceil(widest / cell)  # every how many cells there is room for a name
    parts = []
    for i, row in enumerate(values):
        y = TOP + i * cell
        for j in range(n):
            if not math.isnan(row[j]):
                hint = escape(f"{names[i]} writes, {names[j]} looks for: |cos| {row[j]:.3f}")
                parts.append(
                    f'<rect class="cell" x="{LEFT + j * cell:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
                    f'fill-opacity="{row[j] / largest:.3f}"><title>{hint}</title></rect>'
                )
        if i % down == 0:
            parts.append(_label(LEFT - 5, y + cell / 2 + 4, shown[i], "end"))
        if i % across == 0:
            parts.append(_label(LEFT + (i + 0.5) * cell, TOP + side + 14, shown[i], "middle"))
    parts.append(f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{side}" height="{side}"/>')
    parts.append(_label(LEFT + side / 2, TOP + side + 32, "layer whose first detector reads", "middle"))
    parts.append(_label(14, TOP + side / 2, "layer whose first response writes", "middle", turned=True))
    return _svg(LEFT + side + RIGHT, TOP + side + BOTTOM, "responses against later detectors", parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> dict[float, str]:
    """The texts of ticks, each with as many digits as tell neighbours apart. Steps of ticks have one digit."""
    gaps = [b - a for a, b in pairwise(values)]
    if not gaps or max(gaps) > 1.01 * min(gaps):  # one tick, or powers
        return {value: minus(f"{_clean(value):.3g}") for value in values}
    largest, step = max(map(abs, values)), math.floor(math.log10(min(gaps)) + 1e-9)
    if 1e-3 <= largest < 1e7:
        return {value: minus(f"{_clean(value):.{max(0, -step)}f}") for value in values}
    digits = math.floor(math.log10(largest) + 1e-9) - step
    return {v: minus(f"{v:.{digits}e}") if _clean(v, largest) else "0" for v in values}


def _axes(frame: _Frame, x_name: str, y_name: str, *, whole_x: bool = False) -> list[str]:
    """Grid lines with numbers, the frame, the names of the axes."""
    parts = []
    x_ticks = [t for t in ticks(*frame.x, count=8) if not whole_x or t == round(t)]
    room = (frame.width - frame.left - RIGHT) / max(1, len(x_ticks)) / CHARACTER - 1  # characters for each
    every = 2 if max(map(len, labels(x_ticks).values()), default=0) > room else 1
    for x, text in labels(x_ticks[::every]).items():
        parts.append(_line(frame.at_x(x), TOP, frame.at_x(x), frame.height - BOTTOM, "grid"))
        middle = min(frame.at_x(x), frame.width - CHARACTER * len(text) / 2)  # the last one ends where the drawing does
        parts.append(_label(middle, frame.height - BOTTOM + 17, text, "middle"))
    for y, text in frame.y_labels.items():
        parts.append(_line(frame.left, frame.at_y(y), frame.width - RIGHT, frame.at_y(y), "grid"))
        parts.append(_label(frame.left - 5, frame.at_y(y) + 4, text, "end"))
    parts.append(_box(frame, "frame"))
    parts.append(_label((frame.left + frame.width - RIGHT) / 2, frame.height - 6, x_name, "middle"))
    parts.append(_label(14, (TOP + frame.height - BOTTOM) / 2, y_name, "middle", turned=True))
    return parts


def _powers(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 times them where there are few, or plain ticks."""
    ends = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**power for power in ends for f in factors if low <= f * 10.0**power <= high]
        if len(found) >= 3:
            return found
    return [t for t in ticks(low, high) if t > 0]


def _clean(value: float, among: float = 1.0) -> float:
    """Zero where `value` is what rounding left of it."""
    return 0.0 if abs(value) < 1e-12 * among else value


def _dot(frame: _Frame, point: Point, colour: str, radius: float) -> str:
    return (
        f'<circle class="dot {colour}" cx="{frame.at_x(point.x):.1f}" cy="{frame.at_y(point.y):.1f}" r="{radius}">'
        f"<title>{escape(point.hint)}</title></circle>"
    )


def _box(frame: _Frame, kind: str) -> str:
    """The rectangle within the axes."""
    inner = f'width="{frame.width - frame.left - RIGHT:.1f}" height="{frame.height - TOP - BOTTOM}"'
    return f'<rect class="{kind}" x="{frame.left:.1f}" y="{TOP}" {inner}/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, text: str, anchor: str, *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _svg(width: int, height: int, name: str, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    size = f'viewBox="0 0 {width} {height}" style="max-width:{round(1.1 * width)}px"'
    return f'<svg {size} role="img" aria-label="{escape(name)}">\n{inside}\n</svg>'
