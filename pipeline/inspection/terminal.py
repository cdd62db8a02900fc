"""An inspection as text for the terminal: a table of the modules, one of the leading directions, the passages of each.

Takes an `Inspection`; gives text at most `width` wide, without control characters. Nothing is printed here.
"""

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from pipeline.inspection.passages import Passage, Text
from pipeline.inspection.reading import Direction, Inspection, Module
from pipeline.inspection.spectrum import effective_rank
from pipeline.inspection.tokens import printable, visible
from pipeline.inspection.words import (
    determinant_in_words,
    effects_in_words,
    minus,
    number,
    percent,
    short_name,
    tokens_in_words,
)

WIDTH = 130
TOKENS_IN_A_CELL = 5
LEGEND = (
    "‖sBA‖₂: the most that s·B·A makes of a vector of length 1, the largest gain. rank: effective rank, exp of the entropy of "
    "the gains (Roy & Vetterli 2007), of the rank stored. det: det(I + sBA), 0 where something is erased. overlap: share of what "
    "it writes that lies where it reads. An eigenvalue λ of s·A·B multiplies its direction by 1 + λ: ×1.2 grows, ×0.8 shrinks, "
    "×0 is erased, ×−1 reflected, a complex pair turned; one that is kept is read or written without being scaled."
)
TOKEN_LEGEND = (
    "Per direction the tokens whose logits it raises (+) and lowers (−) most, through the last norm and the head. "
    "σ: the strongest's distance from the mean over the vocabulary, in standard deviations; {chance:.1f} is chance."
)


def describe(inspection: Inspection, *, width: int = WIDTH) -> str:
    """The whole inspection."""
    out = io.StringIO()
    console = Console(file=out, width=min(width, WIDTH), color_system=None, highlight=False, emoji=False, markup=False)
    modules = inspection.modules
    ranks = sorted({len(module.spectrum.gains_K) for module in modules})
    rank = " to ".join(map(str, {ranks[0], ranks[-1]}))
    console.print(
        f"{printable(inspection.name)}: {inspection.kind}, {len(modules)} modules, rank {rank}"
        + (f", trained on {printable(inspection.base_model)}" if inspection.base_model else "")
    )
    for origin in dict.fromkeys(module.origin for module in modules):
        console.print(f"s = {origin}")
    console.print()
    console.print(_modules_table(inspection))
    console.print(LEGEND)
    if inspection.label is not None and any(_points(d) for module in modules for d in module.directions):
        console.print()
        console.print(_directions_table(inspection))
        chance = next(s.chance for m in modules for d in m.directions for s in (d.response, d.detector) if s)
        console.print(TOKEN_LEGEND.format(chance=chance))
    if inspection.text is not None:
        _print_firing(console, inspection, inspection.text)
    for note in inspection.notes:
        console.print(f"note: {printable(note)}.")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _table(*columns: tuple[str, bool]) -> Table:
    """A table with these headings, numbers (True) to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, right in columns:
        table.add_column(Line(heading), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _modules_table(inspection: Inspection) -> Table:
    table = _table(
        ("layer, module", False),
        ("‖sBA‖₂", True),
        ("rank", True),
        ("gains", False),
        ("det", True),
        ("overlap", True),
        ("what it does", False),
    )
    for module in inspection.modules:
        found = module.spectrum
        gains = "  ".join(number(gain, 2) for gain in found.gains_K[:4].tolist())
        table.add_row(
            Line(printable(short_name(module.name))),
            number(found.norm),
            f"{effective_rank(found.gains_K):.1f}/{len(found.gains_K)}",
            Line(gains + (" …" if len(found.gains_K) > 4 else "")),
            determinant_in_words(found, inspection.kind),
            number(found.subspace_overlap, 2),
            Line(effects_in_words(found, inspection.kind)),
        )
    return table


def _points(direction: Direction) -> bool:
    return direction.detector is not None or direction.response is not None


def _directions_table(inspection: Inspection) -> Table:
    table = _table(
        ("layer, module", False),
        ("#", True),
        ("gain", True),
        ("cos", True),
        ("", False),
        ("σ", True),
        ("detector looks for", False),
        ("σ", True),
        ("response writes", False),
    )
    for module in inspection.modules:
        for direction in module.directions:
            if not _points(direction):
                continue
            sides = [_side(inspection, direction, at) for at in (0, 1)]
            name = printable(short_name(module.name)) if direction is module.directions[0] else ""
            number_gain = (str(direction.number + 1), number(direction.gain), minus(number(direction.cos, 2)))
            table.add_row(Line(name), *number_gain, "+", *sides[0])
            table.add_row("", "", "", "", "−", *sides[1])
    return table


def _side(inspection: Inspection, direction: Direction, at: int) -> list[str | Line]:
    """Cells for the tokens raised (0) or lowered (1): the detector's σ and tokens, the response's."""
    cells: list[str | Line] = []
    for scores in (direction.detector, direction.response):
        words = tokens_in_words(scores, inspection.label, TOKENS_IN_A_CELL)[at]
        ends = () if scores is None else (scores.raised, scores.lowered)[at]
        cells += [minus(f"{ends[0][1]:.1f}") if ends else "", Line(words)]
    return cells


def _print_firing(console: Console, inspection: Inspection, text: Text) -> None:
    whole = "" if text.whole else " (its beginning; --tokens reads more)"
    threshold = max(module.firing.threshold for module in inspection.modules if module.firing)
    console.print(f"\n{printable(text.name)}: {len(text.pieces):,} tokens{whole}, the base model without the adapter")
    console.print()
    table = _table(
        ("layer, module", False),
        ("#", True),
        ("gain", True),
        ("fires", True),
        ("mean", True),
        ("largest", True),
        ("where it fires most; the token in ⟦ ⟧", False),
    )
    for module in inspection.modules:
        for direction in module.directions:
            if module.firing is None:
                continue
            k = direction.number
            table.add_row(
                Line(printable(short_name(module.name)) if k == 0 else ""),
                str(k + 1),
                number(direction.gain),
                percent(float(module.firing.share_K[k])),
                number(float(module.firing.mean_K[k]), 2),
                number(float(module.firing.largest_K[k]), 2),
                Line(_passage(text, module, direction)),
            )
    console.print(table)
    console.print(
        f"fires: share of tokens with |cos(detector, h)| above 4/√D = {threshold:.3g}, h the module's output. mean, largest: of "
        "gain·|cos|, what the adapter adds at a token in lengths of h. The sign before a passage is that of the cosine."
    )


def _passage(text: Text, module: Module, direction: Direction) -> str:
    """The strongest passage on one line, its token in brackets."""
    if not direction.passages or module.firing is None:
        return ""
    passage: Passage = direction.passages[0]
    near = range(max(passage.begin, passage.peak - 7), min(passage.end, passage.peak + 6))
    pieces = [text.pieces[t] if t != passage.peak else f"⟦{text.pieces[t]}⟧" for t in near]
    sign = "+" if float(module.firing.cosines_TN[passage.peak, direction.number]) > 0 else "−"
    return f"{sign} {visible(''.join(pieces)).replace('␣', ' ')}"
