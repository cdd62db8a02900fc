"""Takes the micro-batches of a run and the tokenizer; gives the first rows as text, with all boundaries and targets marked.

Marks stand in ⟦ ⟧: BOS, EOS, where a document begins (its name) or goes on from an earlier chunk (… before the name),
and padding. Of a row that is trained in part, targets stand between « and ». The ids shown are those of the tensors a run
would train on, in its order.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batches import MicroBatches, Position
from pipeline.data.row_store import RowId, RowStore
from pipeline.data.streaming.batches import StreamedBatches


class Piece(NamedTuple):
    """A stretch of a row as it is shown: `kind` says what it is, `trained` whether it is a target (None: where all are)."""

    text: str
    kind: Literal["heading", "text", "special", "border"]
    trained: bool | None = None


def preview(batches: MicroBatches | StreamedBatches, tokenizer: Any, count: int) -> list[str]:
    """Lines of text showing the first `count` rows (or as many as there are) of this rank's first epoch."""
    return [line for row in rows(batches, tokenizer, count) for line in as_lines(row)]


def rows(batches: MicroBatches | StreamedBatches, tokenizer: Any, count: int) -> Iterator[list[Piece]]:
    """The first `count` rows (or as many as there are) of this rank's first epoch, each in pieces, its heading first."""
    position, shown = Position(), 0
    while position.epoch == 0:
        micro_batches, info = batches.step(position)
        for batch in micro_batches:
            for place, row in enumerate(batch.rows):
                if row is None:
                    continue
                if shown == count:
                    return
                shown += 1
                for slot, store in enumerate(batches.stores[row[0]].slots):
                    ids = batch.input_ids[slot * len(batch.rows) + place].numpy()
                    yield _row(store, row, ids, tokenizer, shown)
        position = info.next_position


def as_lines(row: list[Piece]) -> list[str]:
    """A row's heading, its text with marks, and an empty line."""
    heading, *pieces = row
    text, inside = "", False
    for piece in pieces:
        if bool(piece.trained) != inside:
            inside = not inside
            text += "«" if inside else "»"
        text += piece.text
    return [heading.text, "─" * len(heading.text), *(text + "»" * inside).split("\n"), ""]


def _row(store: RowStore, row: RowId, ids: NDArray[np.int64], tokenizer: Any, number: int) -> list[Piece]:
    documents, length, targets = store.documents(row[1]), int(store.lengths[row[1]]), int(store.targets[row[1]])
    padding = len(ids) - documents[-1].end
    heading = (
        f"row {number}: no. {row[1]:,} of '{store.name}', {length:,} tokens, "
        f"{targets:,} of them predicted, {padding:,} padding, documents: {len(documents):,}"
    )
    trained: NDArray[np.bool_] | None = None
    if (spans := store.spans(row[1])) != [(1, length)]:
        trained = np.zeros(length, bool)
        for start, end in spans:
            trained[start:end] = True
    pieces = [Piece(heading, "heading")]
    first = documents[0].start
    pieces += [
        Piece(f"⟦BOS {tokenizer.decode([int(id)])}⟧", "special", None if trained is None else False)
        for id in ids[:first]
    ]
    for document in documents:
        name = f"⟦{'… ' if document.continued else ''}{document.name}⟧"
        pieces.append(Piece(name, "border"))
        pieces += _marked(ids, document.start, document.end, trained, store, tokenizer)
    if padding:
        pieces.append(Piece(f"⟦{padding:,} × padding⟧", "border"))
    return pieces


def _marked(
    ids: NDArray[np.int64], start: int, end: int, trained: NDArray[np.bool_] | None, store: RowStore, tokenizer: Any
) -> Iterator[Piece]:
    """The text from `start` to `end`, EOS (and BOS, if a document spells it out) marked wherever they stand."""
    marks = {store.bos: "BOS", store.eos: "EOS"}
    special = np.array(tokenizer.all_special_ids)

    def kind(place: int) -> tuple[int | None, bool, bool | None]:
        id = int(ids[place])
        mark = id if id in marks else None
        return mark, bool(np.isin(id, special)), None if trained is None else bool(trained[place])

    for (mark, is_special, target), places in itertools.groupby(range(start, end), kind):
        run = list(places)
        if mark is None:
            yield Piece(tokenizer.decode(ids[run].tolist()), "special" if is_special else "text", target)
        else:
            yield from (Piece(f"⟦{marks[mark]} {tokenizer.decode([mark])}⟧", "special", target) for _ in run)
