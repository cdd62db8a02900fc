"""A head and an embedding that are one tensor, and adapters that change one of them, or each in its own way.

Takes a `Base` and the adapters as they were read; gives both as the fold can take them. Where every adapter does the same to
the two they stay one. Else the head gets a tensor of its own, which begins as the embedding, and the model's config has to
say that they are no longer tied: transformers would else overwrite one of the two, or drop it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.artifacts.adapter.stored_form import places
from pipeline.console import UserError
from pipeline.formats.base_model import Base, config_ties, embedding_of, embeddings_of, same_values
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor, read_floats
from pipeline.names import HEAD, HEAD_MODULE, is_embedding

BLOCK_ITEMS = 2**19


def settled(base: Base, adapters: Sequence[Adapter], *, unmerge: bool = False) -> tuple[Base, list[Adapter], bool]:
    """The base and the adapters of a fold, and whether head and embedding of a base that ties them come out apart.

    With `unmerge` the base is a fold's result: what lies beneath a pair is then what the inverse gives, and no part of it.
    """
    adapters = [without_copies(base, adapter, unmerge=unmerge) for adapter in adapters]
    embedding = embedding_of(base)
    stored = HEAD in base.tensors
    if stored and config_ties(base.config) is not False and not embeddings_of(base):
        return base, [_of_the_head(base, adapter) for adapter in adapters], False
    if embedding is None or (stored and not config_ties(base.config)):
        return base, adapters, False
    touching = [touches(adapter) for adapter in adapters]
    if not any(touching):
        return base, adapters, False
    adapters = [_both(adapter) if touched else adapter for adapter, touched in zip(adapters, touching, strict=True)]
    if all(_does_the_same(adapter) for adapter in adapters):
        if not stored:
            return base, [_without_head(adapter) for adapter in adapters], False
        return base, adapters, not same_values(base.tensors[HEAD], embedding)
    return (base if stored else _with_head(base, embedding)), adapters, True


def touches(adapter: Adapter) -> bool:
    """Whether an adapter changes head or embedding."""
    modules = {*adapter.modules, *(name.rpartition(".")[0] for name in adapter.full)}
    return any(module == HEAD_MODULE or is_embedding(module) for module in modules)


def without_copies(base: Base, adapter: Adapter, *, unmerge: bool) -> Adapter:
    """The adapter without what lies beside it and is the base's own: embedding or head, perhaps in a narrower dtype.

    Raises UserError for a copy that is not the base's, of another shape.
    """
    if not adapter.copied:
        return adapter
    found = places(base, adapter.copied)
    if HEAD in adapter.copied and HEAD not in found and (embedding := embedding_of(base)):
        found |= places(base, [embedding.name])
        found[HEAD] = found[embedding.name]
    same = {
        name
        for name in adapter.copied
        if (name in found and _holds(base.tensors[found[name].tensor], adapter.full[name]))
        or (unmerge and name.rpartition(".")[0] in adapter.pairs)
    }
    full = {name: tensor for name, tensor in adapter.full.items() if name not in same}
    return replace(adapter, full=full, copied=adapter.copied - same)


def _both(adapter: Adapter) -> Adapter:
    """With what an adapter that trained the two as one holds of one of them, for the other too.

    PEFT says so of modules_to_save (ensure_weight_tying); what it saves unannounced is loaded into the one tensor.
    """
    table = next((name for name in adapter.full if is_embedding(name.removesuffix(".weight"))), None)
    if table is not None and HEAD not in adapter.full and (adapter.keeps_tie or table in adapter.copied):
        return replace(adapter, full={**adapter.full, HEAD: adapter.full[table]})
    if table is None and HEAD in adapter.full and (adapter.keeps_tie or HEAD in adapter.copied):
        raise UserError(
            f"{adapter.folder}: {HEAD} is in the file and the embedding is not, and the two were trained as one. Save the "
            "adapter again with both."
        )
    return adapter


def _does_the_same(adapter: Adapter) -> bool:
    """Whether the adapter does the same to head and embedding, or nothing to either."""
    if any(module == HEAD_MODULE or is_embedding(module) for module in adapter.maps):
        return False
    tables = [module for module in adapter.pairs if is_embedding(module)]
    one, other = adapter.pairs.get(HEAD_MODULE), adapter.pairs.get(tables[0]) if tables else None
    if (one is None) != (other is None):
        return False
    if one is not None and other is not None:
        equal = one.scaling == other.scaling and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)
        if not equal:
            return False
    head = adapter.full.get(HEAD)
    table = next((t for name, t in adapter.full.items() if is_embedding(name.removesuffix(".weight"))), None)
    return (head is None and table is None) or (head is not None and table is not None and torch.equal(head, table))


def _without_head(adapter: Adapter) -> Adapter:
    pairs = {module: pair for module, pair in adapter.pairs.items() if module != HEAD_MODULE}
    return replace(adapter, pairs=pairs, full={n: t for n, t in adapter.full.items() if n != HEAD})


def _of_the_head(base: Base, adapter: Adapter) -> Adapter:
    """The adapter of a base that holds the head for both. Raises UserError where it does not change the two alike."""
    if not touches(adapter):
        return adapter
    adapter = _both(adapter)
    if not _does_the_same(adapter):
        raise UserError(
            f"{adapter.folder} changes head or embedding, each in its own way, and {base.folder} holds {HEAD} alone "
            "for both. Save the model again with transformers (save_pretrained stores the embedding), and fold into that."
        )
    pairs = {module: pair for module, pair in adapter.pairs.items() if not is_embedding(module)}
    full = {name: t for name, t in adapter.full.items() if not is_embedding(name.removesuffix(".weight"))}
    return replace(adapter, pairs=pairs, full=full)


def _with_head(base: Base, embedding: StoredTensor) -> Base:
    """The base with a tensor for its head, in the embedding's file and read from the embedding's place."""
    head = replace(embedding, name=HEAD)
    file = next(name for name, header in base.headers.items() if embedding.name in {t.name for t in header.tensors})
    headers = {**base.headers, file: replace(base.headers[file], tensors=(*base.headers[file].tensors, head))}
    index = base.index
    if index is not None:
        index = {**index, "weight_map": {**index["weight_map"], head.name: file}}
    return replace(base, headers=headers, tensors={**base.tensors, head.name: head}, index=index)


def _holds(stored: StoredTensor, values: torch.Tensor) -> bool:
    """Whether `values` is the stored tensor, rounded to the dtype of `values` where that is narrower."""
    if stored.shape != tuple(values.shape) or stored.dtype not in FLOATS:
        return False
    rows, first = values.reshape(-1, values.shape[-1]), 0
    for block in read_floats(stored, values.shape[-1], BLOCK_ITEMS):
        if not torch.equal(block.to(values.dtype), rows[first : first + len(block)]):
            return False
        first += len(block)
    return True
