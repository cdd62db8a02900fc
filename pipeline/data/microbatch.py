"""Takes rows of stores; gives them as the tensors of one pass through the pipeline.

B rows, T tokens. The one layout for training and evaluation: what a row's labels are, how it is padded, what filler is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.store import ChunkStore

PAD_TO = 64  # rows of different lengths are padded to a multiple of this
IGNORED = -100  # the label of what is no target

Row = tuple[int, int]  # (index of the dataset, chunk)


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one pass through the pipeline. A row's labels are its own ids: objectives shift them.

    `input_ids`, `labels` (−100 on padding and filler) and `position_ids` are int64 [B, T]. The loss of a micro-batch is
    the sum of its target tokens' losses times `loss_scale`. `rows` says what the B rows are; None is filler.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_scale: float
    rows: tuple[Row | None, ...]

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row without padding, int64 [B]; 0 for filler."""
        return (self.labels != IGNORED).sum(1)

    @property
    def target_tokens(self) -> int:
        """Predicted tokens: labels that are not −100, but for the first place of each row, which nothing predicts."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def collate(
    stores: Sequence[ChunkStore], rows: Sequence[Row], n_rows: int, width: int, loss_scale: float
) -> MicroBatch:
    """A micro-batch of shape [n_rows, width] with `rows` first, padded on the right, and then rows of filler.

    Padding and filler hold the dataset's EOS, an id that every model of this tokenizer has. Any would do: causal
    attention keeps it from the tokens before it, and its labels are −100. Positions run on over it, so that it opens no
    new document.
    """
    ids = np.full((n_rows, width), stores[0].report.eos, dtype=np.int64)
    labels = np.full((n_rows, width), IGNORED, dtype=np.int64)
    for place, (dataset, chunk) in enumerate(rows):
        tokens = stores[dataset][chunk]
        ids[place, : len(tokens)] = labels[place, : len(tokens)] = tokens
    positions = torch.arange(width).repeat(n_rows, 1)
    named = tuple(rows) + (None,) * (n_rows - len(rows))
    return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), positions, loss_scale, named)


def rows_that_fit(store: ChunkStore, width: int, micro_batch_size: int, batch_size_tokens: int | None) -> int:
    """Rows of `width` tokens in a micro-batch: `micro_batch_size`, or what `batch_size_tokens` holds.

    UserError if it holds none.
    """
    if batch_size_tokens is None:
        return micro_batch_size
    if width > batch_size_tokens:
        padded = f" ({width:,} padded to a multiple of {PAD_TO})" if width != store.sequence_len else ""
        raise UserError(
            f"batch_size_tokens = {batch_size_tokens:,} holds no row of dataset '{store.name}', whose sequence_len is "
            f"{store.sequence_len:,}{padded}: raise batch_size_tokens to {width:,} or lower sequence_len"
        )
    return batch_size_tokens // width


def cut(widths: NDArray[np.int64], micro_batch_size: int, batch_size_tokens: int | None) -> NDArray[np.int64]:
    """Where micro-batches begin when rows of padded `widths` [N] are taken in order; int64 [M + 1], ending in N.

    With `batch_size_tokens` a micro-batch takes rows while rows · widest ≤ batch_size_tokens; each row alone must fit.
    """
    if batch_size_tokens is None:
        return np.append(np.arange(0, len(widths), micro_batch_size), len(widths))
    starts, widest = [0], 0
    for place, width in enumerate(widths.tolist()):
        widest = max(widest, width)
        if widest * (place + 1 - starts[-1]) > batch_size_tokens:
            starts.append(place)
            widest = width
    return np.array([*starts, len(widths)], dtype=np.int64)
