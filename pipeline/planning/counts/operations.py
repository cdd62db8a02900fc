"""What one operation costs: its floating-point operations, from the shapes of its arguments, and the bytes it moves.

Takes an ATen operation and what it was called with. `flops_of` gives its FLOPs (a multiplication and an addition are two)
where it is a matrix product or attention, and None for anything else. Formulas are those of torch.utils.flop_counter; here
are the ones it lacks. Attention that is told to be causal counts half of the square, which is what its kernels execute:
forward 2·T·D a token (two products), backward 2.5 times that (five products; Dao 2023, arXiv:2307.08691, §3.2). Attention
with an explicit mask computes the whole square.

`traffic_of` gives the bytes read and written, from the operation's schema. Each distinct tensor argument is read once and
each result written once; an argument that the operation writes to by its schema is read and written, but for those that it
overwrites. Views and allocations move nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

# What these are given as their first argument they overwrite without reading it.
OVERWRITING = {aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_, aten.bernoulli_, aten.random_}
# Of their first argument these read as many elements as they return.
SELECTING = {aten.index, aten.index_select, aten.gather, aten.embedding}
# Of their first argument these read and write as many elements as their largest other argument has.
SCATTERING = {aten.index_put_, aten.index_add_, aten.index_copy_, aten.scatter_, aten.scatter_add_}
ALLOCATING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def flops_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float | None:
    """FLOPs of one call of `operation` (an OpOverload) that returned `out`; None where it is not a product."""
    packet = operation._overloadpacket
    if own := OWN_FORMULAS.get(packet):
        count = own(*args, **kwargs)
    elif packet in flop_registry:
        count = flop_registry[packet](*args, **kwargs, out_val=out)
    else:
        return None
    return count / 2 if _is_causal(operation, args, kwargs) else count


def _is_causal(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in operation._schema.arguments]
    return bool(dict(zip(names, args, strict=False)).get("is_causal") or kwargs.get("is_causal"))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _grouped(one: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> int:
    """Grouped products, whatever the groups: [S, K]·[E, K, N], [M, S]·[S, N], [E, M, K]·[E, K, N], [E, M, K]·[K, S]."""
    rows = one.numel() // len(one) if one.dim() == 3 and other.dim() == 2 else one.numel()
    return 2 * rows * other.shape[-1]


def _matrix_vector(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * matrix.numel()


OWN_FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
    aten.mv: _matrix_vector,
}


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
