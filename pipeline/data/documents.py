"""Takes a dataset's type and path (a file or a glob); gives its documents, one after the other, never all in memory.

'textfile' is .txt and .md, one document a file. 'doclist' is .json (a list of objects), .jsonl (an object a line) and
.parquet, one document a row, in the field `text`. A text file is read 1 MiB at a time; of the others one row (or a few
Parquet pages) is held at a time. Text is UTF-8; a byte order mark is dropped, \\r\\n and \\r are read as \\n.
"""

import codecs
import glob
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import UserError, warn

SUFFIXES = {"textfile": (".txt", ".md"), "doclist": (".json", ".jsonl", ".parquet")}
READ_BYTES = 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANKS = re.compile(r"[ \t\n\r]*")


class Source(NamedTuple):
    """A file of a dataset: where it is, and the name it is reported under: its path from the first wildcard on."""

    path: Path
    name: str


@dataclass(frozen=True)
class Document:
    """A text and its name: the file's, or `file#row` counted from 1. `pieces()` reads it from its beginning.

    A piece has READ_BYTES characters at most.
    """

    name: str
    pieces: Callable[[], Iterator[str]]

    @property
    def text(self) -> str:
        """The whole text at once."""
        return "".join(self.pieces())


def find(dataset_type: str, dataset_path: str) -> list[Source]:
    """The files that `dataset_path` names, sorted by path; `**` in the glob means any depth.

    Files with an ending that `dataset_type` does not read are left out with a warning. UserError when nothing is left.
    """
    if dataset_type not in SUFFIXES:
        raise UserError(f"dataset_type = '{dataset_type}' is not known; use one of: {', '.join(SUFFIXES)}")
    pattern = str(Path(dataset_path).expanduser())
    root = _fixed_root(pattern)
    found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
    files = [Path(path) for path in found if Path(path).is_file()]
    wanted = [path for path in files if path.suffix.lower() in SUFFIXES[dataset_type]]
    if not wanted:
        raise UserError(_nothing_found(dataset_type, dataset_path, root, files))
    if left_out := [path.name for path in files if path.suffix.lower() not in SUFFIXES[dataset_type]]:
        warn(
            f"dataset_path = '{dataset_path}': left out {_some(left_out)}, "
            f"since '{dataset_type}' reads {' and '.join(SUFFIXES[dataset_type])}"
        )
    return [Source(path, path.relative_to(root).as_posix()) for path in wanted]


def read(dataset_type: str, dataset_path: str) -> Iterator[Document]:
    """The documents of a dataset, lazily, in the order of `find`. UserError names file and place of bad input."""
    return read_sources(find(dataset_type, dataset_path))


def read_sources(sources: list[Source]) -> Iterator[Document]:
    """The documents of the given files, lazily."""
    for path, name in sources:
        match path.suffix.lower():
            case ".json":
                yield from _rows(path, name, _json_rows(path))
            case ".jsonl":
                yield from _rows(path, name, _jsonl_rows(path))
            case ".parquet":
                yield from _parquet_documents(path, name)
            case _:
                yield Document(name, partial(decoded, path))


def text_bytes(sources: list[Source]) -> int:
    """Bytes of text to come, for a progress bar: sizes of the files; for Parquet those of the uncompressed column."""
    total = 0
    for path, _ in sources:
        if path.suffix.lower() != ".parquet":
            total += path.stat().st_size
            continue
        metadata = _parquet(path).metadata
        for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
            columns = (group.column(j) for j in range(group.num_columns))
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
    return total


def decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of up to READ_BYTES characters. UserError with the first bad byte's offset."""
    with open(path, "rb") as file:
        yield from _decoded(iter(lambda: file.read(READ_BYTES), b""), str(path))


