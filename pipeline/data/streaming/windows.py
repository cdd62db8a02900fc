"""Takes a stream; gives it in windows, each prepared into a store of its own, once a machine, and forgotten again.

A window is the next so many items of the stream, or what is left of them: none goes over the stream's end, behind which it
begins again. Three windows are on disk at most, each in a folder of its own; where all of them begin is kept (`windows.jsonl`),
so that any can be made again without reading what is before it. Where that is lost, it is read.
"""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pipeline.console import log
from pipeline.data.preparing import cache
from pipeline.data.row_store import RowStore
from pipeline.data.rows import tally
from pipeline.data.streaming.cursor import Cursor, Item, Place, Source
from pipeline.files import sync_stream

Taken = TypeVar("Taken", contravariant=True)

INDEX = "windows.jsonl"
ALIVE_EVERY = 64  # items


class Kind(Protocol[Taken]):
    """What a window's items are made into."""

    def write(self, staging: Path, items: Iterator[Taken]) -> None:
        """Write the store of these items into `staging`, which is not there yet."""

    def load(self, path: Path) -> RowStore:
        """The store that was written there, which may have no rows."""

    def met(self, store: RowStore) -> tuple[int, int, list[str]]:
        """(items read, bad ones of these, a line for each thing that was wrong)."""


@dataclass
class _Known:
    """What the index says: where the windows of a pass begin, (items, bad ones, tokens) of those that were made, how many there
    are."""

    places: list[Place] = field(default_factory=lambda: [None])
    met: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    count: int | None = None


class Windows(Generic[Item]):
    """The windows of a stream, of `size` items each, in `folder`. `most_bad`: the part of the items so far that may be bad.

    `alive(count)` is called while a window is made, with the items read so far: the run gets on.
    """

    def __init__(
        self, name: str, folder: Path, source: Source[Item], size: int, kind: Kind[Item], most_bad: float
    ) -> None:
        self.name, self.folder, self.size, self.most_bad = name, folder, size, most_bad
        self._source, self._kind = source, kind
        self.alive: Callable[[int], None] = lambda count: None
        self._open: tuple[int, Cursor[Item]] | None = None  # the number of a window within the pass, and what is at it

    def store(self, number: int) -> RowStore:
        """Window `number`, from 0 over all passes; made now if it is not there. Others that ask for it wait.

        UserError: the stream cannot be read, or too much of it is bad.
        """
        path = self.folder / f"window-{number}"
        with cache.alone(path):
            if not path.exists():
                self._make(number, path)
            store = self._kind.load(path)
            self._check(number, store)
            self._forget(number)
        return store

    def at_hand(self) -> int:
        """The number of a window that is there: the newest, else the first."""
        there = (folder.name.removeprefix("window-") for folder in self.folder.glob("window-*"))
        return max((int(number) for number in there), default=0)

    def facts(self) -> dict[str, Any]:
        """For run.json: windows that were made so far of a pass, by this run or another, and what was read for them."""
        known = self._known()
        read, _, tokens = (sum(counts) for counts in zip(*known.met.values(), strict=True)) if known.met else (0, 0, 0)
        made = {"windows": len(known.met), "window_rows": self.size, "windows_in_all": known.count}
        return {"documents": read, "tokens": tokens, "streaming": made}

    def _make(self, number: int, path: Path) -> None:
        within, cursor = self._reached(number)
        self._open = None  # what is left of a cursor after an error is nowhere
        with cache.whole(path, "some MiB for each thousand rows") as staging:
            self._kind.write(staging, self._taken(cursor))
        store: Any = self._kind.load(path)
        log(f"data:     window {number:,} of {store.report}")
        read, bad, _ = self._kind.met(store)
        self._note({"window": within, "read": read, "bad": bad, "tokens": store.facts()["tokens"]})
        self._passed(within, cursor)
        if not cursor.ended:
            self._open = within + 1, cursor

    def _reached(self, number: int) -> tuple[int, Cursor[Item]]:
        """(number within its pass, cursor at its beginning) of a window."""
        known = self._known()
        within = number % known.count if known.count else number
        if self._open and self._open[0] == within:
            return self._open
        at = min(within, len(known.places) - 1)
        cursor = self._source.open(known.places[at])
        while at < within:
            log(f"data:     {self.name}: reading over window {at:,}, to where window {within:,} begins")
            deque(self._taken(cursor), maxlen=0)
            self._passed(at, cursor)
            if cursor.ended:  # a pass has fewer windows
                return self._reached(number)
            at += 1
        return within, cursor

    def _taken(self, cursor: Cursor[Item]) -> Iterator[Item]:
        """A window's items."""
        for count, item in enumerate(cursor.take(self.size)):
            if count % ALIVE_EVERY == 0:
                self.alive(count)
            yield item

    def _passed(self, within: int, cursor: Cursor[Item]) -> None:
        """Keep what is known now that window `within` of a pass was read."""
        if cursor.ended:
            self._note({"windows": within + 1})
        elif within + 1 >= len(self._known().places):
            self._note({"begins": within + 1, "place": cursor.place})

    def _known(self) -> _Known:
        known = _Known()
        index = self.folder / INDEX
        for line in index.read_text(encoding="utf-8").splitlines() if index.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # a killed process's last
                continue
            if "windows" in entry:
                known.count = entry["windows"]
            elif "begins" in entry:
                if entry["begins"] == len(known.places):
                    known.places.append(entry["place"])
            else:
                known.met[entry["window"]] = entry["read"], entry["bad"], entry["tokens"]
        return known

    def _note(self, entry: dict[str, Any]) -> None:
        with (self.folder / INDEX).open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry)}")  # a line that was cut off stays by itself
            sync_stream(file)

    def _check(self, number: int, store: RowStore) -> None:
        """UserError if too much of what was read up to this window is bad; of an earlier pass nothing is asked again."""
        known = self._known()
        if known.count is not None and number >= known.count:
            return
        so_far = [met for window, met in known.met.items() if window <= number]
        read, bad = sum(met[0] for met in so_far), sum(met[1] for met in so_far)
        tally.check(self.name, read, bad, self._kind.met(store)[2], self.most_bad)

    def _forget(self, number: int) -> None:
        """Delete the windows that nobody is at: processes are one window apart at most."""
        near = {f"window-{one}" for one in (number - 1, number, number + 1)}
        for folder in [*self.folder.glob("window-*"), *self.folder.glob(".staging-window-*")]:
            if folder.name not in near:
                shutil.rmtree(folder, ignore_errors=True)
