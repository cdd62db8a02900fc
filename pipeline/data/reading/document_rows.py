"""Takes documents and a tokenizer; gives rows of token ids that each belong to one document, for looking at a model.

Training's chunks run over the ends of documents and are cached; these rows do neither.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.console import UserError
from pipeline.data.reading import documents
from pipeline.data.reading.packed import ending
from pipeline.data.reading.sources import SUFFIXES
from pipeline.data.tokenizer import tokens
from pipeline.foreign import printable


def document_rows(
    tokenizer: Any, path: str, sequence_len: int, *, ends_only: bool = False, embedding_rows: int | None = None
) -> list[Tensor]:
    """Rows [T] int64, T ≤ `sequence_len`, of the documents in the file or glob `path` (text, or rows of a list).

    Each row is BOS, where the tokenizer has one, and a piece of one document; `ends_only`: one row a document, its end.
    A document without a token gives none. Raises UserError for no files, unreadable text, no token at all, a
    `sequence_len` that leaves no room for text, and an id that is none of the model's `embedding_rows`.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = sequence_len - len(start)
    if room < 1:
        raise UserError(f"sequence_len = {sequence_len} leaves no room for text; use {len(start) + 1} or more")
    dataset_type = "doclist" if ending(Path(path)) in SUFFIXES["doclist"] else "textfile"
    rows: list[Tensor] = []
    for ids in _whole(tokenizer, dataset_type, path):
        pieces = [ids[-room:]] if ends_only else [ids[at : at + room] for at in range(0, len(ids), room)]
        rows += [torch.tensor(start + piece, dtype=torch.int64) for piece in pieces if piece]
    check_ids(rows, tokenizer, path, embedding_rows)
    if not rows:
        raise UserError(f"'{path}' holds no text: its documents are empty")
    return rows


def check_ids(rows: Iterable[Tensor], tokenizer: Any, path: str, embedding_rows: int | None) -> None:
    """UserError if a row [T] holds an id that is none of the model's `embedding_rows` (None: not known)."""
    largest = max((int(row.max()) for row in rows), default=0)
    if embedding_rows is not None and largest >= embedding_rows:
        token = printable(tokenizer.convert_ids_to_tokens(largest))
        raise UserError(
            f"'{printable(path)}' holds the token '{token}' with the id {largest:,}, but the model's embedding has "
            f"{embedding_rows:,} rows: take such tokens out of the text"
        )


def _whole(tokenizer: Any, dataset_type: str, path: str) -> Iterator[list[int]]:
    """The ids of each document."""
    ids: list[int] = []
    for _, segment, last in tokens(tokenizer, documents.read(dataset_type, path)):
        ids += segment.tolist()
        if last:
            yield ids
            ids = []
