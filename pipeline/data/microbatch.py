"""Takes rows of stores; gives them as the tensors of one pass through the pipeline.

B rows, T tokens. The one layout for training and evaluation: how many rows of which length share a micro-batch, what a
row's labels are, how it is padded, what filler is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import UserError
from pipeline.data.row_store import IGNORED, RowId, RowStore, labels

PAD_TO = 64  # rows of different lengths are padded to a multiple of this


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one pass through the pipeline.

    `input_ids`, `labels` (−100 where nothing is trained, on padding and filler) and `position_ids` are int64 [B, T];
    `lengths` int64 [B] are the rows' tokens without padding, 0 for filler. A row's labels are its own ids: objectives shift
    them. The loss of a micro-batch is the sum of its targets' losses times `loss_scale`. `rows` says what the B rows are;
    None is filler.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: Tensor
    loss_scale: float
    rows: tuple[RowId | None, ...]

    def tensors(self) -> dict[str, Tensor]:
        """All that a stage or an objective may ask for, by name; `loss_scale` as fp32 []."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "lengths": self.lengths,
            "labels": self.labels,
            "loss_scale": torch.tensor(self.loss_scale, dtype=torch.float32),
        }


class Layout:
    """How rows of `stores` become micro-batches of `micro_batch_size` rows, or as many as `batch_size_tokens` holds.

    Where all rows have one length there is no padding, and every micro-batch has the same shape, `fixed_shape`. Otherwise
    a micro-batch is as wide as its longest row, padded to a multiple of 64. UserError if a row exceeds
    `batch_size_tokens`.

    `switch`: tokens beyond which the model's rotary embedding, which goes by the longest of a micro-batch, is another
    (longrope, dynamic). Then no micro-batch has both longer and shorter parts, and positions of padding begin again in time: one
    token sooner than has to be, as transformers' dynamic embedding comes back to its first form only below `switch`.
    """

    def __init__(
        self,
        stores: Sequence[RowStore],
        micro_batch_size: int,
        batch_size_tokens: int | None,
        switch: int | None = None,
    ) -> None:
        self.stores = list(stores)
        self.switch = switch
        self._widths = [_widths(store) for store in self.stores]
        self.micro_batch_size, self.batch_size_tokens = micro_batch_size, batch_size_tokens
        ends = [(int(widths.min()), int(widths.max())) for widths in self._widths]
        lengths = {length for both in ends for length in both}
        self.pad_to = 1 if len(lengths) == 1 else PAD_TO
        if batch_size_tokens is not None:
            for store, (_, longest) in zip(self.stores, ends, strict=True):
                self._check_fits(store, longest, batch_size_tokens)
        self.fixed_shape: tuple[int, int] | None = None
        if len(lengths) == 1:
            width = lengths.pop()
            self.fixed_shape = (batch_size_tokens // width if batch_size_tokens else micro_batch_size, width)
            if self.fixed_shape[0] > 1 and switch and len({x for s in self.stores for x in s.reaches > switch}) > 1:
                raise UserError(
                    f"dataset '{self.stores[0].name}': the model's rotary embedding is another beyond {switch:,} tokens, and "
                    "packed rows on both sides of that would share a micro-batch: set micro_batch_size_per_gpu = 1 without "
                    "batch_size_tokens"
                )

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of `rows` [N, 2], int64 [N]."""
        return self._gathered([store.lengths for store in self.stores], rows)

    def targets(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Targets of each of `rows` [N, 2], int64 [N]."""
        return self._gathered([store.targets for store in self.stores], rows)

    def widths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """What each of `rows` [N, 2] would be padded to alone, int64 [N]."""
        return self._padded(self._gathered(self._widths, rows))

    def beyond(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of `rows` [N, 2] reach beyond `switch`; none without it."""
        if self.switch is None:
            return np.zeros(len(rows), np.bool_)
        return self._gathered([store.reaches for store in self.stores], rows) > self.switch

    def cut(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where micro-batches begin when `rows` [N, 2] are taken in order; int64 [M + 1], ending in N."""
        if self.fixed_shape:
            return cut(np.full(len(rows), self.fixed_shape[1]), self.fixed_shape[0], None)
        widths, beyond = self.widths(rows), self.beyond(rows)
        borders = [0, *(np.flatnonzero(beyond[1:] != beyond[:-1]) + 1), len(rows)]
        starts = [
            a + cut(widths[a:b], self.micro_batch_size, self.batch_size_tokens)[:-1] for a, b in pairwise(borders)
        ]
        return np.concatenate([*starts, [len(rows)]])

    def micro_batch(self, rows: NDArray[np.int64], loss_scale: float) -> MicroBatch:
        """`rows` [N, 2], padded on the right, and rows of filler up to `fixed_shape`; without rows, filler alone.

        Padding and filler hold EOS, an id that every model of this tokenizer has. Any would do: causal attention keeps it
        from the tokens before it, and its labels are −100. Positions run on over it, so that it opens no new document, unless
        that would change the rotary embedding; in a row they begin again where its store says so.
        """
        lengths = self.lengths(rows)
        n_rows, width = self.fixed_shape or (len(rows) or 1, int(self.widths(rows).max(initial=PAD_TO)))
        ids = np.full((n_rows, width), self.stores[0].eos, dtype=np.int64)
        labelled = np.full((n_rows, width), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(width), (n_rows, 1))
        if self.switch is not None:
            positions[len(rows) :] %= self.switch - 1
        for place, (index, row) in enumerate(rows.tolist()):
            store, length = self.stores[index], int(lengths[place])
            ids[place, :length] = tokens = store.ids(row)
            labelled[place, :length] = labels(tokens, store.spans(row))
            for start in store.restarts(row)[1:]:
                positions[place, start:] = np.arange(width - start)
            if self.switch is not None:
                positions[place, length:] = np.arange(width - length) % (self.switch - 1)
        missing = n_rows - len(rows)
        return MicroBatch(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labelled),
            position_ids=torch.from_numpy(positions),
            lengths=torch.from_numpy(np.append(lengths, np.zeros(missing, np.int64))),
            loss_scale=loss_scale,
            rows=row_ids(rows) + (None,) * missing,
        )

    def _padded(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.pad_to) * self.pad_to

    def _gathered(self, values: list[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.empty(len(rows), dtype=np.int64)
        for index, of_store in enumerate(values):
            mine = rows[:, 0] == index
            found[mine] = of_store[rows[mine, 1]]
        return found

    def _check_fits(self, store: RowStore, longest: int, batch_size_tokens: int) -> None:
        width = -(-longest // self.pad_to) * self.pad_to
        if width > batch_size_tokens:
            padded = f" ({width:,} padded to a multiple of {PAD_TO})" if width != longest else ""
            raise UserError(
                f"batch_size_tokens = {batch_size_tokens:,} does not hold the longest row of dataset '{store.name}', which "
                f"has {longest:,} tokens{padded}: raise batch_size_tokens to {width:,} or lower the dataset's sequence_len"
            )


def _widths(store: RowStore) -> NDArray[np.int64]:
    """Tokens that each row of a store takes before anything is padded to a multiple, int64 [N]."""
    return store.lengths if store.width is None else np.broadcast_to(np.int64(store.width), (len(store),))


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


def row_ids(rows: NDArray[np.int64]) -> tuple[RowId, ...]:
    """int64 [N, 2] as pairs of Python's integers."""
    return tuple((index, row) for index, row in rows.tolist())