def _decoded(raws: Iterator[bytes], where: str) -> Iterator[str]:
    """Pieces of UTF-8, cut anywhere, as text with \\n for every end of line and without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    for raw in itertools.chain(raws, (b"",)):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset - held + error.start, error) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(raw)
        if text := newlines.decode(text, final=not raw):
            yield text


def _rows(path: Path, name: str, rows: Iterator[tuple[int, Any]]) -> Iterator[Document]:
    """A document for each (row number, object with a `text` field)."""
    for number, row in rows:
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            holds = f"an object with the fields {_some(list(row))}" if isinstance(row, dict) else repr(row)[:80]
            raise UserError(f"{path}: row {number} has no field 'text' that holds a string; it is {holds}")
        if half := _SURROGATE.search(text):
            raise UserError(
                f"{path}: the text of row {number} has half a surrogate pair (\\u{ord(half[0]):04x}) at "
                f"character {half.start()}, which is no character: write the pair whole or remove it"
            )
        del row
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        yield Document(f"{name}#{number}", partial(_slices, text))


def _slices(text: str) -> Iterator[str]:
    return (text[begin : begin + READ_BYTES] for begin in range(0, len(text), READ_BYTES))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline()
            if not line:
                return
            try:
                text = line.decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), offset + error.start, error) from None
            offset += len(line)
            del line  # a line may be a whole book: hold it once
            if _BLANKS.fullmatch(text):
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not valid JSON, column {error.colno}: {error.msg}") from None
            del text
            yield number, value
            del value


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each element of the file's one JSON list, holding one element and some MiB."""
    decoder, pieces = json.JSONDecoder(), decoded(path)
    text = next(pieces, "").lstrip()
    if not text.startswith("["):
        raise UserError(
            f"{path}: a .json file must be a list of objects with a field 'text'; it begins with {text[:40]!r}"
        )
    place, number = 1, 0
    while True:
        place = _past_blanks(text, place)
        try:
            if number == 0 and text.startswith("]", place):
                place += 1
                break
            value, end = decoder.raw_decode(text, place)
            end = _past_blanks(text, end)
            if end == len(text):
                raise json.JSONDecodeError("the list does not end", text, end)
        except json.JSONDecodeError as error:
            # Either the element is not all here yet or it is wrong. Doubling what is held keeps the retries linear.
            text, place = text[place:], 0
            more = "".join(itertools.islice(pieces, 1 + len(text) // READ_BYTES))
            if not more:
                raise UserError(f"{path}: element {number + 1} is not valid JSON: {error.msg}") from None
            text += more
            continue
        if text[end] not in ",]":
            found = text[end : end + 20]
            raise UserError(f"{path}: after element {number + 1} there should be ',' or ']', not {found!r}")
        number, place, ended = number + 1, end + 1, text[end] == "]"
        if place > READ_BYTES:  # an element may be a whole book: hold it once
            text, place = text[place:], 0
        yield number, value
        del value
        if ended:
            break
    for rest in itertools.chain((text[place:],), pieces):
        if not _BLANKS.fullmatch(rest):
            raise UserError(f"{path}: after the end of the list there should be nothing, not {rest.strip()[:20]!r}")


def _past_blanks(text: str, place: int) -> int:
    """The first place from `place` on that holds no blank."""
    match = _BLANKS.match(text, place)
    return match.end() if match else place


def _parquet(path: Path) -> Any:
    """The opened Parquet file, which must have a column `text`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: has no column 'text'; its columns: {_some(file.schema_arrow.names)}")
    kind = file.schema_arrow.field("text").type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(f"{path}: column 'text' holds {kind}, not strings")
    return file


def _parquet_documents(path: Path, name: str) -> Iterator[Document]:
    """A document for each row, decoded from Arrow's memory a piece at a time."""
    number = 0
    for batch in _parquet(path).iter_batches(batch_size=16, columns=["text"]):
        for value in batch.column(0):
            number += 1
            where = f"{path}: row {number}"
            if not value.is_valid:
                raise UserError(f"{where} has no text (null)")
            yield Document(f"{name}#{number}", partial(_decoded_buffer, value.as_buffer(), where))


def _decoded_buffer(buffer: Any, where: str) -> Iterator[str]:
    raws = (bytes(buffer[begin : begin + READ_BYTES]) for begin in range(0, len(buffer), READ_BYTES))
    return _decoded(raws, where)


def _not_utf8(where: str, offset: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(
        f"{where}: not UTF-8 at byte {offset} (0x{byte:02x}, {error.reason}): convert it, for example with "
        f"`iconv -f WINDOWS-1252 -t UTF-8`"
    )


def _fixed_root(pattern: str) -> Path:
    """The folder above a glob's first wildcard; for a plain path the folder it is in."""
    path = Path(pattern)
    if path.is_file() or not glob.has_magic(pattern):
        return path.parent
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))


def _nothing_found(dataset_type: str, dataset_path: str, root: Path, files: list[Path]) -> str:
    """Why a dataset has no files, and what there is instead."""
    wanted = " or ".join(SUFFIXES[dataset_type])
    message = f"dataset_path = '{dataset_path}' matches no {wanted} file. "
    names, endings = [path.name for path in files], {path.suffix.lower() for path in files}
    for other, suffixes in SUFFIXES.items():
        if any(suffix in endings for suffix in suffixes):
            return message + f"It matches {_some(names)}: for these set dataset_type = '{other}'"
    if files:
        return message + f"It matches {_some(names)}"
    if Path(dataset_path).expanduser().is_dir():
        ending = SUFFIXES[dataset_type][0]
        return message + f"It is a folder: write '{dataset_path.rstrip('/')}/**/*{ending}' for all that it holds"
    if not root.is_dir():
        above = next(folder for folder in root.absolute().parents if folder.is_dir())
        return message + f"There is no folder '{root}'; '{above}' holds {_some(_listing(above))}"
    return message + f"'{root}' holds {_some(_listing(root))}"


def _listing(folder: Path) -> list[str]:
    return sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())


def _some(names: list[str], most: int = 8) -> str:
    """Names in a line: all of a few, the first of many with the count of the rest."""
    if not names:
        return "nothing"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + rest
