"""Matplotlib's figures as elements of a page, and as files.

Takes figures drawn in STYLE; gives SVG whose text and axes have the colour of the text around them, so that a page can be light
or dark, and PNG on white paper. Needs no display.
"""

import io
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from pipeline.foreign import printable

WIDTH, HEIGHT, DPI = 5.0, 2.8, 160  # inches: on a phone, 340 pixels wide, text of 9 points is legible
INK = "#010203"  # stands for the colour of the text around the picture
PAPER = "#ffffff"
COLOURS = ("#2a7fbf", "#d0622a", "#3a9a63", "#9a5cc0", "#b58a2f", "#7d8794")
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "path.simplify": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def svg(figure: Figure, name: str, label: str, colours: Mapping[str, str] | None = None) -> str:
    """The picture as an element of a page, well-formed without namespaces.

    `name` is its class and begins every id, so that they differ from those of other pictures there. `label`: what is drawn, for
    those who do not see it. `colours`: by a colour that the figure was drawn in, the one that takes its place in the page.
    """
    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=NO_METADATA)
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for drawn, shown in {INK: "currentColor", **(colours or {})}.items():
        text = text.replace(drawn, shown)
    return text.replace("<svg", f'<svg class="{name}" role="img" aria-label="{escape(label)}"', 1)


def alone(svg: str) -> bytes:
    """A picture as a file: dark on light or light on dark, as the viewer has it."""
    scheme = "<style>svg { color: #222 } @media (prefers-color-scheme: dark) { svg { color: #ddd } }</style>"
    return svg.replace("<svg", f"<svg {NAMESPACE}", 1).replace(">", f">{scheme}", 1).encode()


def png(figure: Figure) -> bytes:
    """The picture on white paper."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="png", dpi=DPI, facecolor=PAPER)
    return out.getvalue()


def shown(name: str) -> str:
    """A name as matplotlib draws it: a dollar sign would begin a formula, and `_` at its beginning hides it from a legend."""
    return printable(name, 60).replace("$", r"\$").removeprefix("_")
