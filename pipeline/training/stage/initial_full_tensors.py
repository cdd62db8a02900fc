"""`init_adapter`, the part beside the adapter: the weights that it holds in full.

Takes the folder and the names of what the run trains in full; gives these tensors, or one UserError where the adapter's
are others: without them, or with more, it would begin as another function.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.artifacts.adapter.adapter import PEFT_PREFIX, WEIGHTS_FILE
from pipeline.artifacts.adapter.schema import own_facts
from pipeline.console import UserError
from pipeline.formats.safetensors import Header, load_tensors, read_header

OF_PAIRS = re.compile(r".+\.(lora|peanut)_[AB]\.weight")  # of an adapter that says nothing of itself: PEFT's own


def read(folder: str, names: Collection[str], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensor of each of `names`, by its name in the model.

    `tied`: names that are another one's weight, as from `stage.tied_head`: an adapter may hold either, or both.
    UserError naming what the two differ in; nothing is asked of a folder without safetensors where `names` is empty.
    """
    where, path = f"init_adapter = '{folder}'", Path(os.path.expanduser(folder)) / WEIGHTS_FILE
    if not path.is_file():
        if names:
            raise UserError(f"{where}: there is no {WEIGHTS_FILE} in it, and this run trains modules in full")
        return {}
    header = read_header(path)
    stored = _stored(header)
    sources = {name: name if name in stored else _other(name, tied) for name in names}
    if lacking := [name for name, source in sources.items() if source not in stored]:
        raise UserError(
            f"{where}: it does not have {lacking[0]} in full, which this run trains; "
            "set trainable_modules to what it was trained on"
        )
    if superfluous := sorted((name for name in stored if name not in sources), key=lambda name: (name in tied, name)):
        raise UserError(
            f"{where}: it has {superfluous[0]} in full, which this run does not train; "
            "set trainable_modules to what it was trained on"
        )
    held = load_tensors(header, {stored[source] for source in sources.values()})
    tensors = {name: held[stored[source]] for name, source in sources.items()}
    for name, source in tied.items():
        if name in tensors and not tensors[name].equal(tensors[source]):
            raise UserError(f"{where}: its {name} and {source} differ, and in this model they are one weight")
    return tensors


def _stored(header: Header) -> dict[str, str]:
    """Names in the model of what the file holds in full, with the names in the file."""
    if own := own_facts(header):
        return {name: PEFT_PREFIX + name for name in (*own.get("full", ()), *own.get("tied", ()))}
    return {t.name.removeprefix(PEFT_PREFIX): t.name for t in header.tensors if not OF_PAIRS.fullmatch(t.name)}


def _other(name: str, tied: Mapping[str, str]) -> str:
    """The tied weight's other name."""
    return tied.get(name) or next((copy for copy, source in tied.items() if source == name), name)
