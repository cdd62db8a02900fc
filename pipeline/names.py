"""Which layers a text names.

Takes a text such as '0:38' or '0:10,20', from the configuration or a command line; gives ranges of layer numbers.
"""

import re
from collections.abc import Iterable

LAYER_RANGES = re.compile(r"\s*\d+\s*(:\s*\d+\s*)?(,\s*\d+\s*(:\s*\d+\s*)?)*")


def layer_ranges(text: str) -> list[tuple[int, int]]:
    """'0:10,20' → [(0, 10), (20, 20)]; both ends inclusive, as in qlora-pipe. Raises ValueError."""
    if not LAYER_RANGES.fullmatch(text):
        raise ValueError("write layers as '0:38' (both ends included), '5', or several such separated by commas")
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"'{part.strip()}' runs backwards: write '{high}:{low}'")
        ranges.append((low, high))
    return ranges


def as_ranges(layers: Iterable[int]) -> str:
    """Layer numbers as `layer_ranges` reads them: [0, 1, 2, 7] → '0:2,7'."""
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}:{part[-1]}" for part in parts)
