"""The losses over the steps as one SVG file that stands alone, for a page that shows it as a picture.

Takes the losses by name; gives the text of the file. Its colours follow the viewer's light or dark scheme.
"""

from collections.abc import Mapping, Sequence
from html import escape

from pipeline.plots import HEIGHT, TOP, WIDTH, Point, over_steps
from pipeline.publishing.facts import Loss

COLOURS = ("#2a6f97", "#c1440e", "#2d6a4f", "#7b2d8b", "#9a6700", "#5c5c5c")
MOST_POINTS = 1200  # of one line: more cannot be told apart
STYLE = """
text { font: 11px sans-serif; fill: #555 } .grid { stroke: #8884; } .frame { fill: none; stroke: #8888 }
.line { fill: none; stroke-width: 1.3 } @media (prefers-color-scheme: dark) { text { fill: #bbb } }
""".strip()


def loss_curve(training: Sequence[Loss], evaluation: Mapping[str, Sequence[Loss]]) -> str:
    """The file's text. Without any loss: a picture that says so."""
    series = {"training": thinned(training), **evaluation}
    points = {
        name: [Point(loss.step, loss.loss, f"{name}, step {loss.step}: {loss.loss:.4f}") for loss in losses]
        for name, losses in series.items()
        if losses
    }
    picture = over_steps(points, y_name="loss, nats a token")
    style = STYLE + "".join(f"\n.line.s{i} {{ stroke: {c} }} .dot.s{i} {{ fill: {c} }}" for i, c in enumerate(COLOURS))
    legend = "".join(
        f'<text x="{WIDTH - 24}" y="{TOP + 18 + 15 * i}" text-anchor="end" style="fill:{COLOURS[i % len(COLOURS)]}">'
        f"{escape(name)}</text>"
        for i, name in enumerate(points)
    )
    size = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
    return (
        picture.replace("<svg ", size, 1)
        .replace(">", f"><style>{style}</style>", 1)
        .replace("</svg>", f"{legend}\n</svg>\n")
    )


def thinned(losses: Sequence[Loss]) -> list[Loss]:
    """At most MOST_POINTS of `losses`: means over as many equal stretches, each at its last step."""
    width = -(-len(losses) // MOST_POINTS) or 1
    stretches = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [Loss(s[-1].step, sum(loss.loss for loss in s) / len(s)) for s in stretches]
