"""An inspection as one HTML page that needs nothing else: no script, no font, no picture, no address is fetched.

Takes an `Inspection`; gives the page as text, UTF-8, well-formed as XML too: page.html.j2, filled. Texts and names are escaped;
characters that have no place in HTML are shown as ·. Light or dark as the reader's system has it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from pipeline.families import MULTIPLICATIVE
from pipeline.inspection.page_plots import figures
from pipeline.inspection.passages import Passage, Text
from pipeline.inspection.reading import Direction, Inspection, Module
from pipeline.inspection.spectrum import effect, effective_rank, turn_degrees
from pipeline.inspection.tokens import printable
from pipeline.inspection.words import (
    MEANINGS,
    complex_number,
    determinant_in_words,
    effects_in_words,
    minus,
    number,
    percent,
    short_name,
)
from pipeline.pages import templates

OPEN_UP_TO = 3  # modules whose details stand open from the start; of more, the strongest's
PALEST = 0.15  # of a passage's peak: a token with less is not marked


class Piece(NamedTuple):
    """A token of a passage. `mark`: its classes, empty for one that is not marked. `share`: of the peak's |cos|, in percent."""

    text: str
    token: int
    mark: str
    share: float
    cos: float


def page(inspection: Inspection) -> str:
    """The whole page."""
    made = templates.environment(Path(__file__).parent, shown)
    label = inspection.label or str
    made.filters |= {"minus": minus, "label": label}
    return made.get_template("page.html.j2").render(
        name=inspection.name,
        kind=inspection.kind,
        multiplicative=inspection.kind == MULTIPLICATIVE,
        facts=list(_facts(inspection)),
        notes=inspection.notes,
        figures=figures(inspection),
        meanings=list(MEANINGS.items()),
        has_tokens=inspection.label is not None,
        has_text=inspection.text is not None,
        modules=[_module(inspection, module) for module in inspection.modules],
    )


def shown(value: object) -> object:
    """Text of any origin for the page: ends of lines kept, characters without a shape as ·."""
    return value if isinstance(value, Markup) else printable(str(value), kept="\n\t")


def _facts(inspection: Inspection) -> Iterator[str]:
    if inspection.base_model:
        yield f"trained on {inspection.base_model}"
    origins = list(dict.fromkeys(module.origin for module in inspection.modules))
    yield "; ".join(f"s = {origin}" for origin in origins[:4]) + ("; …" if len(origins) > 4 else "")
    if inspection.text is not None:
        text = inspection.text
        beginning = "" if text.whole else " (its beginning)"
        yield f"read in {text.name}, {len(text.pieces):,} tokens{beginning}, by the base model without the adapter"


def _module(inspection: Inspection, module: Module) -> dict[str, Any]:
    found = module.spectrum
    strongest = max(inspection.modules, key=lambda m: m.spectrum.norm)
    values = found.eigenvalues_R
    return {
        "name": module.name,
        "short": short_name(module.name),
        "opened": len(inspection.modules) <= OPEN_UP_TO or module is strongest,
        "scaling": number(module.scaling, 6),
        "norm": number(found.norm),
        "rank": f"{effective_rank(found.gains_K):.1f} / {len(found.gains_K)}",
        "determinant": determinant_in_words(found, inspection.kind),
        "overlap": number(found.subspace_overlap, 2),
        "fires": "–" if module.firing is None else percent(float(module.firing.share_K.max())),
        "effects": effects_in_words(found, inspection.kind),
        "directions": [_direction(inspection, module, direction) for direction in module.directions],
        "gains": [number(gain) for gain in found.gains_K.tolist()],
        "eigenvalues": None if values is None else [_eigenvalue(value, found.norm) for value in values.tolist()],
    }


def _direction(inspection: Inspection, module: Module, direction: Direction) -> dict[str, Any]:
    k, text, firing = direction.number, inspection.text, module.firing
    facts = [f"gain {number(direction.gain)}"]
    if direction.cos is not None:
        facts.append(f"cos(detector, response) {minus(number(direction.cos, 2))}")
    if firing is not None:
        mean, most = float(firing.mean_K[k]), float(firing.largest_K[k])
        facts.append(
            f"fires at {percent(float(firing.share_K[k]))} of tokens, strength {number(mean, 2)} in the mean, "
            f"{number(most, 2)} at most"
        )
    both = (("looks for", direction.detector), ("writes", direction.response))
    return {
        "number": k + 1,
        "facts": facts,
        "tokens": [(name, scores) for name, scores in both if scores],
        "passages": [_passage(text, module, k, one) for one in direction.passages] if text and firing else [],
    }


def _passage(text: Text, module: Module, k: int, passage: Passage) -> dict[str, Any]:
    """A stretch of the text; tokens are marked by |cos|, as a share of the peak's, in a colour by its sign."""
    assert module.firing is not None
    cosines = module.firing.cosines_TN[passage.begin : passage.end, k].tolist()
    peak = cosines[passage.peak - passage.begin]
    pieces = []
    for token, cosine in zip(range(passage.begin, passage.end), cosines, strict=True):
        share, piece = abs(cosine / peak), text.pieces[token]
        mark = ("plus" if cosine > 0 else "minus") + (" peak" if token == passage.peak else "")
        pieces.append(Piece(piece, token + 1, mark if share >= PALEST and piece else "", 100 * share, cosine))
    return {
        "token": passage.peak + 1,
        "cos": peak,
        "pieces": pieces,
        "before": "… " if passage.begin else "",
        "after": " …" if passage.end < len(text.pieces) else "",
    }


def _eigenvalue(value: complex, norm: float) -> dict[str, str]:
    """In words, and what it does to a direction, which is shown for a multiplicative adapter alone."""
    return {
        "words": complex_number(value),
        "length": number(abs(1 + value), 4),
        "turn": number(turn_degrees(value), 3),
        "what": str(effect(value, norm)),
    }
