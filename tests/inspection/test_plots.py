"""The drawings themselves: neighbouring ticks differ, every label lies within the drawing, and none upon another.

Widths of text are those of DejaVu Sans, wider than most fonts, so that a label that fits here fits elsewhere.
"""

import math
import re
from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.inspection import plots
from pipeline.inspection.plots import Point

FONT = 12.0  # pixels, as the page's style has it
WIDE = {**dict.fromkeys("0123456789−+", 0.64), **dict.fromkeys(" .,", 0.33), **dict.fromkeys("il", 0.28)}


class Label(NamedTuple):
    """A text and the box it fills."""

    text: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Label") -> bool:
        apart = (
            self.right <= other.left or other.right <= self.left or self.bottom <= other.top or other.bottom <= self.top
        )
        return not apart


def drawn(svg: str) -> tuple[float, float, list[Label]]:
    """Width and height of a drawing, and its labels."""
    root = ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", svg))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = []
    for text in root.iter("text"):
        x, y, words = float(text.attrib["x"]), float(text.attrib["y"]), text.text or ""
        length = FONT * sum(WIDE.get(c, 0.6) for c in words)
        start = {"start": 0.0, "middle": -length / 2, "end": -length}[text.attrib["text-anchor"]]
        along, ends = (start, start + length), (-0.76 * FONT, 0.24 * FONT)
        if "rotate(-90" in text.attrib.get("transform", ""):  # upwards: what is along is −y, what is up is −x
            found.append(Label(words, x + ends[0], y - along[1], x + ends[1], y - along[0]))
        else:
            found.append(Label(words, x + along[0], y + ends[0], x + along[1], y + ends[1]))
    return width, height, found


def check(svg: str) -> list[Label]:
    """The labels of a drawing, each within it and none upon another."""
    width, height, found = drawn(svg)
    for label in found:
        assert label.left >= 0, label
        assert label.right <= width, label
        assert label.top >= 0, label
        assert label.bottom <= height, label
    for one, other in combinations(found, 2):
        assert not one.meets(other), (one, other)
    return found


def on_the_left(found: Sequence[Label]) -> list[str]:
    """The numbers of the y axis, from below."""
    numbers = [label for label in found if re.fullmatch(r"[−\d.e+]+", label.text)]
    edge = min(label.right for label in numbers)
    return [label.text for label in sorted(numbers, key=lambda n: -n.top) if abs(label.right - edge) < 0.1]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


@settings(deadline=None, max_examples=200)
@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.sampled_from([5, 8]))
@example(6.928, 0.007, 5)
def test_labels_are_their_ticks(low: float, width: float, count: int) -> None:
    """Each text reads back as its tick, nearer to it than to any other."""
    if width < 1e-9 * abs(low) + 1e-9:
        return
    values = plots.ticks(low, low + width, count)
    texts = plots.labels(values)
    step = min((b - a for a, b in pairwise(values)), default=abs(low) + width)
    assert len(set(texts.values())) == len(values)
    assert all(abs(number(text) - value) <= 0.01 * step + 1e-12 * abs(value) for value, text in texts.items() if step)


@pytest.mark.parametrize("modules", [2, 3, 5, 12, 40, 100])
@pytest.mark.parametrize("name", ["{} mlp.down_proj", "{} self_attn.o_proj", "a_module_outside_of_any_layer_{}"])
def test_the_overlap_table_names_its_axes_whole(modules: int, name: str) -> None:
    values = [[0.1 if j > i else math.nan for j in range(modules)] for i in range(modules)]
    words = [label.text for label in check(plots.shades(values, [name.format(i) for i in range(modules)]))]
    assert "layer whose first response writes" in words
    assert "layer whose first detector reads" in words


@pytest.mark.parametrize(
    "values", [[0.3 + 0.2j, -1.2], [60 + 0j, 0.3], [1e-5 + 2e-5j], [300j, -2], [-40 + 1j], [0j]], ids=str
)
@pytest.mark.parametrize("zoomed", [False, True])
def test_a_plane_s_labels_have_room(values: list[complex], zoomed: bool) -> None:
    check(plots.plane([(value, "rotates", "hint") for value in map(complex, values)], zoomed=zoomed))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1e-3, 1.003e-3), (1e-7, 3.0), (0.5, 0.50001), (2e-9, 3e-9), (123.0, 456.0)], ids=str
)
def test_figures_by_layer_have_room_for_their_numbers(sizes: tuple[float, float], log: bool) -> None:
    points = [Point(i, size, "hint") for i, size in enumerate(sizes)]
    numbers = on_the_left(check(plots.by_layer({"a": points}, y_name="effective rank", log=log, lines=True)))
    assert len(set(numbers)) == len(numbers) >= 3
