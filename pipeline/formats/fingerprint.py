"""Which model a folder holds, told by a few of its values.

Takes a `Base`; gives a digest that is another for another model of the same shapes (an instruct version, another seed, a fold's
result), and the same for the same weights in other files, or in a wider dtype. Of each kind of tensor (names that differ in
numbers alone) the first, the middle and the last are looked at, three rows of each: some hundred reads, however large the
model is. The head is left out, as a tied one may be stored or not.
"""

import hashlib
import json
import re
from collections.abc import Iterable

import torch

from pipeline.formats.base_model import Base
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor, pick_rows
from pipeline.names import HEAD

DIGITS = 32  # of the digest in hexadecimal: 128 bits


def fingerprint(base: Base) -> str:
    """The digest, in hexadecimal. Values are compared in bf16, so that a copy in a wider dtype is the same model."""
    kinds: dict[str, list[tuple[list[int], str]]] = {}
    for name in _with_numbers(base):
        if name != HEAD:
            numbers = [int(number) for number in re.findall(r"\d+", name)]
            kinds.setdefault(re.sub(r"\d+", "#", name), []).append((numbers, name))
    chosen = []
    for kind in sorted(kinds):
        members = sorted(kinds[kind])
        chosen += [members[index][1] for index in sorted({0, len(members) // 2, len(members) - 1})]
    return _digest(base, chosen)


def of_all(base: Base) -> str:
    """As `fingerprint`, of the config and of every tensor, the head too: for what is computed with the model and kept."""
    config = hashlib.sha256(json.dumps(base.config, sort_keys=True).encode()).hexdigest()
    return config[:DIGITS] + _digest(base, sorted(_with_numbers(base)))


def _with_numbers(base: Base) -> list[str]:
    return [name for name, tensor in base.tensors.items() if tensor.dtype in FLOATS and tensor.n_bytes]


def _digest(base: Base, names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        _add(digest, base.tensors[name])
    return digest.hexdigest()[:DIGITS]


def _add(digest: "hashlib._Hash", tensor: StoredTensor) -> None:
    digest.update(f"{tensor.name} {tensor.shape}\n".encode())
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = tensor.n_bytes // FLOATS[tensor.dtype].itemsize // columns
    for values in pick_rows(tensor, columns, sorted({0, rows // 2, rows - 1})):
        digest.update(values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
