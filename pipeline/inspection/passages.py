"""A text as tokens that know their places in it, and the stretches in which a series over the tokens is largest.

Takes a text file and a tokenizer; gives a `Text`: the pieces of the text token by token, whose concatenation is the text,
and rows of ids for the model. Takes a value for every token; gives `Passage`s around the largest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.data.reading.document_rows import check_ids
from pipeline.data.reading.encodings import Findings, file_text

ROW_TOKENS = 1024  # the model sees no further back than this
CHARS_A_TOKEN = 16  # read at most this many characters a token asked for: few languages have longer tokens on average
RADIUS = 16  # tokens shown on either side of the one that fires


@dataclass(frozen=True)
class Text:
    """The first tokens of a text. pieces: what each token stands for. rows: [T] int64 each, `start` ids before the text's.

    whole: whether that is all of the text.
    """

    name: str
    pieces: tuple[str, ...]
    rows: tuple[Tensor, ...]
    start: int
    whole: bool


@dataclass(frozen=True)
class Passage:
    """Tokens [begin, end) of a text around the one at `peak`."""

    begin: int
    peak: int
    end: int


def read_text(
    file: Path, tokenizer: Any, *, limit: int, row_tokens: int = ROW_TOKENS, embedding_rows: int | None = None
) -> Text:
    """The first `limit` tokens of a text file, in rows of at most `row_tokens`, BOS before each where there is one.

    Raises UserError for no file, no text, no token, an id that is none of the model's `embedding_rows`, and a tokenizer
    that cannot say where its tokens lie in a text.
    """
    if not file.is_file():
        raise UserError(f"--text: there is no file {file}")
    if not tokenizer.is_fast:
        raise UserError(
            "--text: the model's tokenizer does not tell where a token lies in the text (it has no tokenizer.json)"
        )
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = row_tokens - len(start)
    if room < 1:
        raise ValueError(f"row_tokens = {row_tokens}")
    text, cut = _beginning(file, limit * CHARS_A_TOKEN)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoding = backend.encode(text, add_special_tokens=False)
    ids, pieces = encoding.ids[:limit], _pieces(text, [end for _, end in encoding.offsets])[:limit]
    if not ids:
        raise UserError(f"--text: {file} holds no text")
    rows = tuple(torch.tensor(start + ids[at : at + room], dtype=torch.int64) for at in range(0, len(ids), room))
    check_ids(rows, tokenizer, str(file), embedding_rows)
    return Text(file.name, tuple(pieces), rows, len(start), whole=not cut and len(encoding.ids) <= limit)


def _beginning(file: Path, chars: int) -> tuple[str, bool]:
    """At most `chars` characters of a file, and whether there are more."""
    text = ""
    for piece in file_text(file, Findings()):  # control characters too: they are only looked at
        text += piece
        if len(text) > chars:
            return text[:chars], True
    return text, False


def _pieces(text: str, ends: list[int]) -> list[str]:
    """The text cut at its tokens' ends. Of tokens that share a character the first has it; the rest are empty."""
    pieces, at = [], 0
    for end in ends:
        pieces.append(text[at : max(at, end)])
        at = max(at, end)
    if pieces:
        pieces[-1] += text[at:]  # blanks at the end that no token stands for
    return pieces


def largest(values_T: Tensor, count: int, *, least: float, radius: int = RADIUS) -> list[Passage]:
    """The `count` passages around the largest of `values_T`, none below `least`, that do not overlap; the largest first."""
    found: list[Passage] = []
    left = values_T.clone().float()
    while len(found) < count and len(left):
        peak = int(left.argmax())
        if not float(left[peak]) >= least:
            break
        begin, end = max(0, peak - radius), min(len(left), peak + radius + 1)
        found.append(Passage(begin, peak, end))
        left[max(0, peak - 2 * radius) : peak + 2 * radius + 1] = -torch.inf
    return found
