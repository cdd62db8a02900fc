"""An adapter's reading: its spectrum, the tokens its directions point to, and its firing in a text, module by module.

Takes an `Adapter`, and where they are given its base model, a tokenizer and a `Text`; gives an `Inspection`, which the
terminal and the page show. What cannot be known from what was given is None, with a line in `notes` that says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.console import UserError, progress
from pipeline.families import Kind
from pipeline.formats.base_model import Base
from pipeline.inspection.firing import Firing, fire
from pipeline.inspection.passages import Passage, Text, largest
from pipeline.inspection.spectrum import Spectrum, hand_overs, spectrum
from pipeline.inspection.tokens import Label, TokenScores, labels, lens, nearest_tokens, sides
from pipeline.names import layer_of

TOKENS_SHOWN = 8
PASSAGES_SHOWN = 3
NO_GAIN = 1e-7  # of the largest: what rounding to fp32 leaves of a gain of zero


@dataclass(frozen=True)
class Direction:
    """One of a module's leading pairs of detector and response; `number` counts from 0, by gain.

    cos: of the two, None where their spaces differ. detector, response: their tokens, None where they have none.
    passages: where it fires most, the first the strongest, with either sign; empty without a text.
    """

    number: int
    gain: float
    cos: float | None
    detector: TokenScores | None
    response: TokenScores | None
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Module:
    """One module's part of an adapter. `layer` is the first number in its name, None where there is none."""

    name: str
    layer: int | None
    scaling: float
    origin: str  # of the scaling
    spectrum: Spectrum
    firing: Firing | None
    directions: tuple[Direction, ...]


@dataclass(frozen=True)
class Inspection:
    """All that was read of an adapter. hand_overs_NN: see `spectrum.hand_overs`, modules in their order."""

    name: str
    kind: Kind
    base_model: str | None
    modules: tuple[Module, ...]
    hand_overs_NN: Tensor
    text: Text | None
    label: Label | None
    notes: tuple[str, ...]


def kind_without_base(adapter: Adapter, asked: Kind | None) -> Kind:
    """The kind of an adapter by its files and shapes alone. Raises UserError where they leave it open and `asked` too."""
    widths = {pair.A.shape[1] == pair.B.shape[0] for pair in adapter.pairs.values()}
    known: Kind | None = adapter.kind or ("lora" if False in widths else None)
    if asked is not None and known is not None and asked != known:
        raise UserError(f"--kind {asked}: {adapter.folder} is a {known} by its files and shapes.")
    found = known or asked
    if found is None:
        raise UserError(
            f"{adapter.folder} is of type LORA with matrices A as wide as its B are tall. That fits an ordinary LoRA on square "
            "weights as well as the founding method's multiplicative one: give the base with --input, or say which it is "
            "with --kind lora or --kind multiplicative_lora."
        )
    return found


