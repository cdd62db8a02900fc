"""Takes stores of chunks and each epoch's rows; gives the micro-batches of each optimizer step, per data-parallel rank.

Nothing here is carried from step to step: `step(position)` is a function of the rows, the seed and the position, so
resuming is calling it with the position that was saved. Every row of an epoch is seen exactly once. What an epoch's
last step lacks is made up with filler, which has no targets; nothing is repeated and nothing dropped. The order of the
rows does not depend on accumulation steps, ranks or stages (nor, where all rows have one length, on the size of a
micro-batch), and the position counts rows, so a run may go on with other values of these.

B rows, T tokens.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.microbatch import PAD_TO, MicroBatch, Row, collate, cut, rows_that_fit
from pipeline.data.mixture import EpochRows, shuffled
from pipeline.data.store import ChunkStore


@dataclass(frozen=True)
class Position:
    """How far training has come: whole epochs, and rows of the current one."""

    epoch: int = 0
    rows: int = 0


@dataclass(frozen=True)
class StepInfo:
    """An optimizer step over all ranks: what it reads and where it leads. `epochs_done` is a number such as 1.25."""

    rows: tuple[Row, ...]
    tokens: int
    target_tokens: int
    next_position: Position
    epochs_done: float


@dataclass(frozen=True)
class _Epoch:
    """An epoch's rows in training order, int64 [N, 2], and where micro-batches begin, int64 [M + 1] ending in N."""

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]


