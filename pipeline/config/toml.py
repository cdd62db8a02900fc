"""A TOML file as a dictionary, or one message that says how to mend it.

Takes a path; gives what tomli reads. Where it reads nothing, the line is looked at for what people bring from Python,
YAML and Windows: `True`, text without quotes, `key: value`, backslashes, a key written twice.
"""

import re
from pathlib import Path
from typing import Any

import tomli

from pipeline.console import UserError
from pipeline.foreign import TOML_LIMIT_BYTES, printable, read_bytes, toml_value

# How a line looks → how to mend it. The first that fits is said.
MENDS = (
    (r"[^#]*=\s*(True|False)\b", "TOML writes true and false in lower case"),
    (r"[^#]*=\s*(None|null|nil)\b", "TOML has no null: leave the key out"),
    (r'[^#]*=\s*"[^"]*\\', "a backslash in double quotes starts an escape: use single quotes, 'C:\\models'"),
    (r"\s*[A-Za-z_][\w.]*\s*:\s", "TOML writes key = value"),
    (r"[^#]*=\s*(#.*)?$", "the value is missing"),
    (r"[^#]*=\s*[~./A-Za-z_]", "text needs quotes: key = 'text'"),
    (r"\s*[A-Za-z_][\w.]*\s*(#.*)?$", "TOML writes key = value"),
)


def read(source: Path) -> dict[str, Any]:
    """What stands in `source`. Raises UserError with the line and the remedy."""
    try:
        text = read_bytes(source, "a configuration", TOML_LIMIT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} is not valid TOML: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        return toml_value(text)
    except tomli.TOMLDecodeError as error:
        raise UserError(f"{source}, {_explained(error, text)}") from None
    except ValueError as error:  # a limit of what a configuration may hold, or of Python's integers
        raise UserError(f"{source} is not valid TOML: {error}") from None


def _explained(error: tomli.TOMLDecodeError, text: str) -> str:
    """The line, what is wrong with it, and how to mend it."""
    lines = text.split("\n")
    number = min(error.lineno, len(lines))
    if "overwrite" in error.msg or "twice" in error.msg or "mutate" in error.msg:
        # tomli has read the line to its end, and perhaps the line break.
        number = next((n for n in range(number, 0, -1) if lines[n - 1].strip()), number)
        return f"line {number}: {_twice(lines, number)}"
    mend = next((mend for pattern, mend in MENDS if re.match(pattern, lines[number - 1])), None)
    return f"line {number} is not valid TOML: {printable(lines[number - 1].strip(), 80)}\n  " + (mend or error.msg)


def _twice(lines: list[str], number: int) -> str:
    """Where the key or table of line `number` stands already."""
    what = re.match(r"\s*(\[+[^\]]*\]+|[^=\s]+)", lines[number - 1])
    name = what[1] if what else lines[number - 1].strip()
    plain = name.strip("[] ")
    first = next(
        (n for n, line in enumerate(lines[: number - 1], 1) if re.match(rf"\s*\[*\s*{re.escape(plain)}\b", line)), 0
    )
    before = f" (first in line {first})" if first else ""
    if plain.endswith(("datasets", "groups")):
        return (
            f"{printable(name)} stands here again{before}: each of several has double brackets, [[{printable(plain)}]]"
        )
    return f"{printable(name)} is given twice{before}; remove one of them"
