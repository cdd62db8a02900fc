"""Loads a model's tokenizer, and encodes documents: exactly as if each were encoded whole, in bounded memory.

A long document is cut where the encoding of the left part followed by that of the right part is the encoding of both
together. That is checked, not assumed: the text around each cut is encoded whole and in two. The cuts tried are places
where words are whole on both sides, so that what lies beyond the window does not change what happens at the cut. Where
no place passes, the search goes on in the text that follows, in the worst case to its end: then it is encoded whole.
No special tokens are added here; BOS and EOS are the chunks' business.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from pipeline.console import UserError, log_if_slow
from pipeline.data.preparing.workers import in_order
from pipeline.data.reading.documents import Document
from pipeline.foreign import read_by_library

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")

SEGMENT_CHARS = 2**17  # encoded at once; about 20 MB while it is
WINDOW_CHARS = 2**11  # on each side of a cut
BATCH_CHARS = 2**21  # encoded together, in parallel where there are cores
BATCH_SEGMENTS = 4096
SEAMS_TRIED = 16  # of each kind, in one stretch of text

Encode = Callable[[list[str]], list[list[int]]]

# Where words are whole on both sides. Runs of blanks are short, so that a run never reaches over the window.
_LINE_START = re.compile(r"(?<!\s)\s{0,3}\n(?=\S)")
_SPACE = re.compile(r"(?<=\S) (?=\S)")
_WORD_EDGE = re.compile(r"(?<=[^\W\d_])(?=[^\w\s])|(?<=[^\w\s])(?=[^\W\d_])")


@log_if_slow("starting: reading the tokenizer")
def load(folder: str) -> Any:
    """The tokenizer in a model's `folder`, by transformers; UserError if there is none or it cannot be read."""
    if not any((Path(folder) / name).is_file() for name in FILES):
        raise UserError(f"model = '{folder}': there is no tokenizer in it (none of {', '.join(FILES)})")
    with read_by_library(f"model = '{folder}': cannot read its tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def tokens(
    tokenizer: Any, documents: Iterable[Document], processes: int = 1
) -> Iterator[tuple[str, NDArray[np.int32], bool]]:
    """(document's name, ids of its next segment int32, whether it is its last) for all documents, in order.

    An empty document gives one empty segment. Segments of many documents are encoded together, in several `processes`.
    """
    encode = encoder(tokenizer)
    for encoded in in_order(partial(_encoded, encode), _batches(encode, documents), processes):
        yield from encoded


def _batches(encode: Encode, documents: Iterable[Document]) -> Iterator[list[tuple[str, str, bool]]]:
    """(document's name, a segment, whether it is its last), as many as are encoded together."""
    batch: list[tuple[str, str, bool]] = []
    size = 0
    for document in documents:
        for text, last in _with_last(segments(encode, document.pieces())):
            batch.append((document.name, text, last))
            size += len(text)
            if size >= BATCH_CHARS or len(batch) >= BATCH_SEGMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def encoder(tokenizer: Any) -> Encode:
    """A function from texts to ids without special tokens, padding or truncation, for any transformers tokenizer."""
    if not tokenizer.is_fast:
        return lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    # encode_batch_fast leaves out offsets and strings: half the time and a fraction of the memory of the usual call.
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides a text's ids: the serialised tokenizer (or its vocabulary) and the BOS and EOS ids."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content["truncation"] = content["padding"] = None  # the last call's, of no meaning here
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = [content, tokenizer.bos_token_id, tokenizer.eos_token_id, bool(tokenizer.split_special_tokens)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def segments(
    encode: Encode, pieces: Iterable[str], segment_chars: int = SEGMENT_CHARS, window_chars: int = WINDOW_CHARS
) -> Iterator[str]:
    """Texts whose encodings, one after the other, are the encoding of all `pieces` joined. At least one, if empty.

    Joined they give the text back, but for single spaces at cuts that the tokenizer itself puts before a text.
    """
    text, limit = "", segment_chars
    for piece in pieces:
        text += piece
        while len(text) >= limit + window_chars:
            seam = _seam(encode, text, limit - segment_chars // 2, limit, window_chars)
            if seam is None:
                limit += segment_chars // 2  # look on in what comes after
                continue
            end, start = seam
            yield text[:end]
            text, limit = text[start:], segment_chars
    yield text


def _seam(encode: Encode, text: str, low: int, high: int, window_chars: int) -> tuple[int, int] | None:
    """(end of left, start of right) of a place from `low` to `high` where cutting changes no token, if one is found."""
    for end, start in _places(text, low, high):
        left, right = text[max(0, end - window_chars) : end], text[start : start + window_chars]
        ids_whole, ids_left, ids_right = encode([left + text[end:start] + right, left, right])
        if ids_left + ids_right == ids_whole:
            return end, start
    return None


def _places(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Places to try, the likeliest kind first. A pair of different numbers leaves out the space between: tokenizers
    that put a space before every text (SentencePiece's) would otherwise see two."""
    lines = [match.end() for match in _LINE_START.finditer(text, low, high)][-SEAMS_TRIED:]
    yield from ((place, place) for place in reversed(lines))
    spaces = [match.start() for match in _SPACE.finditer(text, low, high)][-SEAMS_TRIED:]
    for place in reversed(spaces):
        yield from ((place, place), (place, place + 1), (place + 1, place + 1))
    edges = [match.start() for match in _WORD_EDGE.finditer(text, low, high)][-SEAMS_TRIED:]
    yield from ((place, place) for place in reversed(edges))


def _with_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each text with whether it is the last; there must be one."""
    held = next(texts)
    for text in texts:
        yield held, False
        held = text
    yield held, True


def _encoded(encode: Encode, batch: list[tuple[str, str, bool]]) -> list[tuple[str, NDArray[np.int32], bool]]:
    ids = encode([text for _, text, _ in batch])
    return [(name, np.asarray(row, dtype=np.int32), last) for (name, _, last), row in zip(batch, ids, strict=True)]
