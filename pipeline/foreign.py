"""What others wrote, parsed in one place: whatever is in it, the outcome is a value or one UserError.

Takes files and texts from outside (configs, indices, adapters, headers, front matter, TOML); gives plain Python values
within the limits on size and depth, or a UserError that names the file and the reason. `printable` puts any of it on
one line of a message; what it would do to a terminal, console.py prevents at the door.
"""

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli
import yaml

from pipeline.console import CONTROLS, UserError

JSON_LIMIT_BYTES = 100_000_000  # of a whole file: the largest indices of sharded models have a few megabytes
TOML_LIMIT_BYTES = 1_000_000  # a run's configuration has a few kilobytes
CARD_LIMIT_BYTES = 10_000_000
FRONT_MATTER_LIMIT = 100_000  # characters; YAML is read slowly
DEPTH_LIMIT = 64  # configs of models nest five deep; what reads them after us recurses
DIGITS_LIMIT = 100  # of an integer: the longest that is met has 31 (a tokenizer's 10**30 for "no limit")
TOML_INTEGERS = range(-(2**63), 2**63)  # https://toml.io/en/v1.0.0#integer

_SURROGATE = re.compile("[\ud800-\udfff]")
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def printable(text: object, limit: int = 300) -> str:
    """`text` on one line without control characters, at most `limit` characters long."""
    shown = str(text)[: limit + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def has_controls(text: str) -> bool:
    """Whether there is a character in `text` that no name has: of control, of a line's or the writing's direction."""
    return CONTROLS.search(text) is not None or "\n" in text or "\t" in text


@contextmanager
def read_by_library(what: str) -> Iterator[None]:
    """Whatever a library raises while it reads others' data becomes a UserError: `what`, then the error's first line.

    Libraries written in Rust report some damage as a panic, which is no Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        lines = str(error).strip().splitlines()
        reason = printable(lines[0] if lines else "no reason given")
        raise UserError(f"{what}: {reason} ({type(error).__name__}).") from error


def read_bytes(file: Path, what: str, limit: int) -> bytes:
    """The content of a regular file. Raises UserError, saying `what` it is for, where there is none to be read."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{printable(file)} is not a regular file ({what}).")
        if found.st_size > limit:
            raise UserError(f"{printable(file)} has {found.st_size:,} bytes, too many for {what}.")
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{printable(file)} is missing ({what}).") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{printable(file)} cannot be read ({what}): {reason}.") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """`text`, UTF-8 where it is bytes, as JSON. Raises UserError, naming `where` it stands, for anything that is not.

    Also refused: a key that is there twice in one object, nesting beyond DEPTH_LIMIT, integers beyond DIGITS_LIMIT and
    half of a surrogate pair, which is not text.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=_object, parse_int=_integer)
        _check(value, DEPTH_LIMIT)
    except RecursionError:
        raise UserError(f"{where} nests deeper than any file of its kind. It is damaged.") from None
    except ValueError as error:
        raise UserError(f"{where} does not read as JSON: {printable(error)}.") from None
    return value


def read_json(file: Path, what: str) -> Any:
    """The JSON value in `file`. Raises UserError, saying `what` the file is for, where there is none."""
    return parse_json(read_bytes(file, what, JSON_LIMIT_BYTES), printable(file))


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError, saying `what` the file is for, where there is none."""
    content = read_json(file, what)
    if not isinstance(content, dict):
        raise UserError(f"{printable(file)} does not hold a JSON object.")
    return content


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """`text` as TOML. Raises UserError, naming `where` it stands, for anything that is not.

    Also refused: nesting beyond DEPTH_LIMIT, by brackets or by dotted keys, and integers of more than 64 bits.
    """
    try:
        return toml_value(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid TOML: {printable(error)}") from None


def toml_value(text: str) -> dict[str, Any]:
    """Like `parse_toml`, for callers with their own message: raises tomli.TOMLDecodeError, or ValueError for the limits."""
    try:
        value = tomli.loads(text)
    except RecursionError:
        raise ValueError(f"it nests more than {DEPTH_LIMIT} deep") from None
    check_toml(value)
    return value


def check_toml(value: Any) -> None:
    """Raise ValueError where tables nest too deep, an integer has more than 64 bits, or a text holds a NUL."""
    _check(value, DEPTH_LIMIT, TOML_INTEGERS)


def read_front_matter(file: Path) -> dict[str, Any]:
    """The YAML mapping that begins a README.md, between two lines `---`; empty where it has none.

    Raises UserError if the file cannot be read or its front matter is not a YAML mapping.
    """
    raw = read_bytes(file, "a model card", CARD_LIMIT_BYTES)
    with read_by_library(f"{printable(file)}: its front matter does not read"):
        found = _FRONT_MATTER.match(raw.decode("utf-8"))
        if found and len(found.group(1)) > FRONT_MATTER_LIMIT:
            raise ValueError(f"it has {len(found.group(1)):,} characters")
        value = yaml.safe_load(found.group(1)) if found else None
        _check(value, DEPTH_LIMIT)
        if value is not None and not isinstance(value, dict):
            raise ValueError("it is not a mapping")
    return value or {}


def yaml_object(file: Path, what: str, limit_bytes: int) -> dict[str, Any]:
    """The YAML mapping in `file`. Raises UserError, saying `what` the file is for, where there is none."""
    raw = read_bytes(file, what, limit_bytes)
    with read_by_library(f"{printable(file)}: it does not read as YAML"):
        value = yaml.safe_load(raw.decode("utf-8-sig"))
        _check(value, DEPTH_LIMIT)
        if not isinstance(value, dict):
            raise ValueError("it is not a mapping")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key '{printable(twice, 80)}' appears twice in one object; keep one of them")
    return found


def _integer(digits: str) -> int:
    if len(digits) > DIGITS_LIMIT:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _check(value: Any, depth_limit: int, integers: range | None = None) -> None:
    """Raise ValueError where `value` nests deeper than `depth_limit`, or holds a string that is not valid text.

    With `integers`, of a configuration: also for others than these, and a NUL in a text.
    """
    level, depth = [value], 0
    seen: set[int] = set()  # a YAML mapping may hold itself, or one thing a billion times
    while level:
        if depth > depth_limit:
            raise ValueError(f"it nests more than {depth_limit} deep")
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list | tuple | set):
                if id(one) in seen:
                    continue
                seen.add(id(one))
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list | tuple | set):
                inner += one
            elif isinstance(one, str):
                if _SURROGATE.search(one):
                    raise ValueError(f"'{printable(one, 40)}' holds half of a surrogate pair, which is not text")
                if integers is not None and "\0" in one:
                    raise ValueError(f"'{printable(one, 40)}' holds a NUL, which no name or path has")
            elif integers is not None and isinstance(one, int) and one not in integers:
                raise ValueError("an integer of more than 64 bits")
        level, depth = inner, depth + 1
