"""Which steps may follow a training, and which of them contradict the rest of a configuration.

Takes plain values of a config; gives messages. pipeline/config/schema.py describes the keys themselves. What a family allows is
not here: that is for the fold and the exporter to say (pipeline/publishing/foresight.py asks them at the start of a run).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

Part = Literal["merge", "export:peft", "export:gguf", "card", "push"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order in which they are done
OF_ADAPTERS: tuple[Part, ...] = ("merge", "export:peft", "export:gguf")
HUB_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
LONGEST_HUB_ID = 96


def hub_id(value: str) -> str:
    """`value`, or ValueError where the Hub would not take it as a repository's id."""
    strange = not re.fullmatch(f"{HUB_NAME}/{HUB_NAME}", value) or len(value) > LONGEST_HUB_ID
    if strange or "--" in value or ".." in value or value.endswith(".git"):
        raise ValueError("not a repository's id on the Hub, which is OWNER/NAME of letters, digits, '-', '_' and '.'")
    return value


def conflicts(after_training: Sequence[Part], hub_model_id: str | None, full_fine_tune: bool) -> Iterator[str]:
    """What is wrong."""
    for part in PARTS:
        if after_training.count(part) > 1:
            yield f"after_training: '{part}' is named more than once"
    if "push" in after_training and hub_model_id is None:
        yield "after_training: 'push' needs hub_model_id = 'OWNER/NAME', the repository on the Hub"
    if full_fine_tune and (idle := [part for part in OF_ADAPTERS if part in after_training]):
        named = ", ".join(f"'{part}'" for part in idle)
        yield f"after_training: {named} with full_fine_tune = true: what is saved is a model already; remove it"
