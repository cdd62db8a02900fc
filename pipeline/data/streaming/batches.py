"""Takes the windows of a stream, each as `MicroBatches`; gives the micro-batches of a run through all of them.

A window takes the place of an epoch, so that all that holds of a position in an epoch (batches.py) holds here: a step is a
function of the window, the seed and the position, with any number of replicas.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pipeline.console import UserError
from pipeline.data.batches import MicroBatches, Position, StepInfo
from pipeline.data.microbatch import MicroBatch
from pipeline.data.row_store import RowId, RowStore


class StreamedBatches:
    """As `MicroBatches`. `window(number)` gives those of a window, whose one epoch has the window's number; None where nothing of
    it can be trained on. `first`: a window that is at hand. `one_length`: whether all rows of all windows have one length."""

    unit = "window"

    def __init__(self, window: Callable[[int], MicroBatches | None], first: int, one_length: bool) -> None:
        self._make = window
        self._windows: dict[int, MicroBatches | None] = {}
        self.at_hand = Position(first)
        self._current = at_hand = self._at(first)
        self.micro_batches_per_step = at_hand.micro_batches_per_step
        self.fixed_shape = at_hand.fixed_shape if one_length else None

    @property
    def stores(self) -> list[RowStore]:
        """Those of the step that `step` gave last."""
        return self._current.stores

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of a window."""
        return self._at(epoch).steps_per_epoch(epoch)

    def steps_to_come(self, position: Position, epochs: int, at_most: int | None = None) -> int:
        """Nobody knows how much is to come: `at_most`, which has to be given."""
        if at_most is None:
            raise UserError("max_steps: required with streaming = true, as nobody knows how long the stream is")
        return at_most

    def step(self, position: Position, stores: Sequence[RowStore] | None = None) -> tuple[list[MicroBatch], StepInfo]:
        """As `MicroBatches.step`; the window after it is made with the last step of a window."""
        self._current = self._at(position.epoch)
        batches, info = self._current.step(position, stores)
        return batches, self._on(info)

    def info(self, position: Position) -> StepInfo:
        """As `MicroBatches.info`."""
        return self._on(self._at(position.epoch).info(position))

    def documents(self, rows: Iterable[RowId | None]) -> list[str]:
        """What rows of the step that `step` gave last come from."""
        return self._current.documents(rows)

    def order_hash(self, epoch: int) -> str:
        """As `MicroBatches.order_hash`, of a window."""
        return self._at(epoch).order_hash(epoch)

    def _at(self, number: int) -> MicroBatches:
        found = self._window(number)
        if found is None:
            raise UserError(
                f"window {number:,} of the stream has nothing to train on any more: it is not what the position was saved with"
            )
        return found

    def _window(self, number: int) -> MicroBatches | None:
        """Those of a window; the last two asked for are kept."""
        if number not in self._windows:
            while len(self._windows) > 1:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = self._make(number)
        return self._windows[number]

    def _on(self, info: StepInfo) -> StepInfo:
        """The step's facts, with what follows a window: the next one that has something."""
        position = info.next_position
        if position.rows:
            return info
        number = position.epoch
        while self._window(number) is None:
            number += 1
        return replace(info, next_position=Position(number))
