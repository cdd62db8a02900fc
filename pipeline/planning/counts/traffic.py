"""Bytes that one operation reads and writes, from its schema and the tensors it was called with.

Takes an ATen operation, its arguments and its results; gives bytes. Each distinct tensor argument is read once and each
result written once; an argument that the operation writes to by its schema is read and written, but for those that it
overwrites. Views and allocations move nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# What these are given as their first argument they overwrite without reading it.
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_, aten.bernoulli_, aten.random_}
# Of their first argument these read as many elements as they return.
SELECTING = {aten.index, aten.index_select, aten.gather, aten.embedding}
# Of their first argument these read and write as many elements as their largest other argument has.
SCATTERING = {aten.index_put_, aten.index_add_, aten.index_copy_, aten.scatter_, aten.scatter_add_}
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def traffic_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """Bytes that one call of `func` (an OpOverload) read and wrote; None where it is a view or an allocation."""
    given, written = tensors_in((args, kwargs)), written_by(func, args, kwargs)
    made = made_by(given, out)
    if func._overloadpacket in ALLOCATING or not (made or written):
        return None
    changed = _bytes_scattered(given) if func._overloadpacket in SCATTERING else bytes_of(written)
    return _bytes_read(func, args, kwargs, out) + bytes_of(made) + changed


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in arguments or results, however nested."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> int:
    """A number that is the storage's own while it is alive."""
    return tensor.untyped_storage()._cdata


def made_by(given: list[Tensor], out: Any) -> list[Tensor]:
    """Results in storages of their own: no views of what was given, by any operation's account."""
    known = {storage_of(t) for t in given}
    return [t for t in tensors_in(out) if storage_of(t) not in known]


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operation writes to, by its schema."""
    arguments = func._schema.arguments
    named = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    return tensors_in([value for a, value in named if a.alias_info is not None and a.alias_info.is_write])


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the elements in memory, the same ones once; an expanded dimension is one element."""
    sizes = {}
    for t in tensors:
        elements = 1
        for size, stride in zip(t.shape, t.stride(), strict=True):
            elements *= size if stride or not size else 1
        sizes[storage_of(t), t.storage_offset(), tuple(t.shape), t.stride()] = elements * t.element_size()
    return sum(sizes.values())


def _bytes_read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    results = {argument.name for argument in func._schema.arguments if argument.is_out}
    arguments = tensors_in((args, {name: value for name, value in kwargs.items() if name not in results}))
    packet = func._overloadpacket
    if packet in OVERWRITING | SCATTERING:
        arguments = arguments[1:]
    if packet in SELECTING:
        return bytes_of(arguments[1:]) + bytes_of(tensors_in(out))
    return bytes_of(arguments)


def _bytes_scattered(given: list[Tensor]) -> int:
    """The first argument's elements that are read and written: as many as the largest other argument has."""
    touched = max((t.numel() for t in given[1:]), default=0)
    return 2 * touched * given[0].element_size()
