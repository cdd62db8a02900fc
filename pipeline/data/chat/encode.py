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
    """Encodes texts as they stand, without adding a token. `in_pieces`: pieces of a text decode to the text.

    `special`: ids of tokens at which every text is cut before it is encoded.
    """

    backend: Any
    in_pieces: bool
    special: frozenset[int] = frozenset()

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
    added = backend.get_added_tokens_decoder().items()
    cuts = (id for id, token in added if token.special and not token.normalized and not token.single_word)
    return Encoder(backend, _decodes_pieces(backend), frozenset(cuts))


def _decodes_pieces(backend: Any) -> bool:
    """Whether the tokenizer is byte-level and adds nothing to a piece that begins with a word."""
    if type(backend.decoder).__name__ != "ByteLevel":
        return False
    pieces = [backend.encode(text, add_special_tokens=False).ids for text in ("on", "ward\n", "\n on")]
    return bool(backend.decode([id for piece in pieces for id in piece]) == "onward\n\n on")


def encode(conversations: Sequence[Sequence[RowText]], encoder: Encoder) -> list[list[Encoded]]:
    """Ids and targets of each conversation's rows; a turn at a border may come in a row of its own, after the others."""
    wholes = encoder([row.text for rows in conversations for row in rows])
    prompts = iter(_prompts([row for rows in conversations for row in rows], wholes, encoder))
    found = iter(wholes)
    return [[e for row in rows for e in _row(row, next(found), next(prompts), encoder)] for rows in conversations]


def _prompts(rows: Sequence[RowText], wholes: Sequence[Text], encoder: Encoder) -> list[list[Text]]:
    """Each row's turns' prompts, encoded as if alone.

    A special token cuts a text before it is encoded, so that of a byte-level tokenizer's prompt only what follows its last
    one has to be encoded: a header, mostly the same one. What comes before is in the row already.
    """
    kept = [
        [_kept(whole, len(turn.prompt), encoder) for turn in row.turns] for row, whole in zip(rows, wholes, strict=True)
    ]
    tails = [
        [turn.prompt[whole.starts[count] if count else 0 :] for turn, count in zip(row.turns, counts, strict=True)]
        for row, whole, counts in zip(rows, wholes, kept, strict=True)
    ]
    different = list(dict.fromkeys(tail for of_row in tails for tail in of_row))
    encoded = dict(zip(different, encoder(different), strict=True))
    return [
        [_joined(whole, count, encoded[tail]) for count, tail in zip(counts, of_row, strict=True)]
        for whole, counts, of_row in zip(wholes, kept, tails, strict=True)
    ]


def _kept(whole: Text, length: int, encoder: Encoder) -> int:
    """How many tokens of a row those of its first `length` characters alone begin with; a special token follows them."""
    if encoder.in_pieces:
        for place in range(min(_first_from(whole, length), len(whole.ids) - 1) - 1, 0, -1):
            if whole.ids[place] in encoder.special and whole.starts[place + 1] <= length:
                return place
    return 0


def _joined(whole: Text, count: int, tail: Text) -> Text:
    """The row's first `count` tokens and what follows them in a prompt."""
    begin = whole.starts[count] if count else 0
    return Text(whole.ids[:count] + tail.ids, whole.starts[:count] + [begin + start for start in tail.starts])


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