def read(
    adapter: Adapter,
    kind: Kind,
    *,
    base: Base | None,
    tokenizer: Any,
    text: Text | None,
    directions: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Inspection:
    """Read `adapter`, the tokens and passages for its `directions` leading directions in each module.

    `tokenizer`: the base's, with `base`. `text` needs both; the base runs over it in `dtype` on `device`.
    Raises UserError where base and adapter do not fit, or an additive adapter is to be read in a text.
    """
    if text is not None and kind == "lora":
        raise UserError(
            "--text: an additive LoRA's detectors look at a module's input, which is not recorded; what is read in a text are "
            "multiplicative adapters, whose detectors look at the output. Leave --text out."
        )
    with progress("spectra", total=len(adapter.pairs)) as advance:
        spectra = {}
        for name, pair in adapter.pairs.items():
            spectra[name] = spectrum(pair.A, pair.B, pair.scaling)
            advance(1)
    label, pointed = None, Pointed({}, {})
    if base is not None:
        label = labels(tokenizer)
        pointed = _pointed(base, kind, spectra, directions, vocabulary=len(tokenizer))
    firings: Mapping[str, Firing] = {}
    if base is not None and text is not None:
        firings = fire(str(base.folder), text, spectra, kept=directions, device=device, dtype=dtype)
    modules = tuple(
        Module(
            name,
            layer_of(name),
            pair.scaling,
            pair.origin,
            spectra[name],
            firings.get(name),
            _directions(name, spectra[name], firings.get(name), pointed, directions),
        )
        for name, pair in adapter.pairs.items()
    )
    return Inspection(
        adapter.folder.resolve().name,
        kind,
        adapter.base_model,
        modules,
        hand_overs(list(spectra.values()), [module.layer for module in modules]),
        text,
        label,
        tuple(_notes(adapter, kind, modules, base)),
    )


@dataclass(frozen=True)
class Pointed:
    """The tokens of detectors and of responses, by (module, number of the direction)."""

    detectors: Mapping[tuple[str, int], TokenScores]
    responses: Mapping[tuple[str, int], TokenScores]


def _pointed(base: Base, kind: Kind, spectra: Mapping[str, Spectrum], directions: int, *, vocabulary: int) -> Pointed:
    """The tokens of every leading direction that lies in the residual stream, in one pass over the head."""
    wanted: list[tuple[bool, str, int]] = []
    vectors: list[Tensor] = []
    for name, found in spectra.items():
        reads, writes = sides(kind, name)
        for is_response, there, rows_KD in ((False, reads, found.detectors_KD), (True, writes, found.responses_KD)):
            if there:
                wanted += [(is_response, name, k) for k in range(_shown(found, directions))]
                vectors += list(rows_KD[: _shown(found, directions)])
    if not vectors:
        return Pointed({}, {})
    scores = nearest_tokens(lens(base), torch.stack(vectors), count=TOKENS_SHOWN, vocabulary=vocabulary)
    by_side: tuple[dict[tuple[str, int], TokenScores], ...] = ({}, {})
    for (is_response, name, k), score in zip(wanted, scores, strict=True):
        by_side[is_response][name, k] = score
    return Pointed(*by_side)


def _shown(found: Spectrum, directions: int) -> int:
    """How many of the leading directions have a gain at all, and not the rounding of one."""
    return int((found.gains_K[:directions] > NO_GAIN * found.norm).sum())


def _directions(
    name: str, found: Spectrum, firing: Firing | None, pointed: Pointed, directions: int
) -> tuple[Direction, ...]:
    overlaps = found.overlaps_K
    return tuple(
        Direction(
            k,
            float(found.gains_K[k]),
            None if overlaps is None else float(overlaps[k]),
            pointed.detectors.get((name, k)),
            pointed.responses.get((name, k)),
            _passages(firing, k),
        )
        for k in range(_shown(found, directions))
    )


def _passages(firing: Firing | None, number: int) -> tuple[Passage, ...]:
    """Where a detector fires most, whether or not it passes the threshold there; nothing where it is zero everywhere."""
    if firing is None:
        return ()
    return tuple(largest(firing.cosines_TN[:, number].abs(), PASSAGES_SHOWN, least=torch.finfo(torch.float32).tiny))


def _notes(adapter: Adapter, kind: Kind, modules: Sequence[Module], base: Base | None) -> list[str]:
    """What a reader should know about what is missing, and why."""
    notes = []
    idle = [module.name for module in modules if module.spectrum.norm == 0]
    if idle:
        notes.append(f"{len(idle)} of {len(modules)} modules do nothing: s·B·A is zero ({idle[0]} first)")
    if base is not None and not adapter.moves_bias and any(f"{module.name}.bias" in base.tensors for module in modules):
        notes.append(
            "this adapter leaves biases alone, but in a text its detectors are shown the whole output, bias included"
        )
    if adapter.full:
        shown = ", ".join(list(adapter.full)[:4]) + (" ..." if len(adapter.full) > 4 else "")
        notes.append(
            f"{len(adapter.full)} tensors were trained in full beside the pairs, and are not read here: {shown}"
        )
    if kind == "lora":
        notes.append(
            "an additive LoRA reads a module's input and writes to its output, so I + s·B·A does not map one space to "
            "itself: what its eigenvalues do to a direction is not reported"
        )
        if any(module.spectrum.eigenvalues_R is None for module in modules):
            notes.append(
                "where input and output have different widths there are gains alone, no eigenvalues and no overlap"
            )
    if base is not None and not all(all(sides(kind, module.name)) for module in modules):
        notes.append(
            "tokens are shown for directions of the residual stream alone: what is written by o_proj, down_proj and their like"
            + (", and read by q_proj, gate_proj and their like" if kind == "lora" else "")
        )
    return notes
