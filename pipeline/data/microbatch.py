"""Takes rows of stores; gives them as the tensors of one pass through the pipeline.

B rows, T tokens. The one layout for training and evaluation: how many rows of which length share a micro-batch, what a
row's labels are, how it is padded, what filler is. Of preference data a row of a store is a unit of S rows (its slots), which
are never parted: a micro-batch of U units has B = S·U rows, the first slot of all units, then the second of all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.console import UserError
from pipeline.data.row_store import IGNORED, RowId, RowStore, labels
from pipeline.data.units.store import UnitRows

PAD_TO = 64  # rows of different lengths are padded to a multiple of this


@dataclass(frozen=True)
class Units:
    """What a micro-batch's U units are beside their rows. The loss of a step is the mean over its units: `scale` is micro-batches
    of the step / units of the step. `reference` fp32 [S, U]: log-probabilities of the rows' targets under the reference, summed;
    `desirable` bool [U]: of unpaired answers."""

    scale: float
    reference: Tensor
    desirable: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one pass through the pipeline.

    `input_ids`, `labels` (−100 where nothing is trained, on padding and filler) and `position_ids` are int64 [B, T];
    `lengths` int64 [B] are the rows' tokens without padding, 0 for filler. A row's labels are its own ids: objectives shift
    them. The loss of a micro-batch is the sum of its targets' losses times `loss_scale`, which of units counts the first slot's
    targets. `rows` says what the B rows, or U units, are; None is filler.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    lengths: Tensor
    loss_scale: float
    rows: tuple[RowId | None, ...]
    units: Units | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All that a stage or an objective may ask for, by name; `loss_scale` and `unit_scale` as fp32 []. Of units also `marks`,
        int8 [B, T]: 1 for a token of the row, and 2 more for one that is a target."""
        of_units = {}
        if self.units is not None:
            scale = torch.tensor(self.units.scale, dtype=torch.float32)
            of_units = {"unit_scale": scale, "reference": self.units.reference, "desirable": self.units.desirable}
            of_units["marks"] = self._marks()
        return {
            **of_units,
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "lengths": self.lengths,
            "labels": self.labels,
            "loss_scale": torch.tensor(self.loss_scale, dtype=torch.float32),
        }

    def _marks(self) -> Tensor:
        there_BT = torch.arange(self.labels.shape[1]) < self.lengths[:, None]
        return there_BT.to(torch.int8) + 2 * (self.labels != IGNORED).to(torch.int8)


