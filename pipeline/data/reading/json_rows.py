"""Takes a file of JSON, as a list or as an object a line; gives its values with their numbers, one at a time.

Whatever stands in a field that nobody reads is passed over: integers of any length too. What is not JSON, and what nests
deeper than Python's parser goes, is one error with file and line.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.console import UserError
from pipeline.data.reading import encodings
from pipeline.data.reading.encodings import Findings, file_text
from pipeline.foreign import printable

LONGEST_INTEGER = 4000  # digits: Python refuses to read more than 4300
_BLANKS = re.compile(r"[ \t\n\r]*")
_TOO_DEEP = "nests lists or objects hundreds deep, which is not read: leave that field out"


def _integer(digits: str) -> int | str:
    """An integer as JSON spells it; left as it is spelled where Python would refuse to read it."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else digits


_DECODER = json.JSONDecoder(parse_int=_integer)


def on_lines(path: Path, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of the file's text that is not blank."""
    number, parts = 1, list[str]()
    for piece in itertools.chain(pieces, ("\n",)):
        *lines, rest = piece.split("\n")
        del piece
        for line in lines:
            text = "".join([*parts, line])
            parts.clear()  # a line may be a whole book: hold it once
            if not _BLANKS.fullmatch(text):
                value = _value(text, path, number)
                del text, line
                yield number, value
                del value
            number += 1
        if rest:
            parts.append(rest)


def _value(line: str, path: Path, number: int) -> Any:
    """The value that stands on a line. UserError if none or more than one does."""
    where = f"{printable(path)}: line {number}"
    try:
        return _DECODER.decode(line)
    except json.JSONDecodeError as error:
        remedy = ""
        if number == 1 and path.suffix.lower() == ".json":
            remedy = f". {_FORM}"
        elif number == 1 and line.lstrip().startswith("["):
            remedy = ". A list of objects belongs in a .json file: rename it"
        raise UserError(f"{where} is not valid JSON, column {error.colno}: {error.msg}{remedy}") from None
    except RecursionError:
        raise UserError(f"{where} {_TOO_DEEP}") from None


_FORM = "A .json file must be a list of objects with a field 'text', or have an object on each line"


def listed(path: Path, findings: Findings) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of each element of the file's one JSON list, holding one element and some MiB.

    If the file has an object a line instead, (line number, value) of these.
    """
    pieces, opening = file_text(path, findings), list[str]()
    for piece in pieces:
        opening.append(piece)
        if piece.strip():
            break
    text = "".join(opening).lstrip()
    if text.startswith("{"):
        yield from on_lines(path, itertools.chain(opening, pieces))
        return
    if not text.startswith("["):
        raise UserError(f"{printable(path)}: {_FORM}; it begins with {printable(repr(text[:40]))}")
    del opening
    yield from _elements(text, pieces, printable(path))


def _elements(text: str, pieces: Iterator[str], where: str) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins `text` and goes on in `pieces`."""
    place, number = 1, 0
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
            raise UserError(f"{where}: element {number + 1} {_TOO_DEEP}") from None
        except json.JSONDecodeError as error:
            # Either the element is not all here yet or it is wrong. Doubling what is held keeps the retries linear.
            text, place = text[place:], 0
            more = "".join(itertools.islice(pieces, 1 + len(text) // encodings.READ_BYTES))
            if not more:
                raise UserError(f"{where}: element {number + 1} is not valid JSON: {error.msg}") from None
            text += more
            continue
        if text[end] not in ",]":
            found = printable(repr(text[end : end + 20]))
            raise UserError(f"{where}: after element {number + 1} there should be ',' or ']', not {found}")
        number, place, ended = number + 1, end + 1, text[end] == "]"
        if place > encodings.READ_BYTES:  # an element may be a whole book: hold it once
            text, place = text[place:], 0
        yield number, value
        del value
        if ended:
            break
    for rest in itertools.chain((text[place:],), pieces):
        if not _BLANKS.fullmatch(rest):
            found = printable(repr(rest.strip()[:20]))
            raise UserError(f"{where}: after the end of the list there should be nothing, not {found}")


def _past_blanks(text: str, place: int) -> int:
    """The first place from `place` on that holds no blank."""
    match = _BLANKS.match(text, place)
    return match.end() if match else place
