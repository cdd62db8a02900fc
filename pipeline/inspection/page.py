"""An inspection as one HTML page that needs nothing else: no script, no font, no picture, no address is fetched.

Takes an `Inspection`; gives the page as text, UTF-8, well-formed as XML too. Texts and names are escaped; characters that
have no place in HTML are shown as ·. Light or dark as the reader's system has it.
"""

from html import escape

from pipeline.families import MULTIPLICATIVE
from pipeline.inspection.page_plots import figures
from pipeline.inspection.page_style import STYLE
from pipeline.inspection.passages import Passage, Text
from pipeline.inspection.reading import Direction, Inspection, Module
from pipeline.inspection.spectrum import effect, effective_rank, turn_degrees
from pipeline.inspection.tokens import TokenScores, printable
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

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
OPEN_UP_TO = 3  # modules whose details stand open from the start; of more, the strongest's


def page(inspection: Inspection) -> str:
    """The whole page."""
    title = shown(inspection.name)
    body = [
        f"<h1>{title}</h1>",
        _facts(inspection),
        _notes(inspection),
        *figures(inspection),
        _meanings(inspection),
        _overview(inspection),
        "<h2>Module by module</h2>",
        *(_module(inspection, index) for index in range(len(inspection.modules))),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}"/>\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def shown(text: str) -> str:
    """Text of any origin for the page: escaped, ends of lines kept, characters without a shape as ·."""
    return escape(printable(text, kept="\n\t"))


def _facts(inspection: Inspection) -> str:
    kind = "h′ = h + s·B·A·h" if inspection.kind == MULTIPLICATIVE else "y′ = y + s·B·A·x"
    lines = [f"<b>{inspection.kind}</b>, {kind}, {len(inspection.modules)} modules"]
    if inspection.base_model:
        lines.append(f"trained on {shown(inspection.base_model)}")
    origins = list(dict.fromkeys(module.origin for module in inspection.modules))
    lines.append("; ".join(f"s = {shown(origin)}" for origin in origins[:4]) + ("; …" if len(origins) > 4 else ""))
    if inspection.text is not None:
        text = inspection.text
        lines.append(
            f"read in {shown(text.name)}, {len(text.pieces):,} tokens{'' if text.whole else ' (its beginning)'}, "
            "by the base model without the adapter"
        )
    return '<p class="facts">' + "<br/>\n".join(lines) + "</p>"


def _notes(inspection: Inspection) -> str:
    return "".join(f'<p class="note">Note: {shown(note)}.</p>\n' for note in inspection.notes)


def _meanings(inspection: Inspection) -> str:
    """What is shown, in words, with the formulas."""
    effects = "".join(
        f'<li><i class="key {what}"></i><b>{what}</b>: {escape(text)}</li>' for what, text in MEANINGS.items()
    )
    shares = ""
    if inspection.text is not None:
        shares = (
            "<p><b>Firing.</b> h is a module's output in the base model. A detector fires at a token where |cos(detector, h)| "
            "exceeds 4/√D, which a random direction does at one token of 16 000. The strength is gain·|cos|: what the adapter "
            "adds there, in lengths of h.</p>"
        )
    tokens = ""
    if inspection.label is not None:
        tokens = (
            "<p><b>Tokens.</b> A direction of the residual stream raises the logits of some tokens and lowers those of others, "
            "through the last norm and the head. σ is a token's distance from the mean over the vocabulary, in standard "
            "deviations. What stands out no further than chance says nothing.</p>"
        )
    effects = (
        f"<p><b>Eigenvalues</b> λ of s·A·B: each multiplies its direction by 1 + λ.</p><ul>{effects}</ul>"
        if inspection.kind == MULTIPLICATIVE
        else ""
    )
    return (
        "<details><summary>What the words mean</summary><p><b>Directions.</b> s·B·A = Σ gain · response · detectorᵀ, the "
        "singular value decomposition: where the detector finds something, gain times as much is written along the response. "
        "Their common sign is free. cos is the angle between the two: ±1 where a direction is scaled, 0 where one is written "
        "for another. ‖sBA‖₂ is the largest gain; the effective rank is exp of the entropy of the gains (Roy &amp; Vetterli "
        "2007). The overlap is the share of what is written that lies where it is read.</p>"
        f"{effects}{tokens}{shares}</details>"
    )


