"""What others wrote, parsed in one place: whatever is in it, the outcome is a value or one UserError.

Takes files and texts from outside (configs, indices, adapters, manifests, names of tensors); gives plain Python values
after the limits on size and depth, or a UserError that names the file and the reason. `printable` is how any of it
reaches a terminal.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.console import UserError

JSON_LIMIT_BYTES = 100_000_000  # of a whole file: the largest indices of sharded models have a few megabytes


def printable(text: object, limit: int = 200) -> str:
    """`text` on one line without control characters, at most `limit` characters long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def parse_json(text: str | bytes, where: str) -> Any:
    """`text` as JSON. Raises UserError, naming `where` it stands, for anything that is not."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where} nests deeper than any file of its kind; it is damaged.") from None
    except ValueError as error:
        raise UserError(f"{where} does not read as JSON: {printable(error)}.") from None


def read_json(file: Path, what: str) -> Any:
    """The JSON value in `file`. Raises UserError, saying `what` the file is for, where there is none."""
    try:
        if file.stat().st_size > JSON_LIMIT_BYTES:
            raise UserError(f"{printable(file)} is too large to be {what}.")
        return parse_json(file.read_bytes(), printable(file))
    except FileNotFoundError:
        raise UserError(f"{printable(file)} is missing ({what}).") from None
    except OSError as error:
        raise UserError(f"{printable(file)} cannot be read ({what}): {error.strerror}.") from None


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError, saying `what` the file is for, where there is none."""
    content = read_json(file, what)
    if not isinstance(content, dict):
        raise UserError(f"{printable(file)} does not hold a JSON object.")
    return content
