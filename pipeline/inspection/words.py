"""Numbers and eigenvalues of a reading in words. Takes a `Spectrum` and the like; gives short text for a table's cell."""

import math

from pipeline.families import Kind
from pipeline.inspection.spectrum import Effect, Spectrum, effects, turn_degrees
from pipeline.inspection.tokens import Label, TokenScores
from pipeline.names import layer_of, within_layer

# In the order in which a summary names them.
ORDER = (Effect.ERASES, Effect.REFLECTS, Effect.REVERSES, Effect.ROTATES, Effect.AMPLIFIES, Effect.DAMPS, Effect.KEEPS)

MEANINGS = {
    Effect.ERASES: "λ = −1: nothing of the direction is left",
    Effect.REFLECTS: "λ = −2: the direction changes its sign",
    Effect.REVERSES: "other λ < −1: it changes its sign and its length",
    Effect.ROTATES: "a complex pair: a plane is turned by arg(1 + λ) and stretched by |1 + λ|",
    Effect.AMPLIFIES: "λ > 0: the direction grows by 1 + λ",
    Effect.DAMPS: "−1 < λ < 0: it shrinks by 1 + λ",
    Effect.KEEPS: "λ = 0: it keeps its length; detector and response are at a right angle",
}


def effects_in_words(spectrum: Spectrum, kind: Kind) -> str:
    """'erases 1, rotates 4 (≤ 12°), amplifies 3 (≤ ×1.20)'; '–' where the effects mean nothing (additive) or are none."""
    found = effects(spectrum)
    if kind == "lora" or not found or spectrum.norm == 0:
        return "–"
    parts = []
    for which in ORDER:
        values = [value for value, what in found if what == which]
        if not values:
            continue
        extreme = ""
        if which == Effect.ROTATES:
            extreme = f" (≤ {max(turn_degrees(value) for value in values):.3g}°)"
        elif which in (Effect.AMPLIFIES, Effect.DAMPS, Effect.REVERSES):
            strongest = max(values, key=abs)
            extreme = minus(f" (×{1 + strongest.real:.3g})")
        parts.append(f"{which} {len(values)}{extreme}")
    return ", ".join(parts)


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; – where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share of 1 as a percentage with two digits after the point."""
    return f"{100 * share:.2f}%"


def determinant_in_words(spectrum: Spectrum, kind: Kind) -> str:
    """det(I + s·B·A), 0 where it is nothing but rounding; – where it means nothing (additive) or is none."""
    value = spectrum.determinant
    if value is None or kind == "lora":
        return "–"
    return minus(number(0.0 if abs(value) < 1e-6 else value, 4))


def complex_number(value: complex) -> str:
    """'−0.0123 ± 0.045i' for one of a pair, '−0.0123' for a real one."""
    if abs(value.imag) <= 1e-12 * abs(value):
        return minus(f"{value.real:.4g}")
    return minus(f"{value.real:.4g} {'+' if value.imag > 0 else '-'} {abs(value.imag):.4g}i")


def minus(text: str) -> str:
    """Hyphens as minus signs, for numbers."""
    return text.replace("e-", "e−").replace("-", "−")


def short_name(module: str) -> str:
    """A module's name without what all of them share: 'model.layers.3.mlp.down_proj' → '3 mlp.down_proj'."""
    layer = layer_of(module)
    return module if layer is None else f"{layer} {within_layer(module)}"


def tokens_in_words(scores: TokenScores | None, label: Label | None, count: int) -> tuple[str, str]:
    """(raised, lowered): the first `count` tokens of each side, separated by blanks."""
    if scores is None or label is None:
        return "", ""
    raised, lowered = ("  ".join(label(token) for token, _ in side[:count]) for side in (scores.raised, scores.lowered))
    return raised, lowered