def _overview(inspection: Inspection) -> str:
    """The table of the modules, each with a link to its details below."""
    rows = []
    for index, module in enumerate(inspection.modules):
        found = module.spectrum
        fires = "–" if module.firing is None else percent(float(module.firing.share_K.max()))
        cells = [
            f'<td class="left"><a href="#m{index}">{shown(short_name(module.name))}</a></td>',
            f"<td>{number(found.norm)}</td>",
            f"<td>{effective_rank(found.gains_K):.1f} / {len(found.gains_K)}</td>",
            f"<td>{determinant_in_words(found, inspection.kind)}</td>",
            f"<td>{number(found.subspace_overlap, 2)}</td>",
            *([f"<td>{fires}</td>"] if inspection.text is not None else []),
            f'<td class="left">{effects_in_words(found, inspection.kind)}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    fires_head = "<th>fires at most</th>" if inspection.text is not None else ""
    return (
        '<h2>Modules</h2><div class="wide"><table><thead><tr><th class="left">layer, module</th><th>‖sBA‖₂</th>'
        f'<th>effective rank</th><th>det(I + sBA)</th><th>overlap</th>{fires_head}<th class="left">what it does</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _module(inspection: Inspection, index: int) -> str:
    module = inspection.modules[index]
    words = effects_in_words(module.spectrum, inspection.kind)
    facts = f"‖sBA‖₂ {number(module.spectrum.norm)}" + ("" if words == "–" else f" · {words}")
    summary = f"{shown(short_name(module.name))}<span>{facts}</span>"
    strongest = max(inspection.modules, key=lambda m: m.spectrum.norm)
    opened = ' open="open"' if len(inspection.modules) <= OPEN_UP_TO or module is strongest else ""
    parts = [_direction(inspection, module, direction) for direction in module.directions]
    return (
        f'<details class="module" id="m{index}"{opened}><summary>{summary}</summary>'
        f'<p class="facts">{shown(module.name)}, s = {number(module.scaling, 6)}</p>'
        + "".join(parts)
        + _gains(module)
        + _eigenvalues(inspection, module)
        + "</details>"
    )


def _direction(inspection: Inspection, module: Module, direction: Direction) -> str:
    k = direction.number
    facts = [f"gain {number(direction.gain)}"]
    if direction.cos is not None:
        facts.append(f"cos(detector, response) {minus(number(direction.cos, 2))}")
    if module.firing is not None:
        mean, most = float(module.firing.mean_K[k]), float(module.firing.largest_K[k])
        facts.append(
            f"fires at {percent(float(module.firing.share_K[k]))} of tokens, strength {number(mean, 2)} in the mean, "
            f"{number(most, 2)} at most"
        )
    parts = [f"<h3>Direction {k + 1}<span>{', '.join(facts)}</span></h3>"]
    both = (("looks for", direction.detector), ("writes", direction.response))
    parts += [_tokens(inspection, name, scores) for name, scores in both if scores]
    if inspection.text is not None and module.firing is not None:
        parts += [_passage(inspection.text, module, k, passage) for passage in direction.passages]
    return '<section class="direction">' + "".join(parts) + "</section>"


def _tokens(inspection: Inspection, name: str, scores: TokenScores) -> str:
    """Two lines of tokens, raised and lowered; what stands out no further than chance is pale."""
    lines = []
    for sign, ends in (("+", scores.raised), ("−", scores.lowered)):
        chips = " ".join(_token(inspection, token, z, scores.chance) for token, z in ends)
        lines.append(
            f'<tr><th class="left">{name if sign == "+" else ""}</th><td>{sign}</td><td class="left">{chips}</td></tr>'
        )
    return f'<table class="tokens">{"".join(lines)}</table>'


def _token(inspection: Inspection, token: int, z: float, chance: float) -> str:
    kind, hint = "pale" if abs(z) <= chance else "clear", minus(f"{z:.2f} σ; chance {chance:.1f}")
    word = inspection.label(token) if inspection.label else str(token)
    return f'<code class="{kind}" title="{hint}">{shown(word)}</code>'


def _passage(text: Text, module: Module, number_: int, passage: Passage) -> str:
    """A stretch of the text; tokens are marked by |cos|, as a share of the peak's, in a colour by its sign."""
    assert module.firing is not None
    cosines = module.firing.cosines_TN[passage.begin : passage.end, number_].tolist()
    peak = cosines[passage.peak - passage.begin]
    parts = []
    for token, cosine in zip(range(passage.begin, passage.end), cosines, strict=True):
        share = abs(cosine / peak)
        piece = shown(text.pieces[token])
        if share < 0.15 or not piece:
            parts.append(piece)
            continue
        kind = ("plus" if cosine > 0 else "minus") + (" peak" if token == passage.peak else "")
        hint = f"token {token + 1:,}: cos {minus(f'{cosine:.3f}')}"
        parts.append(f'<mark class="{kind}" style="--share:{100 * share:.0f}%" title="{hint}">{piece}</mark>')
    before, after = "… " if passage.begin else "", " …" if passage.end < len(text.pieces) else ""
    label = f'<span class="where">token {passage.peak + 1:,}, cos {minus(f"{peak:.3f}")}</span>'
    return f'<blockquote>{label}<span class="text">{before}{"".join(parts)}{after}</span></blockquote>'


def _gains(module: Module) -> str:
    gains = ", ".join(number(gain) for gain in module.spectrum.gains_K.tolist())
    return f'<details class="inner"><summary>all gains</summary><p class="facts">{gains}</p></details>'


def _eigenvalues(inspection: Inspection, module: Module) -> str:
    """All eigenvalues; what they do to a direction for a multiplicative adapter alone."""
    values = module.spectrum.eigenvalues_R
    if values is None:
        return ""
    told = inspection.kind == MULTIPLICATIVE
    rows = []
    for value in values.tolist():
        more = ""
        if told:
            what = effect(value, module.spectrum.norm)
            more = (
                f"<td>{number(abs(1 + value), 4)}</td><td>{number(turn_degrees(value), 3)}°</td>"
                f'<td class="left"><i class="key {what}"></i>{what}</td>'
            )
        rows.append(f"<tr><td>{complex_number(value)}</td>{more}</tr>")
    heads = '<th>|1 + λ|</th><th>turn</th><th class="left">what it does</th>' if told else ""
    return (
        f'<details class="inner"><summary>all eigenvalues</summary><table><thead><tr><th>λ</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></details>"
    )
