"""Takes items that come one after the other; gives them so many at a time, with the place from which to go on."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

Item = TypeVar("Item")
Place = Any  # JSON; None is the beginning


class Cursor(Generic[Item]):
    """Items from one place of a stream on. It is one item ahead of what it has given, so that it knows whether one is left.

    `place`: where the next one is, once all that was taken is read. `ended`: there is none. `now()` says from where `items`
    would go on.
    """

    def __init__(self, items: Iterator[Item], now: Callable[[], Place]) -> None:
        self._items, self._now = items, now
        self._ahead: list[Item] = []
        self._look()

    def take(self, most: int) -> Iterator[Item]:
        """The next items, or those that are left. All of them have to be read before `place` is asked for."""
        for left in range(most, 0, -1):
            if self.ended:
                return
            (item,) = self._ahead
            self._ahead = []
            if left == 1:  # to say the place costs more than to read an item
                self._look()
            else:
                self._ahead = [found for found in (next(self._items, None),) if found is not None]
            yield item

    @property
    def ended(self) -> bool:
        """Whether nothing is left."""
        return not self._ahead

    def _look(self) -> None:
        self.place: Place = self._now()
        self._ahead = [found for found in (next(self._items, None),) if found is not None]


class Source(Protocol[Item]):
    """Where a stream comes from."""

    @property
    def identity(self) -> list[Any]:
        """What tells it from others (JSON)."""

    def open(self, place: Place) -> Cursor[Item]:
        """The items from `place` on. UserError: they cannot be read."""
