"""The drawings themselves: each mark stands where its numbers say, with its hint and the page's colour; no label is cut off."""

import math
import re
from itertools import pairwise
from unittest import mock
from xml.etree.ElementTree import Element, fromstring

import pytest

from pipeline.inspection import plots
from pipeline.inspection.plots import Point
from pipeline.pages import drawing


def marks(svg: str) -> dict[str, Element]:
    """Those that say something under the pointer, by what they say."""
    return {e.find("title").text or "": e for e in fromstring(svg).iter() if e.find("title") is not None}  # type: ignore[union-attr]


def place(mark: Element) -> tuple[float, float]:
    return float(mark.attrib["x"]), float(mark.attrib["y"])


def style(mark: Element) -> dict[str, str]:
    return dict(part.split(": ") for part in mark.attrib["style"].split("; "))


def affine(found: list[float], values: list[float]) -> bool:
    """Whether pixels are an affine map of values; coordinates have six digits after the point."""
    slope = (found[-1] - found[0]) / (values[-1] - values[0])
    return all(
        math.isclose(f, found[0] + slope * (v - values[0]), abs_tol=1e-4) for f, v in zip(found, values, strict=True)
    )


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("lines", [False, True])
def test_points_lie_where_their_numbers_say(log: bool, lines: bool) -> None:
    sizes = [0.5, 20.0, 3.0, 0.002]
    series = {"a": [Point(i, size, f"a {i}") for i, size in enumerate(sizes)], "b": [Point(9, 1.0, "b <&>")]}
    found = marks(plots.by_layer(series, y_name="gain", log=log, lines=lines))
    assert set(found) == {"a 0", "a 1", "a 2", "a 3", "b <&>"}
    every = [place(found[name]) for name in ("a 0", "a 1", "a 2", "a 3", "b <&>")]
    assert affine([x for x, _ in every], [0, 1, 2, 3, 9])
    assert affine([y for _, y in every], [math.log(v) if log else v for v in (*sizes, 1.0)])
    assert style(found["a 0"])["fill"] == "var(--c0)"
    assert style(found["b <&>"])["fill"] == "var(--c1)"


def test_what_is_zero_has_no_place_on_a_logarithmic_axis() -> None:
    points = [Point(0, 0.0, "zero"), Point(1, 1.0, "one")]
    assert set(marks(plots.by_layer({"a": points}, y_name="gain", log=True, lines=False))) == {"one"}
    assert "nothing to draw" in plots.by_layer({"a": points[:1]}, y_name="gain", log=True, lines=False)


def test_the_plane_has_equal_scales_and_each_effect_s_colour() -> None:
    values = [(0.3 + 0.2j, "rotates"), (0.3 - 0.2j, "rotates"), (-1.2 + 0j, "reverses"), (-0.4 + 0j, "damps")]
    found = marks(plots.plane([(value, what, f"m{i}") for i, (value, what) in enumerate(values)], zoomed=False))
    by_hint = {name.rsplit(" ", 1)[1]: mark for name, mark in found.items()}
    assert {name.split(" ")[-2].rstrip(".") for name in found} == {"rotates", "reverses", "damps"}
    (x0, y0), (x1, y1), (x2, _), _ = (place(by_hint[f"m{i}"]) for i in range(4))
    assert (x1 - x0, x0 - x2) == pytest.approx((0.0, (y1 - y0) / 0.4 * 1.5), abs=1e-4)
    for i, (_, what) in enumerate(values):
        assert style(by_hint[f"m{i}"])["fill"] == f"var(--{what})"


def test_shades_are_as_strong_as_their_values() -> None:
    values = [[math.nan, 0.05, 0.2], [math.nan, math.nan, 0.1], [math.nan] * 3]
    found = marks(plots.shades(values, ["0 a", "1 b", "2 c"]))
    strength = {
        name: float(style(mark).get("opacity") or style(mark).get("fill-opacity", 1)) for name, mark in found.items()
    }
    expected = {"0 a writes, 1 b": 0.25, "0 a writes, 2 c": 1.0, "1 b writes, 2 c": 0.5}
    for (name, part), value in zip(expected.items(), (0.05, 0.2, 0.1), strict=True):
        assert strength[f"{name} looks for: |cos| {value:.3f}"] == pytest.approx(part, abs=1e-6)
    assert len(found) == 3, "nan is left empty"


SIZES = [(1e-3, 1.003e-3), (1e-7, 3.0), (0.5, 0.50001), (2e-9, 3e-9), (123.0, 456.0)]
DRAWINGS = {
    **{
        f"sizes {sizes} {'log' if log else ''}": lambda s=sizes, log=log: plots.by_layer(
            {"a": [Point(i, size, "hint") for i, size in enumerate(s)]}, y_name="effective rank", log=log, lines=True
        )
        for sizes in SIZES
        for log in (False, True)
    },
    **{
        f"plane {values} {zoomed}": lambda v=values, z=zoomed: plots.plane(
            [(complex(x), "rotates", "") for x in v], zoomed=z
        )
        for values in ([0.3 + 0.2j, -1.2], [60, 0.3], [1e-5 + 2e-5j], [300j, -2], [-40 + 1j], [0j])
        for zoomed in (False, True)
    },
    **{
        f"{n} × {name}": lambda n=n, name=name: plots.shades(
            [[0.1 if j > i else math.nan for j in range(n)] for i in range(n)], [name.format(i) for i in range(n)]
        )
        for n in (2, 12, 100)
        for name in ("{} mlp.down_proj", "a_$module$_outside_{}")
    },
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=list(DRAWINGS))
def test_every_label_lies_within_the_drawing_and_neighbouring_numbers_differ(draw) -> None:
    with mock.patch.object(plots.drawing, "svg", wraps=drawing.svg) as called:
        svg = draw()
    figure = called.call_args.args[0]
    inches = figure.get_tightbbox()
    assert inches.x0 >= -0.01
    assert inches.y0 >= -0.01
    assert inches.x1 <= figure.get_figwidth() + 0.01
    assert inches.y1 <= figure.get_figheight() + 0.01
    (axes,) = figure.axes
    low, high = sorted(axes.get_ylim())
    numbers = [
        label.get_text()
        for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert len(numbers) >= 2
    assert all(one != other for one, other in pairwise(numbers) if "…" not in one)
    assert not re.search(r"https?:", svg)
