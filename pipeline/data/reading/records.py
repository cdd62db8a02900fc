"""Takes files of rows; gives their rows one at a time, each with its place, as Python values. A bad row is one, not the end.

.jsonl and .json (json_rows.py), .csv, .parquet and .arrow, each also packed. In a CSV everything is text: `NA`, `null` and
nothing stay what they are. A row that cannot be read (no JSON, no UTF-8, a wrong number of fields) is a `Broken` value;
what makes a whole file unreadable is a UserError.
"""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import UserError
from pipeline.data.reading import encodings, json_rows
from pipeline.data.reading.encodings import Findings, file_text
from pipeline.data.reading.json_rows import Broken
from pipeline.data.reading.packed import ending, opened, seekable
from pipeline.data.reading.sources import Source
from pipeline.foreign import printable

ROWS_AT_ONCE = 256  # of a Parquet or Arrow file, as Python objects


class Record(NamedTuple):
    """A row as it stands in its file, or why it cannot be read. `where`: file and line, or file and number of the row."""

    where: str
    value: Any


def read(sources: list[Source], findings: Findings) -> Iterator[Record]:
    """The rows of all files, in order."""
    for path, name in sources:
        mark = ":" if ending(path) in (".jsonl", ".csv") else "#"  # the number of a line, or of a row
        for number, value in rows(path, findings):
            yield Record(f"{name}{mark}{number}", value)


def rows(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    """(number from 1, value or `Broken`) of each row of one file."""
    match ending(path):
        case ".jsonl":
            yield from _json_lines(path, findings)
        case ".json":
            yield from json_rows.listed(path, findings)
        case ".csv":
            yield from csv_rows(path, findings)
        case ".parquet":
            yield from _parquet(path)
        case _:
            yield from arrow_rows(path)


class _Line(NamedTuple):
    """A line of a file, bad bytes as half surrogates; `bad` says where the first of them is."""

    number: int
    text: str
    bad: str | None


def _lines(path: Path, findings: Findings) -> Iterator[_Line]:
    """The lines of a file with their ends, decoded one by one, so that a bad one is only itself."""
    with opened(path) as file:
        head = file.read(encodings.HEAD_BYTES)
        encoding = encodings.recognise(head, printable(path))
    if encoding.codec != "utf-8":
        yield from (_Line(n, f"{text}\n", None) for n, text in json_rows.lines(file_text(path, findings)))
        return
    with opened(path) as file:
        encodings.noted(head, printable(path), findings)
        offset = len(file.read(encoding.mark_bytes))
        for number, raw in enumerate(file, 1):
            try:
                yield _Line(number, raw.decode("utf-8"), None)
            except UnicodeDecodeError as error:
                bad = f"is not UTF-8 at byte {offset + error.start} of the file (0x{raw[error.start]:02x}, {error.reason})"
                yield _Line(number, raw.decode("utf-8", "surrogateescape"), bad)
            offset += len(raw)


def _json_lines(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    for number, text, bad in _lines(path, findings):
        if bad:
            yield number, Broken("not UTF-8", bad)
        else:
            yield from json_rows.on_lines(path, [(number, text.rstrip("\r\n"))])


def csv_rows(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    """(line on which it begins, {column: text} or `Broken`) of each row below the header."""
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    met: list[str] = []  # what is wrong with the bytes of the lines of this row
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for line in _lines(path, findings):
            number = line.number
            if line.bad:
                met.append(line.bad)
            yield line.text.replace("\r\n", "\n")

    reader = csv.reader(texts(), strict=True)
    header: list[str] | None = None
    while True:
        first = number + 1
        met.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise UserError(f"{printable(path)}: its first line is no header of a CSV: {error}") from None
            yield first, Broken("not valid CSV", f"is not valid CSV: {error}")
            continue
        if fields is None:
            break
        if not fields or (len(fields) == 1 and not fields[0].strip()):  # a blank line
            continue
        if header is None:
            header = _header(fields, path)
        elif met:
            yield first, Broken("not UTF-8", met[0])
        elif len(fields) != len(header):
            wrong = f"has {len(fields)} fields, the header {len(header)}"
            yield first, Broken("another number of fields than the header", wrong)
        else:
            yield first, dict(zip(header, fields, strict=True))
    if header is None:
        raise UserError(f"{printable(path)}: is empty; a .csv has a line with the columns' names first")


def _header(fields: list[str], path: Path) -> list[str]:
    if doubles := sorted({name for name in fields if fields.count(name) > 1}):
        raise UserError(f"{printable(path)}: has more than one column '{printable(doubles[0])}': rename one of them")
    return fields


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    with seekable(path) as file, _named(path, "Parquet"):
        yield from _objects(pq.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=ROWS_AT_ONCE))


def arrow_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, {column: value}) of an Arrow file, or of a stream, as `datasets` writes them."""
    with seekable(path) as file, _named(path, "Arrow"):
        yield from _objects(_arrow_batches(file))


def _arrow_batches(file: Any) -> Iterator[Any]:
    import pyarrow as pa

    source = pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(file, mode="r")
    with source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
            return
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def _objects(batches: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(begin, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield number, row


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """What Arrow says about a file becomes one UserError with its name."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: cannot be read as {kind}: {printable(error)}") from None
