"""Takes rows' texts and a tokenizer; gives token ids and the runs of them that are trained.

A row is encoded whole. Its ids up to a turn must be those of the turn's prompt alone, as a server has them: where a token
straddles the two (a *border*), a byte-level tokenizer encodes prompt and reply apart, in a row of their own; any other
leaves the straddling token untrained, since pieces would decode to another text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.console import UserError
from pipeline.data.chat.turns import RowText, Turn

Span = tuple[int, int]


class Encoded(NamedTuple):
    """Ids of a row, the runs (start, end) of its targets, where each run's end of turn begins, whether it is a border row."""

    ids: list[int]
    spans: list[Span]
    ends: list[int]
    turns: tuple[Turn, ...]
    border: bool = False


class Text(NamedTuple):
    """A text's ids, and for each the place of its first character."""

    ids: list[int]
    starts: list[int]


Encode = Callable[[Sequence[str]], list[Text]]


@dataclass(frozen=True)
class Encoder:
    """Encodes texts as they stand, without adding a token. `in_pieces`: pieces of a text decode to the text."""

    backend: Any
    in_pieces: bool

    def __call__(self, texts: Sequence[str]) -> list[Text]:
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [Text(e.ids, [start for start, _ in e.offsets]) for e in encoded]


def encoder(tokenizer: Any) -> Encoder:
    """UserError for a tokenizer without a fast form, which gives no offsets."""
    if not tokenizer.is_fast:
        raise UserError(
            f"chat and completion data need a tokenizer with a fast form, which says where in a text a token is; "
            f"{type(tokenizer).__name__} has none: put its tokenizer.json into the model's folder"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return Encoder(backend, _decodes_pieces(backend))


def _decodes_pieces(backend: Any) -> bool:
    """Whether the tokenizer is byte-level and adds nothing to a piece that begins with a word."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return False
    pieces = [backend.encode(text, add_special_tokens=False).ids for text in ("on", "ward\n", "\n on")]
    return bool(backend.decode([id for piece in pieces for id in piece]) == "onward\n\n on")


def encode(conversations: Sequence[Sequence[RowText]], encoder: Encoder) -> list[list[Encoded]]:
    """Ids and targets of each conversation's rows; a turn at a border may come in a row of its own, after the others."""
    texts = [text for rows in conversations for row in rows for text in (row.text, *(t.prompt for t in row.turns))]
    found, place = encoder(texts), 0
    done: list[list[Encoded]] = []
    for rows in conversations:
        done.append([])
        for row in rows:
            whole, prompts = found[place], found[place + 1 : place + 1 + len(row.turns)]
            place += 1 + len(row.turns)
            done[-1] += _row(row, whole, prompts, encoder)
    return done


def _row(row: RowText, whole: Text, prompts: Sequence[Text], encoder: Encoder) -> list[Encoded]:
    """One row, or more where its turns are at borders."""
    clean = [whole.ids[: len(prompt.ids)] == prompt.ids for prompt in prompts]
    if all(clean) or not encoder.in_pieces:
        begins = [
            len(prompt.ids) if fits else _first_from(whole, len(turn.prompt))
            for turn, prompt, fits in zip(row.turns, prompts, clean, strict=True)
        ]
        return [_marked(row.turns, whole, begins, border=not all(clean))]
    inside = [turn for turn, fits in zip(row.turns, clean, strict=True) if fits]
    rows = encode([[RowText(tuple(inside))]], encoder)[0] if inside else []
    apart = [(turn, prompt) for turn, prompt, fits in zip(row.turns, prompts, clean, strict=True) if not fits]
    replies = encoder([turn.reply for turn, _ in apart])
    for (turn, prompt), reply in zip(apart, replies, strict=True):
        starts = [*prompt.starts, *(len(turn.prompt) + start for start in reply.starts)]
        rows.append(_marked((turn,), Text(prompt.ids + reply.ids, starts), [len(prompt.ids)], border=True))
    return rows


def _marked(turns: tuple[Turn, ...], text: Text, begins: list[int], *, border: bool) -> Encoded:
    spans, ends = [], []
    for turn, begin in zip(turns, begins, strict=True):
        last = len(turn.prompt) + len(turn.reply)
        end = max(begin, _first_from(text, last))
        spans.append((begin, end))
        ends.append(max(begin, min(end, _first_from(text, last - turn.end))))
    return Encoded(text.ids, spans, ends, turns, border)


def _first_from(text: Text, place: int) -> int:
    """The first token whose characters begin at `place` or after it."""
    low, high = 0, len(text.starts)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if text.starts[middle] < place else (low, middle)
    return low


def joined(spans: Sequence[Span]) -> list[Span]:
    """Runs without the empty ones, in order; those that touch are one."""
    runs: list[Span] = []
    for start, end in spans:
        if start < end:
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
    return runs