class Layout:
    """How rows of `stores` become micro-batches of `micro_batch_size` rows, or as many as `batch_size_tokens` holds.

    Where all rows have one length there is no padding, and every micro-batch has the same shape, `fixed_shape`. Otherwise
    a micro-batch is as wide as its longest row, padded to a multiple of 64. Of units, `micro_batch_size` counts units,
    `batch_size_tokens` all of their rows. UserError if a row (or unit) exceeds `batch_size_tokens`, or units have not one size.

    `switch`: tokens beyond which the model's rotary embedding, which goes by the longest of a micro-batch, is another
    (longrope, dynamic). Then no micro-batch has both longer and shorter parts, and positions of padding begin again in time: one
    token sooner than has to be, as transformers' dynamic embedding comes back to its first form only below `switch`. (The rows
    of a unit are never parted, so that a longer one decides for the others.)
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
        self.slots = len(self.stores[0].slots)
        if other := next((store for store in self.stores if len(store.slots) != self.slots), None):
            raise UserError(
                f"datasets '{self.stores[0].name}' and '{other.name}': the units of one have {self.slots} rows, those of the "
                f"other {len(other.slots)}; train on sets of one dataset_type, ranked ones with the same ranks"
            )
        ends = [(int(widths.min()), int(widths.max())) for widths in self._widths]
        lengths = {length for both in ends for length in both} if self.slots == 1 else {0, 1}  # units are not filled up
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

    def over(self, stores: Sequence[RowStore]) -> "Layout":
        """The same of other stores."""
        return Layout(stores, self.micro_batch_size, self.batch_size_tokens, self.switch)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of `rows` [N, 2], int64 [N]."""
        return self._gathered([store.lengths for store in self.stores], rows)

    def tokens(self, rows: NDArray[np.int64]) -> int:
        """Tokens of `rows` [N, 2] together, those of all slots."""
        return sum(
            int(self._gathered([store.slots[slot].lengths for store in self.stores], rows).sum())
            for slot in range(self.slots)
        )

    def first_targets(self, rows: NDArray[np.int64]) -> int:
        """Targets of `rows` [N, 2] together, in their first slot: all of rows by themselves, the chosen of pairs."""
        return int(self._gathered([store.slots[0].targets for store in self.stores], rows).sum())

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
        widths, beyond = self.widths(rows) * self.slots, self.beyond(rows)
        borders = [0, *(np.flatnonzero(beyond[1:] != beyond[:-1]) + 1), len(rows)]
        starts = [
            a + cut(widths[a:b], self.micro_batch_size, self.batch_size_tokens)[:-1]
            for a, b in itertools.pairwise(borders)
        ]
        return np.concatenate([*starts, [len(rows)]])

    def micro_batch(self, rows: NDArray[np.int64], loss_scale: float, unit_scale: float = 1.0) -> MicroBatch:
        """`rows` [N, 2], padded on the right, and rows of filler up to `fixed_shape`; without rows, filler alone (of units one).

        Padding and filler hold EOS, an id that every model of this tokenizer has. Any would do: causal attention keeps it
        from the tokens before it, and its labels are −100. Positions run on over it, so that it opens no new document, unless
        that would change the rotary embedding; in a row they begin again where its store says so.
        """
        n_rows, width = self.fixed_shape or (len(rows) or 1, int(self.widths(rows).max(initial=PAD_TO)))
        ids = np.full((self.slots, n_rows, width), self.stores[0].eos, dtype=np.int64)
        labelled = np.full((self.slots, n_rows, width), IGNORED, dtype=np.int64)
        running = np.arange(width)
        padding = running if self.switch is None else running % (self.switch - 1)
        positions = np.tile(padding, (self.slots, n_rows, 1))
        true_lengths = np.zeros((self.slots, n_rows), dtype=np.int64)
        for slot, place in itertools.product(range(self.slots), range(len(rows))):
            index, row = rows[place].tolist()
            store = self.stores[index].slots[slot]
            tokens = store.ids(row)
            true_lengths[slot, place] = length = len(tokens)
            ids[slot, place, :length] = tokens
            labelled[slot, place, :length] = labels(tokens, store.spans(row))
            for start in store.restarts(row):
                positions[slot, place, start:] = running[: width - start]
            if self.switch is not None:
                positions[slot, place, length:] = padding[: width - length]
        missing = n_rows - len(rows)
        return MicroBatch(
            input_ids=torch.from_numpy(ids.reshape(-1, width)),
            labels=torch.from_numpy(labelled.reshape(-1, width)),
            position_ids=torch.from_numpy(positions.reshape(-1, width)),
            lengths=torch.from_numpy(true_lengths.reshape(-1)),
            loss_scale=loss_scale,
            rows=row_ids(rows) + (None,) * missing,
            units=self._units(rows, n_rows, unit_scale) if self.slots > 1 else None,
        )

    def _units(self, rows: NDArray[np.int64], count: int, scale: float) -> Units:
        """What is beside the rows of `count` units, those behind `rows` being filler."""
        reference, desirable = torch.zeros(self.slots, count), torch.zeros(count, dtype=torch.bool)
        for place, (index, row) in enumerate(rows.tolist()):
            store = self.stores[index]
            if isinstance(store, UnitRows):
                desirable[place] = bool(store.desirable[row])
                if store.reference is not None:
                    reference[:, place] = torch.from_numpy(store.reference[row].copy())
        return Units(scale, reference, desirable)

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
        if width * self.slots > batch_size_tokens:
            padded = f" ({width:,} padded to a multiple of {PAD_TO})" if width != longest else ""
            unit = f", and {self.slots} rows to a unit" if self.slots > 1 else ""
            raise UserError(
                f"batch_size_tokens = {batch_size_tokens:,} does not hold the longest row of dataset '{store.name}', which "
                f"has {longest:,} tokens{padded}{unit}: raise batch_size_tokens to {width * self.slots:,} or lower the dataset's "
                f"sequence_len"
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
