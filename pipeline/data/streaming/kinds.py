"""Takes a dataset's table, as its reader has it, and the tokenizer; gives the windows of its stream, of rows or of chunks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data import chunks
from pipeline.data.preparing import cache
from pipeline.data.reading import documents
from pipeline.data.reading.documents import Document
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.records import Record
from pipeline.data.reading.sources import Source
from pipeline.data.rows import build
from pipeline.data.rows.build import Recipe, RowSpec
from pipeline.data.rows.prepared import RowWork, of_records
from pipeline.data.rows.store import UnequalRows
from pipeline.data.store import ChunkStore
from pipeline.data.streaming.sources import documents_of, rows_of
from pipeline.data.streaming.windows import Windows
from pipeline.data.tokenizer import fingerprint
from pipeline.files import write_text

FORMAT = 1  # goes into the key: raise it when the same stream would give other windows


@dataclass(frozen=True)
class Rows:
    """Windows of conversations, completions or token ids."""

    how: Recipe

    def write(self, staging: Path, items: Iterator[Record]) -> None:
        """Make the rows of these records."""
        build.write(staging, self.how, of_records(RowWork(self.how.maker), items))

    def load(self, path: Path) -> UnequalRows:
        """The rows of a window."""
        return UnequalRows(path)

    def met(self, store: Any) -> tuple[int, int, list[str]]:
        """Rows of the stream, and bad ones."""
        return store.report.read, store.report.bad, store.report.bad_lines


@dataclass(frozen=True)
class TextSpec:
    """A dataset of text: as for `chunks.build`. `opened_as`: what its chunks are."""

    name: str
    kind: str
    path: str
    sequence_len: int
    join_lines: bool
    field_text: str
    opened_as: type[ChunkStore]


@dataclass(frozen=True)
class Chunks:
    """Windows of a text's chunks; what does not fill a window's last chunk is left out. Its first bad row ends the reading."""

    spec: TextSpec
    tokenizer: Any
    findings: Findings

    def write(self, staging: Path, items: Iterator[Any]) -> None:
        """Tokenise and cut these documents, or records with a text."""
        found: Iterator[Document] = items
        if self.spec.kind != "textfile":
            found = documents.of_records(items, self.spec.field_text, self.spec.join_lines, self.findings)
        chunks.write(staging, self.spec.name, found, self.spec.sequence_len, self.tokenizer, self.findings)

    def load(self, path: Path) -> ChunkStore:
        """The chunks of a window."""
        return self.spec.opened_as(path)

    def met(self, store: Any) -> tuple[int, int, list[str]]:
        """Documents of the stream."""
        return store.report.documents, 0, []


def of_rows(spec: RowSpec, tokenizer: Any, stops: list[int], cache_dir: Path, size: int) -> Windows[Record]:
    """The stream of a dataset of rows, in windows of `size` of them. UserError: as for `build.build`, of each window."""
    how = build.recipe(spec, tokenizer, stops)
    source = rows_of(spec.kind, spec.path, spec.name)
    folder = cache.keyed(cache_dir, spec.name, [FORMAT, size, source.identity, how.content])
    if how.template and how.template.prints_the_date:
        how = build.recipe(spec, tokenizer, stops, _first_day(folder, how.template.day))
    return Windows(spec.name, folder, source, size, Rows(how), spec.most_bad)


def _first_day(folder: Path, today: str) -> str:
    """The day on which the first window of a stream was made: a template that prints the date has that in all of them."""
    path = folder / "day"
    with cache.alone(path):
        if not path.is_file():
            write_text(path, today)
        return path.read_text(encoding="utf-8")


def of_text(spec: TextSpec, tokenizer: Any, cache_dir: Path, size: int) -> Windows[Any]:
    """The stream of a dataset of text, in windows of `size` documents. UserError: as for `chunks.build`."""
    marks, findings = chunks.checked_marks(tokenizer, spec.name, spec.sequence_len), Findings()

    def read(file: Source) -> Iterator[Document]:
        return documents.read_sources([file], join_lines=spec.join_lines, findings=findings)

    textual = spec.kind == "textfile"
    source: Any = documents_of(spec.path, read) if textual else rows_of(spec.kind, spec.path, spec.name)
    settings = [chunks.FORMAT, *marks, spec.sequence_len, spec.join_lines, spec.field_text, fingerprint(tokenizer)]
    folder = cache.keyed(cache_dir, spec.name, [FORMAT, size, source.identity, settings])
    return Windows(spec.name, folder, source, size, Chunks(spec, tokenizer, findings), 0.0)
