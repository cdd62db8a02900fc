"""Floating-point operations of one operation, from the shapes of its arguments.

Takes an ATen operation and what it was called with; gives its FLOPs (a multiplication and an addition are two) where it
is a matrix product or attention, and None for anything else. Formulas are those of torch.utils.flop_counter; here are
the ones it lacks. Attention that is told to be causal counts half of the square, which is what its kernels execute:
forward 2·T·D a token (two products), backward 2.5 times that (five products; Dao 2023, arXiv:2307.08691, §3.2).
Attention with an explicit mask computes the whole square.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


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
