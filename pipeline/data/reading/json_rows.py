"""Takes a file of JSON, as a list or as an object a line; gives its values with their numbers, one at a time.

Whatever stands in a field that nobody reads is passed over: integers of any length too. A line that is not JSON, or nests
deeper than Python's parser goes, is a `Broken` value, which `sound` makes an error with file and line; a list that breaks
off is an error at once, as nobody knows where it would go on.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.data.reading import encodings
from pipeline.data.reading.encodings import Findings, file_text
from pipeline.data.reading.packed import ending
from pipeline.foreign import printable

LONGEST_INTEGER = 4000  # digits: Python refuses to read more than 4300
_LINE = "\n"
_BLANKS = re.compile(r"[ \t\n\r]*")
_TOO_DEEP = "nests lists or objects hundreds deep, which is not read: leave that field out"


def _integer(digits: str) -> int | str:
    """An integer as JSON spells it; left as it is spelled where Python would refuse to read it."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else digits


_DECODER = json.JSONDecoder(parse_int=_integer)


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read: the reason, as it is counted, and the whole sentence after the row's place."""

    reason: str
    sentence: str


def lines(pieces: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(number, text without its end) of each line of a text that comes in pieces."""
    number, parts = 1, list[str]()
    for piece in itertools.chain(pieces, ("\n",)):
        *ended, rest = piece.split("\n")
        del piece
        for line in ended:
            text = "".join([*parts, line])
            parts.clear()  # a line may be a whole book: hold it once
            del line
            yield number, text
            del text
            number += 1
        if rest:
            parts.append(rest)


def on_lines(path: Path, numbered: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    """(line number, value or `Broken`) of each line that is not blank."""
    for number, text in numbered:
        if not _BLANKS.fullmatch(text):
            value = value_of(text, path, number)
            del text
            yield number, value
            del value


def sound(rows: Iterable[tuple[int, Any]], path: Path) -> Iterator[tuple[int, Any]]:
    """The same rows; UserError at the first that is `Broken`."""
    for number, value in rows:
        if isinstance(value, Broken):
            raise UserError(f"{printable(path)}: line {number} {value.sentence}")
        yield number, value
        del value


def value_of(line: str, path: Path, number: int) -> Any:
    """The value that stands on a line; `Broken` if none or more than one does."""
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        remedy = ""
        if number == 1 and ending(path) == ".json":
            remedy = f". {_FORM}"
        elif number == 1 and line.lstrip().startswith("["):
            remedy = ". A list of objects belongs in a .json file: rename it"
        return Broken("not valid JSON", f"is not valid JSON, column {error.colno}: {error.msg}{remedy}")
    except RecursionError:
        return Broken("nests too deep", _TOO_DEEP)


_FORM = (
    "A .json file must be a list of objects, or an object with one in 'data' or 'rows', or have an object on each line"
)
_LIST_INSIDE = re.compile(r'\{\s*"(?:data|rows)"\s*:\s*(?=\[)')


def listed(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each element of the file's one JSON list, holding one element and some MiB.

    The list is the whole file, or the field `data` or `rows` of its one object. If the file has an object a line instead,
    (line number, value or `Broken`) of these.
    """
    pieces, opening = file_text(path, findings), list[str]()
    for piece in pieces:
        opening.append(piece)
        if piece.strip():
            break
    whole = "".join(opening)
    text = whole.lstrip()
    line = 1 + whole.count("\n", 0, len(whole) - len(text))
    del whole
    if inside := _LIST_INSIDE.match(text):
        del opening
        line += text.count("\n", 0, inside.end())
        yield from _elements(text[inside.end() :], pieces, printable(path), line, in_object=True)
    elif text.startswith("{"):
        yield from _object_or_lines(path, itertools.chain(opening, pieces))
    elif text.startswith("["):
        del opening
        yield from _elements(text, pieces, printable(path), line)
    else:
        raise UserError(f"{printable(path)}: {_FORM}; it begins with {printable(repr(text[:40]))}")


def _object_or_lines(path: Path, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """The list that one object, alone in the file, has among other fields; else an object a line."""
    numbered = lines(pieces)
    begin = list(itertools.islice(numbered, 1))
    while not begin[-1][1].strip():
        begin += itertools.islice(numbered, 1)
    whole = _object(begin[-1][1])
    if whole is None:  # over several lines
        begin += numbered
        whole = _object("\n".join(text for _, text in begin))
    else:
        begin += itertools.islice(numbered, 1)
        whole = None if begin[-1][1].strip() and len(begin) > 1 else whole
    found = [whole[key] for key in ("data", "rows") if whole and isinstance(whole.get(key), list)]
    if len(found) == 1 and not any(text.strip() for _, text in numbered):
        yield from enumerate(found[0], 1)
    else:
        yield from on_lines(path, itertools.chain(begin, numbered))


def _object(text: str) -> dict[str, Any] | None:
    """The one JSON object that a text is."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _elements(
    text: str, pieces: Iterator[str], where: str, line: int, *, in_object: bool = False
) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins `text`, on line number `line`, and goes on in `pieces`; `in_object`: its object ends
    after it."""
    place, number = 1, 0

    def at(end: int) -> str:
        return f"{where}: line {line + text.count(_LINE, 0, end)}"

    while True:
        place = _past_blanks(text, place)
        try:
            if number == 0 and text.startswith("]", place):
                place += 1
                break
            value, end = _DECODER.raw_decode(text, place)
            end = _past_blanks(text, end)
            if end == len(text):
                raise json.JSONDecodeError("the list does not end", text, end)
        except RecursionError:
            raise UserError(f"{at(place)}: element {number + 1} {_TOO_DEEP}") from None
        except json.JSONDecodeError as error:
            # Either the element is not all here yet or it is wrong. Doubling what is held keeps the retries linear.
            wrong = at(error.pos)
            line, text, place = line + text.count(_LINE, 0, place), text[place:], 0
            more = "".join(itertools.islice(pieces, 1 + len(text) // encodings.READ_BYTES))
            if not more:
                raise UserError(f"{wrong}: element {number + 1} is not valid JSON: {error.msg}") from None
            text += more
            continue
        if text[end] not in ",]":
            found = printable(repr(text[end : end + 20]))
            raise UserError(f"{at(end)}: after element {number + 1} there should be ',' or ']', not {found}")
        number, place, ended = number + 1, end + 1, text[end] == "]"
        if place > encodings.READ_BYTES:  # an element may be a whole book: hold it once
            line, text, place = line + text.count(_LINE, 0, place), text[place:], 0
        yield number, value
        del value
        if ended:
            break
    rest = itertools.chain((text[place:],), pieces)
    if in_object:
        _check_object_ends("".join(rest), where)
        return
    for more in rest:
        if not _BLANKS.fullmatch(more):
            found = printable(repr(more.strip()[:20]))
            raise UserError(f"{where}: after the end of the list there should be nothing, not {found}")


def _check_object_ends(rest: str, where: str) -> None:
    """UserError unless what follows the list closes its object, which may have other fields but no second such list."""
    try:
        others = _DECODER.decode("{" + rest.lstrip().removeprefix(","))
    except (ValueError, RecursionError):
        found = printable(repr(rest.strip()[:20]))
        raise UserError(f"{where}: after the list the object should end, not {found}; {_FORM}") from None
    if any(isinstance(others.get(key), list) for key in ("data", "rows")):
        raise UserError(f"{where}: has a list in 'data' and another in 'rows': leave one of them")


def _past_blanks(text: str, place: int) -> int:
    """The first place from `place` on that holds no blank."""
    match = _BLANKS.match(text, place)
    return match.end() if match else place
