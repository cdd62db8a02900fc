"""What a test found out of a model's family, for docs/models.md: as properties of the test's case in pytest's XML."""

import json
import re
from collections.abc import Callable

from docs.models import PROPERTY


def note(
    record_property: Callable[..., None], family: str, column: str, works: bool | None, words: str | None = ""
) -> None:
    """That `column` of `family` works, or does not, or (None) that the family has nothing of the kind; `words`: how well, or
    why not."""
    lines = [line for line in (words or "").splitlines() if "dataset_path" not in line and "problems:" not in line]
    said = re.sub(r"\s+", " ", " ".join(lines)).strip()
    said = re.sub(r"/\S*/(?=base|pytest)\S*", "…", said)
    record_property(PROPERTY, json.dumps([family, column, works, said]))
