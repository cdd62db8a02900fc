"""Templates of Markdown, in which every value is text: what is put into one is shown, and is never markup.

Takes values of any origin; gives Markdown that shows them: no HTML, link, picture or end of a cell comes of them. jinja2's `safe`
lets through what is Markdown already.
"""

import html
import json
import re
import shlex
from pathlib import Path

import jinja2
from markupsafe import Markup

from pipeline.foreign import printable
from pipeline.generation.shown import ending
from pipeline.pages import templates

LONGEST = 2000  # characters of a text of others


def environment() -> jinja2.Environment:
    """Templates of this folder, with the filters below."""
    made = templates.environment(Path(__file__).parent, _shown)
    made.filters |= {"block": in_block, "code": in_code, "ending": ending, "python": in_python, "shell": in_shell}
    return made


def _shown(value: object) -> Markup:
    """As Markdown; markupsafe's own escaping then leaves it as it is."""
    return value if isinstance(value, Markup) else Markup(in_prose(str(value)))


def in_prose(text: str) -> str:
    """`text` as Markdown that shows it: neither HTML nor a link, a picture or the end of a cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(text, LONGEST), quote=False))


def in_code(text: str) -> Markup:
    """`text` between single backticks, within which HTML means nothing."""
    return Markup(printable(text, LONGEST).replace("`", "'"))


def in_block(text: str) -> Markup:
    """`text` as an indented block, which nothing in it can end."""
    return Markup("\n".join(f"    {printable(line, LONGEST)}" for line in text.split("\n")))


def in_python(text: str) -> Markup:
    """`text` as Python writes it."""
    return Markup(json.dumps(printable(text), ensure_ascii=False))


def in_shell(text: str) -> Markup:
    """`text` as one word of a command."""
    return Markup(shlex.quote(printable(text)))