class MicroBatches:
    """The micro-batches of a run for data-parallel rank `dp_rank` of `dp_world`.

    `epoch_rows(epoch)` gives int64 [N, 2] of (index into `stores`, chunk). A micro-batch has `micro_batch_size`
    rows, or as many as `batch_size_tokens` holds when padded. With one row length there is no padding and every
    micro-batch has the same shape. With several, `group_by_length` puts rows of like length together, and the largest
    micro-batch is the run's first, so that too little memory shows at once. UserError if a row exceeds
    `batch_size_tokens`.
    """

    def __init__(
        self,
        stores: Sequence[ChunkStore],
        epoch_rows: EpochRows,
        *,
        seed: int,
        micro_batch_size: int = 1,
        batch_size_tokens: int | None = None,
        gradient_accumulation_steps: int = 1,
        dp_rank: int = 0,
        dp_world: int = 1,
        group_by_length: bool = False,
    ) -> None:
        self.stores, self.epoch_rows, self.seed = list(stores), epoch_rows, seed
        self.micro_batch_size, self.batch_size_tokens = micro_batch_size, batch_size_tokens
        self.dp_rank, self.dp_world, self.group_by_length = dp_rank, dp_world, group_by_length
        self.micro_batches_per_step = gradient_accumulation_steps * dp_world
        self._lengths = np.array([store.sequence_len for store in self.stores], dtype=np.int64)
        one_length = len(set(self._lengths.tolist())) == 1
        self._widths = self._lengths if one_length else -(-self._lengths // PAD_TO) * PAD_TO
        fits = [
            rows_that_fit(store, int(width), micro_batch_size, batch_size_tokens)
            for store, width in zip(self.stores, self._widths, strict=True)
        ]
        self.fixed_shape: tuple[int, int] | None = (fits[0], int(self._widths[0])) if one_length else None
        self._epochs: dict[int, _Epoch] = {}
        self._hashes: dict[int, str] = {}

    def shapes(self, epochs: int) -> set[tuple[int, int]]:
        """All (B, T) that the first `epochs` epochs have."""
        if self.fixed_shape:
            return {self.fixed_shape}
        shapes = set()
        for epoch in range(epochs):
            plan = self._epoch(epoch)
            widths = np.maximum.reduceat(self._widths[plan.rows[:, 0]], plan.starts[:-1])
            shapes |= {(int(n), int(width)) for n, width in zip(np.diff(plan.starts), widths, strict=True)}
            if (len(plan.starts) - 1) % self.micro_batches_per_step:
                shapes.add((1, PAD_TO))
        return shapes

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch from its beginning."""
        return self.steps_left(Position(epoch))

    def steps_left(self, position: Position) -> int:
        """Optimizer steps from `position` to the end of its epoch."""
        if self.fixed_shape and not position.rows:  # whatever the order
            micro_batches = math.ceil(len(self.epoch_rows(position.epoch)) / self.fixed_shape[0])
        else:
            micro_batches = len(self._starts(position)) - 1
        return math.ceil(micro_batches / self.micro_batches_per_step)

    def steps_to_come(self, position: Position, epochs: int, at_most: int | None = None) -> int:
        """Optimizer steps from `position` to the end of `epochs` epochs, or `at_most`: no epoch beyond that is drawn."""
        steps = 0
        for epoch in range(position.epoch, epochs):
            if at_most is not None and steps >= at_most:
                return at_most
            steps += self.steps_left(position if epoch == position.epoch else Position(epoch))
        return steps if at_most is None else min(steps, at_most)

    def step(self, position: Position) -> tuple[list[MicroBatch], StepInfo]:
        """This rank's micro-batches (one for each accumulation step) of the step at `position`, and the step's facts.

        Micro-batches go to the ranks in turn. `loss_scale` is micro_batches_per_step / target_tokens of the step:
        averaged over accumulation steps and ranks, the loss is the mean over the step's target tokens, however divided.
        """
        info = self.info(position)
        plan, starts = self._epoch(position.epoch), self._starts(position)
        batches = []
        for index in range(self.dp_rank, self.micro_batches_per_step, self.dp_world):
            if index >= len(starts) - 1:
                shape = self.fixed_shape or (1, PAD_TO)
                batches.append(collate(self.stores, (), *shape, loss_scale=0.0))
                continue
            rows = _rows(plan.rows[starts[index] : starts[index + 1]])
            shape = self.fixed_shape or (len(rows), max(int(self._widths[dataset]) for dataset, _ in rows))
            batches.append(
                collate(self.stores, rows, *shape, loss_scale=self.micro_batches_per_step / info.target_tokens)
            )
        return batches, info

    def info(self, position: Position) -> StepInfo:
        """The facts of the step at `position`, without reading its data."""
        plan, starts = self._epoch(position.epoch), self._starts(position)
        end = int(starts[min(self.micro_batches_per_step, len(starts) - 1)])
        rows = plan.rows[position.rows : end]
        lengths = self._lengths[rows[:, 0]]
        ended = end == len(plan.rows)
        return StepInfo(
            rows=_rows(rows),
            tokens=int(lengths.sum()),
            target_tokens=int((lengths - 1).sum()),
            next_position=Position(position.epoch + 1) if ended else Position(position.epoch, end),
            epochs_done=position.epoch + end / len(plan.rows),
        )

    def documents(self, rows: Iterable[Row | None]) -> list[str]:
        """The documents that rows come from, `dataset: document`, each once, in order."""
        names = (
            f"{self.stores[row[0]].name}: {span.name}"
            for row in rows
            if row
            for span in self.stores[row[0]].spans(row[1])
        )
        return list(dict.fromkeys(names))

    def order_hash(self, epoch: int) -> str:
        """16 hex digits that tell an epoch's rows and their order from others, where a position means nothing."""
        plan = self._epoch(epoch)
        if epoch not in self._hashes:
            content = [plan.rows.tobytes(), *(store.report.sha256.encode() for store in self.stores)]
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
        rows = rows[shuffled(len(rows), self.seed, epoch)]
        if self.fixed_shape:
            return _Epoch(rows, cut(rows[:, 0], self.fixed_shape[0], None))
        if self.group_by_length:
            rows = rows[np.argsort(self._lengths[rows[:, 0]], kind="stable")]
        widths = self._widths[rows[:, 0]]
        starts = cut(widths, self.micro_batch_size, self.batch_size_tokens)
        order = np.arange(len(starts) - 1)
        if self.group_by_length:
            order = shuffled(len(order), self.seed, epoch, 1)
        if epoch == 0:
            padded = np.diff(starts) * np.maximum.reduceat(widths, starts[:-1])
            largest = int(padded.argmax())
            order = np.concatenate([[largest], order[order != largest]])
        pieces = [rows[starts[i] : starts[i + 1]] for i in order]
        return _Epoch(np.concatenate(pieces), np.cumsum([0] + [len(piece) for piece in pieces]))

    def _starts(self, position: Position) -> NDArray[np.int64]:
        """Where the micro-batches from `position` on begin, ending in the number of rows."""
        plan = self._epoch(position.epoch)
        if not 0 <= position.rows < len(plan.rows):
            raise UserError(
                f"the data position, row {position.rows:,} of epoch {position.epoch}, is beyond the epoch's "
                f"{len(plan.rows):,} rows: it was saved with other data"
            )
        if self.fixed_shape:  # any row can begin a micro-batch
            return np.append(np.arange(position.rows, len(plan.rows), self.fixed_shape[0]), len(plan.rows))
        first = int(np.searchsorted(plan.starts, position.rows))
        if plan.starts[first] != position.rows:
            raise UserError(
                f"the data position, row {position.rows:,} of epoch {position.epoch}, is inside a micro-batch: it was "
                f"saved with another micro_batch_size_per_gpu, batch_size_tokens or group_by_length; "
                f"set these as they were"
            )
        return plan.starts[first:]


def _rows(pairs: NDArray[np.int64]) -> tuple[Row, ...]:
    return tuple((int(dataset), int(chunk)) for dataset, chunk in pairs)
