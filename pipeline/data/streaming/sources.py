"""Takes a dataset's type and path; gives the stream of its rows or documents: of files here, of the Hub's, at an address.

Files on this machine are read by our own readers; a place is (number of the file, how many of its rows are done), and going on
there reads over these. What is elsewhere is read by `datasets`, whose stream knows its place by itself.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pipeline.console import UserError
from pipeline.data.reading import records, remote
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.packed import ending
from pipeline.data.reading.records import Record
from pipeline.data.reading.sources import SUFFIXES, Source, find, some
from pipeline.data.streaming.cursor import Cursor, Item, Place
from pipeline.foreign import printable

# Ending → the builder of `datasets`. Its CSV would make null of NA and of nothing.
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class LocalFiles(Generic[Item]):
    """What `read` finds in files on this machine, one after the other."""

    files: list[Source]
    read: Callable[[Source], Iterator[Item]]

    @property
    def identity(self) -> list[Any]:
        """Names, sizes and times: to read what is in them is what a stream is there to do without."""
        stats = [file.path.stat() for file in self.files]
        return [(str(f.path), s.st_size, s.st_mtime_ns) for f, s in zip(self.files, stats, strict=True)]

    def open(self, place: Place) -> Cursor[Item]:
        """From (number of a file, items of it that are done) on."""
        first, done = place or (0, 0)
        at = [first, done]

        def items() -> Iterator[Item]:
            for number in range(first, len(self.files)):
                over = done if number == first else 0
                for count, item in enumerate(itertools.islice(self.read(self.files[number]), over, None), over + 1):
                    at[:] = [number, count]
                    yield item

        return Cursor(items(), lambda: list(at))


@dataclass(frozen=True)
class RemoteRows:
    """Rows of files elsewhere (addresses that fsspec knows), by `datasets`. `builder`: of `datasets`. `where`: for messages."""

    name: str
    where: str
    builder: str
    addresses: list[str]
    identity: list[Any]

    def open(self, place: Place) -> Cursor[Record]:
        """From (rows that are done, the state of the stream of `datasets`) on."""
        done, state = (int(place[0]), place[1]) if place else (0, None)
        with remote.explained(self.where):
            from datasets import load_dataset  # takes seconds to import

            stream = load_dataset(self.builder, data_files=self.addresses, split="train", streaming=True)
            if state is not None:
                stream.load_state_dict(state)
        at = [done]

        def items() -> Iterator[Record]:
            rows = enumerate(iter(stream), done + 1)
            while True:
                with remote.explained(f"{self.where}, row {at[0] + 1:,}"):
                    found = next(rows, None)
                if found is None:
                    return
                at[0] = found[0]
                yield Record(f"{self.name}#{found[0]}", found[1])

        def now() -> Place:
            return [at[0], stream.state_dict() if at[0] > done else state]

        return Cursor(items(), now)


def documents_of(path: str, read: Callable[[Source], Iterator[Item]]) -> LocalFiles[Item]:
    """The documents of text files. UserError: no files, or files that are elsewhere."""
    if path.startswith("hub:") or remote.is_address(path):
        raise UserError(
            f"dataset_path = '{printable(path)}': text files that are not on this machine are not streamed; as rows of "
            "Parquet or JSON Lines they are, with dataset_type = 'doclist'"
        )
    return LocalFiles(find("textfile", path), read)


def rows_of(kind: str, path: str, name: str) -> "LocalFiles[Record] | RemoteRows":
    """The rows of a dataset of this type. UserError: no files, or none that can be streamed from where they are."""
    where = f"dataset_path = '{printable(path)}'"
    if path.startswith("hub:"):
        from pipeline.data.reading import hub  # its client takes a while to import

        found = [(address, address) for address in hub.addresses(path)]  # it names the commit
    elif remote.is_address(path):
        found = remote.addresses(path, lambda file: ending(file) in SUFFIXES[kind])
    else:
        return LocalFiles(find(kind, path), lambda file: records.read([file], Findings()))
    builders = {BUILDERS.get(ending(Path(address))) for address, _ in found}
    if len(builders) != 1 or None in builders:
        endings = sorted({ending(Path(address)) or address for address, _ in found})
        raise UserError(
            f"{where}: from elsewhere files of one kind are streamed, {', '.join(BUILDERS)}; it has {some(endings)}"
        )
    (builder,) = builders
    assert builder is not None
    addresses, marks = zip(*found, strict=True)
    return RemoteRows(name, where, builder, list(addresses), list(marks))
