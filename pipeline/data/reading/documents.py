"""Takes a dataset's files; gives its documents, one after the other, never all in memory.

'textfile' is .txt and .md, one document a file. 'doclist' is .json (a list of objects, or an object a line), .jsonl,
.parquet, .csv and .arrow, packed or not, one document a row, in the field `text` or another. A text file is read 1 MiB at a
time; of the others one row (or a few pages) is held at a time. The first bad row ends the reading: a book lacks no chapter.
What a text may hold, and in which encodings: encodings.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.data.reading import encodings, json_rows, line_breaks, records
from pipeline.data.reading.encodings import UTF8, Findings, checked, file_text, text_of
from pipeline.data.reading.packed import TYPICAL_RATIO, ending, is_packed, seekable
from pipeline.data.reading.sources import Source, find, some
from pipeline.foreign import printable

_SURROGATE = re.compile("[\ud800-\udfff]")
_CHAT = ("messages", "conversations", "conversation", "chat", "dialogue")
_PAIRS = ("instruction", "output", "prompt", "completion", "question", "answer", "response", "chosen", "rejected")


@dataclass(frozen=True)
class Document:
    """A text and its name: the file's, or `file#row` counted from 1. `pieces()` reads it from its beginning.

    A piece has encodings.READ_BYTES characters at most.
    """

    name: str
    pieces: Callable[[], Iterator[str]]

    @property
    def text(self) -> str:
        """The whole text at once."""
        return "".join(self.pieces())


def read(dataset_type: str, dataset_path: str) -> Iterator[Document]:
    """The documents of a dataset, lazily, in the order of `find`. UserError names file and place of bad input."""
    return read_sources(find(dataset_type, dataset_path))


def read_sources(
    sources: list[Source], *, join_lines: bool = False, findings: Findings | None = None, field: str = "text"
) -> Iterator[Document]:
    """The documents of the given files, lazily; what reading their pieces meets is counted in `findings`.

    `join_lines`: line breaks inside paragraphs are joined where they can be the wrapping's. `field`: a row's, with its text.
    """
    met = Findings() if findings is None else findings
    for path, name in sources:
        match ending(path):
            case ".json":
                rows = _rows(path, name, json_rows.sound(json_rows.listed(path, met), path), field)
            case ".jsonl":
                found = json_rows.on_lines(path, json_rows.lines(file_text(path, met)))
                rows = _rows(path, name, json_rows.sound(found, path), field)
            case ".csv":
                rows = _rows(path, name, json_rows.sound(records.csv_rows(path, met), path), field)
            case ".arrow":
                rows = _rows(path, name, records.arrow_rows(path), field)
            case ".parquet":
                rows = _parquet_rows(path, name, field)
            case _:
                rows = iter([(name, printable(path), partial(file_text, path, met))])
        for title, where, pieces in rows:
            yield Document(title, partial(_text, where, pieces, join_lines, met))
            del pieces  # a row may be a whole book: hold it once


def of_records(found: Iterator[records.Record], field: str, join_lines: bool, findings: Findings) -> Iterator[Document]:
    """A document for each record (records.py) that was read, with its text in `field`; UserError at the first without."""
    for where, value in found:
        if isinstance(value, json_rows.Broken):
            raise UserError(f"{where} {value.sentence}")
        yield Document(
            where, partial(_text, where, partial(_slices, _field(value, field, where)), join_lines, findings)
        )
        del value


def _text(where: str, pieces: Callable[[], Iterator[str]], join_lines: bool, findings: Findings) -> Iterator[str]:
    noted = line_breaks.noted(checked(pieces(), where, findings), findings)
    return line_breaks.joined(noted, findings) if join_lines else noted


def text_bytes(sources: list[Source], field: str = "text") -> int:
    """Bytes of text to come, for a progress bar: sizes of the files; for Parquet those of the uncompressed column."""
    total = 0
    for path, _ in sources:
        if is_packed(path):
            total += TYPICAL_RATIO * path.stat().st_size
        elif ending(path) != ".parquet":
            total += path.stat().st_size
        else:
            metadata = _parquet(path, path, field).metadata
            for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
                columns = (group.column(j) for j in range(group.num_columns))
                total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return total


Row = tuple[str, str, Callable[[], Iterator[str]]]  # a document's name, where it is for messages, and its pieces


def _rows(path: Path, name: str, rows: Iterator[tuple[int, Any]], field: str) -> Iterator[Row]:
    """A document for each (row number, object with its text in `field`)."""
    file = printable(path)
    for number, row in rows:
        text = _field(row, field, f"{file}: row {number}")
        del row
        yield f"{name}#{number}", f"{file}: the text of row {number}", partial(_slices, text)
        del text


def _field(row: Any, field: str, where: str) -> str:
    """The text in a row's `field`, with \\n ends of lines. UserError where there is none."""
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        is_object = isinstance(row, dict)
        holds = f"an object with the fields {some(list(row))}" if is_object else printable(repr(row), 80)
        raise UserError(f"{where} has no field '{field}' that holds a string; it is {holds}{_advice(row, field)}")
    if half := _SURROGATE.search(text):
        raise UserError(
            f"{where}: its text has half a surrogate pair (\\u{ord(half[0]):04x}) at character {half.start()}, which is not a "
            "character: write the pair whole or remove it"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _slices(text: str) -> Iterator[str]:
    size = encodings.READ_BYTES
    return (text[begin : begin + size] for begin in range(0, len(text), size))


def _advice(row: Any, field: str) -> str:
    """What to do with rows of another form."""
    fields = list(row) if isinstance(row, dict) else []
    if field in fields:
        return f", and '{field}' is not a string: leave such rows out"
    if any(name in _CHAT for name in fields):
        return ". This is chat data: set dataset_type = 'chat'"
    if pair := [name for name in fields if name in _PAIRS]:
        return f". These are pairs ({' and '.join(pair)}): set dataset_type = 'completion'"
    return ". Name the field with the text in field_text" if fields else ""


def _parquet(path: Path, file: Any, field: str) -> Any:
    """The opened Parquet file, which must have a column `field`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where, strings = printable(path), (pa.string(), pa.large_string(), pa.string_view())
    try:
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=encodings.READ_BYTES)
        schema = parquet.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: cannot be read as Parquet: {printable(error)}") from None
    if schema.names.count(field) != 1:
        wrong = "more than one" if field in schema.names else "no"
        advice = "" if field in schema.names else _advice(dict.fromkeys(schema.names), field)
        raise UserError(f"{where}: has {wrong} column '{field}'; its columns: {some(schema.names)}{advice}")
    kind = schema.field(field).type
    if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in strings:
        raise UserError(f"{where}: column '{field}' holds {kind}, not strings")
    return parquet


def _parquet_rows(path: Path, name: str, field: str) -> Iterator[Row]:
    """A document for each row, decoded from Arrow's memory a piece at a time."""
    with seekable(path) as file:
        yield from _texts(path, name, _parquet(path, file, field).iter_batches(batch_size=16, columns=[field]))


def _texts(path: Path, name: str, batches: Iterator[Any]) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{printable(path)}: is damaged after row {number}: {printable(error)}") from None
        if batch is None:
            return
        column = batch.column(0)
        for value in column.dictionary_decode() if pa.types.is_dictionary(column.type) else column:
            number += 1
            where = f"{printable(path)}: row {number}"
            if not value.is_valid:
                raise UserError(f"{where} has no text (null)")
            yield f"{name}#{number}", where, partial(_buffer_text, value.as_buffer(), where)


def _buffer_text(buffer: Any, where: str) -> Iterator[str]:
    size = encodings.READ_BYTES
    raws = (bytes(buffer[begin : begin + size]) for begin in range(0, len(buffer), size))
    return text_of(raws, UTF8, where)
