"""Takes stores and each epoch's rows; gives the micro-batches of each optimizer step, and of an evaluation, per replica.

Nothing here is carried from step to step: `step(position)` is a function of the rows, the seed and the position, so
resuming is calling it with the position that was saved. Every row of an epoch is seen exactly once. What an epoch's
last step lacks is made up with filler, which has no targets; nothing is repeated and nothing dropped. The order of the
rows does not depend on accumulation steps, ranks or stages (nor, where all rows have one length, on the size of a
micro-batch), and the position counts rows, so a run may go on with other values of these.

B rows, T tokens. Rows are int64 [N, 2] of (index of the store, row in it).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.microbatch import Layout, MicroBatch, row_ids
from pipeline.data.mixing import Mixture
from pipeline.data.row_store import RowId, RowStore
from pipeline.data.selection import Selection, shuffled


@dataclass(frozen=True)
class Position:
    """How far training has come: whole epochs, and rows of the current one."""

    epoch: int = 0
    rows: int = 0


@dataclass(frozen=True)
class StepInfo:
    """An optimizer step over all ranks: what it reads and where it leads. `epochs_done` is a number such as 1.25."""

    rows: tuple[RowId, ...]
    tokens: int
    targets: int
    next_position: Position
    epochs_done: float


@dataclass(frozen=True)
class _Epoch:
    """An epoch's rows in training order, int64 [N, 2], and where micro-batches begin, int64 [M + 1] ending in N."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]


