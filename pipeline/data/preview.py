"""Takes the micro-batches of a run and the tokenizer; gives the first rows as text, with all boundaries marked.

Marks stand in ⟦ ⟧: BOS, EOS, where a document begins (its name) or goes on from an earlier chunk (… before the name),
and padding. The ids shown are those of the tensors a run would train on, in its order.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.batches import MicroBatches, Position
from pipeline.data.row_store import RowId, RowStore


def preview(batches: MicroBatches, tokenizer: Any, count: int) -> list[str]:
    """Lines of text showing the first `count` rows (or as many as there are) of this rank's first epoch."""
    lines: list[str] = []
    position, shown = Position(), 0
    while position.epoch == 0:
        micro_batches, info = batches.step(position)
        for batch in micro_batches:
            for row, ids in zip(batch.rows, batch.input_ids.numpy(), strict=True):
                if row is None:
                    continue
                if shown == count:
                    return lines
                shown += 1
                lines += _row(batches.stores[row[0]], row, ids, tokenizer, shown)
        position = info.next_position
    return lines


def _row(store: RowStore, row: RowId, ids: NDArray[np.int64], tokenizer: Any, number: int) -> list[str]:
    """A row's heading, its text with marks, and an empty line."""
    documents, length, targets = store.documents(row[1]), int(store.lengths[row[1]]), int(store.targets[row[1]])
    padding = len(ids) - length
    text = "".join(f"⟦BOS {tokenizer.decode([int(id)])}⟧" for id in ids[: documents[0].start])
    for document in documents:
        text += f"⟦{'… ' if document.continued else ''}{document.name}⟧"
        text += _marked(ids[document.start : document.end], store, tokenizer)
    if padding:
        text += f"⟦{padding:,} × padding⟧"
    heading = (
        f"row {number}: no. {row[1]:,} of '{store.name}', {length:,} tokens, "
        f"{targets:,} of them predicted, {padding:,} padding, documents: {len(documents):,}"
    )
    return [heading, "─" * len(heading), *text.split("\n"), ""]


def _marked(ids: NDArray[np.int64], store: RowStore, tokenizer: Any) -> str:
    """The text of `ids`, with EOS (and BOS, if a document spells it out) marked wherever they stand."""
    marks = {store.bos: "BOS", store.eos: "EOS"}
    text, begin = "", 0
    for place in [*np.flatnonzero(np.isin(ids, [id for id in marks if id is not None])), len(ids)]:
        text += tokenizer.decode(ids[begin:place].tolist()) if place > begin else ""
        if place < len(ids):
            text += f"⟦{marks[int(ids[place])]} {tokenizer.decode([int(ids[place])])}⟧"
        begin = place + 1
    return text
