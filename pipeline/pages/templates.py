"""jinja2 templates, which lie beside the code that fills them.

Takes a folder; gives an environment in which every value is text of any origin: escaped, unless a template says `safe`. A name
that is not given is an error (jinja2.UndefinedError) and not an empty text.
"""

from collections.abc import Callable
from pathlib import Path

import jinja2


def environment(folder: Path, shown: Callable[[object], object] | None = None) -> jinja2.Environment:
    """For the templates of `folder`. `shown`: makes of every value what is then escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