class MicroBatches:
    """The micro-batches of a run for data-parallel rank `dp_rank` of `dp_world`.

    `epoch_rows(epoch)` gives int64 [N, 2] of (index into `stores`, row); they are shuffled unless it has an order. How many
    rows share a micro-batch, and its shape, says `Layout`. With rows of several lengths, `group_by_length` puts rows of like
    length together, and the largest micro-batch is the run's first, so that too little memory shows at once. `switch`: as for
    `Layout`.
    """

    unit = "epoch"  # what a position counts beside rows
    at_hand = Position()  # one whose data is there

    def __init__(
        self,
        stores: Sequence[RowStore],
        epoch_rows: Mixture,
        *,
        seed: int,
        micro_batch_size: int = 1,
        batch_size_tokens: int | None = None,
        gradient_accumulation_steps: int = 1,
        dp_rank: int = 0,
        dp_world: int = 1,
        group_by_length: bool = False,
        switch: int | None = None,
    ) -> None:
        self.stores, self.epoch_rows, self.seed = list(stores), epoch_rows, seed
        self.dp_rank, self.dp_world, self.group_by_length = dp_rank, dp_world, group_by_length
        self.micro_batches_per_step = gradient_accumulation_steps * dp_world
        self._layout = Layout(stores, micro_batch_size, batch_size_tokens, switch)
        self.fixed_shape = self._layout.fixed_shape
        self._epochs: dict[int, _Epoch] = {}
        self._hashes: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # rows of an epoch

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch from its beginning."""
        return self.steps_left(Position(epoch))

    def steps_left(self, position: Position) -> int:
        """Optimizer steps from `position` to the end of its epoch."""
        if self.fixed_shape:  # whatever the order
            size = self._size(position.epoch)
            self._check_within(position, size)
            micro_batches = math.ceil((size - position.rows) / self.fixed_shape[0])
        else:
            plan = self._epoch(position.epoch)
            micro_batches = len(plan.starts) - 1 - self._first(plan, position)
        return math.ceil(micro_batches / self.micro_batches_per_step)

    def steps_to_come(self, position: Position, epochs: int, at_most: int | None = None) -> int:
        """Optimizer steps from `position` to the end of `epochs` epochs, or `at_most`: no epoch beyond that is drawn."""
        steps = 0
        for epoch in range(position.epoch, epochs):
            if at_most is not None and steps >= at_most:
                return at_most
            steps += self.steps_left(position if epoch == position.epoch else Position(epoch))
        return steps if at_most is None else min(steps, at_most)

    def step(self, position: Position, stores: Sequence[RowStore] | None = None) -> tuple[list[MicroBatch], StepInfo]:
        """This rank's micro-batches (one for each accumulation step) of the step at `position`, and the step's facts.
        `stores`: in place of the run's, the same rows with what has become known of them since they were planned.

        Micro-batches go to the ranks in turn. `loss_scale` is micro_batches_per_step / targets of the step: averaged over
        accumulation steps and ranks, the loss is the mean over the step's targets, however divided; of units there is also
        micro_batches_per_step / units of the step, and the targets are those of first slots. UserError for a step without
        targets, which has no mean.
        """
        layout = self._layout if stores is None else self._layout.over(stores)
        info = self.info(position, layout)
        if not info.targets:
            raise UserError(
                f"rows {position.rows:,} and on of epoch {position.epoch}: none of the step's {len(info.rows):,} rows, the "
                f"first of them of dataset '{self.stores[info.rows[0][0]].name}', has a token to train on: leave them out"
            )
        plan, starts = self._epoch(position.epoch), self._edges(position)
        scale = self.micro_batches_per_step / layout.first_targets(np.array(info.rows, np.int64))
        unit_scale = self.micro_batches_per_step / len(info.rows)
        batches = []
        for index in range(self.dp_rank, self.micro_batches_per_step, self.dp_world):
            if index < len(starts) - 1:
                batches.append(layout.micro_batch(plan.rows[starts[index] : starts[index + 1]], scale, unit_scale))
            else:
                batches.append(layout.micro_batch(plan.rows[:0], loss_scale=0.0))
        return batches, info

    def info(self, position: Position, layout: Layout | None = None) -> StepInfo:
        """The facts of the step at `position`, without reading its data."""
        layout = layout or self._layout
        plan = self._epoch(position.epoch)
        end = int(self._edges(position)[-1])
        rows = plan.rows[position.rows : end]
        ended = end == len(plan.rows)
        return StepInfo(
            rows=row_ids(rows),
            tokens=layout.tokens(rows),
            targets=int(layout.targets(rows).sum()),
            next_position=Position(position.epoch + 1) if ended else Position(position.epoch, end),
            epochs_done=position.epoch + end / len(plan.rows),
        )

    def documents(self, rows: Iterable[RowId | None]) -> list[str]:
        """The documents that rows come from, `dataset: document`, each once, in order."""
        names = (
            f"{self.stores[row[0]].name}: {span.name}"
            for row in rows
            if row
            for span in self.stores[row[0]].documents(row[1])
        )
        return list(dict.fromkeys(names))

    def order_hash(self, epoch: int) -> str:
        """16 hex digits that tell an epoch's rows and their order from others, where a position means nothing."""
        plan = self._epoch(epoch)
        if epoch not in self._hashes:
            content = [plan.rows.tobytes(), *(store.content_hash.encode() for store in self.stores)]
            if not self.fixed_shape:
                content.append(plan.starts.tobytes())
            self._hashes[epoch] = hashlib.sha256(b"".join(content)).hexdigest()[:16]
        return self._hashes[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        """The plan of an epoch; the last two asked for are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._planned(epoch)
        return self._epochs[epoch]

    def _planned(self, epoch: int) -> _Epoch:
        rows = self.epoch_rows(epoch)
        if not self.epoch_rows.in_order:
            rows = rows[shuffled(len(rows), self.seed, epoch)]
        if self.fixed_shape:
            return _Epoch(rows, self._layout.cut(rows))
        if self.group_by_length:
            rows = rows[np.argsort(self._layout.lengths(rows), kind="stable")]
        beyond = self._layout.beyond(rows)
        if beyond.any() and not beyond.all():
            rows = rows[np.argsort(beyond, kind="stable")]
        starts = self._layout.cut(rows)
        order = np.arange(len(starts) - 1)
        if self.group_by_length or (beyond.any() and not beyond.all()):
            order = shuffled(len(order), self.seed, epoch, 1)
        if epoch == 0:
            padded = np.diff(starts) * np.maximum.reduceat(self._layout.widths(rows), starts[:-1])
            largest = int(padded.argmax())
            order = np.concatenate([[largest], order[order != largest]])
        pieces = [rows[starts[i] : starts[i + 1]] for i in order]
        return _Epoch(np.concatenate(pieces), np.cumsum([0] + [len(piece) for piece in pieces]))

    def _size(self, epoch: int) -> int:
        """Rows of an epoch."""
        if epoch not in self._sizes:
            self._sizes[epoch] = len(self._epochs[epoch].rows if epoch in self._epochs else self.epoch_rows(epoch))
        return self._sizes[epoch]

    def _edges(self, position: Position) -> NDArray[np.int64]:
        """Where the micro-batches of the step at `position` begin, ending in its end: so many edges, whatever the epoch has."""
        plan, count = self._epoch(position.epoch), self.micro_batches_per_step
        self._check_within(position, len(plan.rows))
        if self.fixed_shape:  # any row can begin a micro-batch
            edges = position.rows + np.arange(count + 1) * self.fixed_shape[0]
            return np.append(edges[edges < len(plan.rows)], len(plan.rows))[: count + 1]
        first = self._first(plan, position)
        return plan.starts[first : first + count + 1]

    @staticmethod
    def _check_within(position: Position, size: int) -> None:
        """UserError if the epoch of `size` rows has no such position."""
        if not 0 <= position.rows < size:
            raise UserError(
                f"the data position, row {position.rows:,} of epoch {position.epoch}, is beyond the epoch's "
                f"{size:,} rows: it was saved with other data"
            )

    def _first(self, plan: _Epoch, position: Position) -> int:
        """The number of the micro-batch that begins at `position`, where micro-batches are of unequal size."""
        self._check_within(position, len(plan.rows))
        first = int(np.searchsorted(plan.starts, position.rows))
        if plan.starts[first] != position.rows:
            raise UserError(
                f"the data position, row {position.rows:,} of epoch {position.epoch}, is inside a micro-batch: it was "
                f"saved with another micro_batch_size_per_gpu, batch_size_tokens or group_by_length; "
                f"set these as they were"
            )
        return first


class EvaluationBatches:
    """A set's micro-batches for data-parallel rank `dp_rank` of `dp_world`, read as they are asked for.

    Every row is in exactly one. `len` is the same on all ranks, so that the whole set goes through the pipeline in one
    call; what is missing at the end is filler. Rows of several lengths come in the order of length, which pads least.
    A micro-batch's `loss_scale` (and its units') is 1, so its loss is a sum; the set's mean loss is the sum over ranks /
    `targets` (or `units`).
    UserError for a set without targets.
    """

    def __init__(
        self,
        rows: Selection,
        *,
        micro_batch_size: int = 1,
        batch_size_tokens: int | None = None,
        dp_rank: int = 0,
        dp_world: int = 1,
        switch: int | None = None,
    ) -> None:
        self.dp_rank, self.dp_world = dp_rank, dp_world
        self._layout = Layout([rows.store], micro_batch_size, batch_size_tokens, switch)
        self.fixed_shape = self._layout.fixed_shape
        pairs = np.stack([np.zeros_like(rows.rows), rows.rows], axis=1)
        self._rows = pairs[np.lexsort((self._layout.lengths(pairs), self._layout.beyond(pairs)))]
        self._starts = self._layout.cut(self._rows)
        self.targets, self.units = int(self._layout.targets(pairs).sum()), len(pairs)
        if not self.targets:
            raise UserError(f"dataset '{rows.store.name}': none of its {len(rows):,} rows to evaluate on has a target")

    def __len__(self) -> int:
        return math.ceil((len(self._starts) - 1) / self.dp_world)

    def __iter__(self) -> Iterator[MicroBatch]:
        for index in range(self.dp_rank, len(self) * self.dp_world, self.dp_world):
            begin, end = (int(self._starts[min(i, len(self._starts) - 1)]) for i in (index, index + 1))
            yield self._layout.micro_batch(self._rows[begin:end], loss_scale=1.0)
