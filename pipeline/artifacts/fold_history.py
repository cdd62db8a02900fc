"""What was folded into a model before, as its fold report remembers it.

Takes a model's folder; gives the earlier folds, oldest first, as `fold_report.json` has them, and the adapters that are still
in the weights. An adapter is known again by the SHA-256 of its file of weights; reports of older versions have names alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts.adapter.adapter import WEIGHTS_FILE
from pipeline.foreign import read_object
from pipeline.names import public_name

REPORT_FILE = "fold_report.json"
# What a report says of a fold as a whole; the figures of its tensors are not handed on.
HANDED_ON = ("version", "base", "base_fingerprint", "unmerge", "base_quant", "base_dtype", "adapters")
Folded = tuple[str, str | None, float]  # an adapter's name, digest and --scale


def earlier_folds(folder: Path) -> list[dict[str, Any]]:
    """The folds that made the model in `folder`, oldest first; none where it has no report."""
    file = folder / REPORT_FILE
    if not file.is_file():
        return []
    report = read_object(file, "the report of an earlier fold")
    return [*_objects(report.get("earlier")), {key: report[key] for key in HANDED_ON if key in report}]


def still_in(folds: Sequence[dict[str, Any]]) -> list[Folded]:
    """The adapters that were folded and not taken out again, in order."""
    found: list[Folded] = []
    for fold in folds:
        for name, digest, scale in _adapters(fold):
            if not fold.get("unmerge"):
                found.append((name, digest, scale))
            elif same := [one for one in found if is_same(one, (name, digest, scale))]:
                found.remove(same[-1])
    return found


def is_same(one: Folded, other: Folded) -> bool:
    """Whether two are the same adapter: by digest, or by name where one of them has none."""
    return one[1] == other[1] if one[1] and other[1] else one[0] == other[0]


def describe(folder: Path, scale: float) -> Folded:
    """An adapter that is to be folded."""
    return public_name(str(folder)), adapter_digest(folder), scale


def adapter_digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, of an adapter's file of weights."""
    file = folder / WEIGHTS_FILE
    with (file if file.is_file() else folder / "adapter_model.bin").open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _adapters(fold: dict[str, Any]) -> Iterator[Folded]:
    for entry in _objects(fold.get("adapters")):
        name, digest, scale = entry.get("adapter"), entry.get("digest"), entry.get("scale")
        known = isinstance(scale, int | float) and not isinstance(scale, bool)
        yield str(name), digest if isinstance(digest, str) else None, float(scale) if known else 1.0  # type: ignore[arg-type]


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
