"""Recomputes of a decoder layer only what its backward needs and has not kept.

`analyse` takes one forward of a layer and gives, for each level, what becomes of the product with each weight matrix when
the layer runs again: 'keep' (its result was kept), 'skip' (nothing that backward needs depends on it), or 'run'.
`recompute` then runs the layer under torch's checkpointing with two dispatch modes that act on this.

Which product is which is read off the data's way through the layer, not off names: what a result reaches is followed
through every operation to the tensors that autograd saves. In a parallel block (Cohere) o_proj's and down_proj's results
reach none; in a sequential one o_proj's reaches the second norm and the MLP, so there it runs again.

The idea of keeping some operations' results under a dispatch mode: torch.utils.checkpoint's selective checkpointing
(BSD-3), which recomputes all others.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from pipeline.families import FAMILIES
from pipeline.model.memory.levels import RecomputeLevel

# Ends of the names of trained matrices of few rows, in our layers and in PEFT's.
SMALL = tuple(
    {end for row in FAMILIES.values() for name in row.small for end in (f".{name}", f".lora_{name}.default.weight")}
)
ATTENTION = "attention"  # the key of attention itself, beside the names of weights
aten = torch.ops.aten
# A product with a weight, by the operation's name, and the shape of its result from its arguments. By name, so that what
# bitsandbytes registers can stand here without its import.
PRODUCTS: dict[str, Callable[..., list[int]]] = {
    "aten.mm.default": lambda a, b: [a.shape[0], b.shape[1]],
    "aten.addmm.default": lambda c, a, b, **_: [a.shape[0], b.shape[1]],
    "aten.linear.default": lambda x, w, *_: [*x.shape[:-1], w.shape[0]],
    "bitsandbytes.gemm_4bit.default": lambda x, w, shape, *_, **__: [*x.shape[:-1], shape[0]],
}
ALLOCATIONS = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}

Actions = dict[str, str]  # weight's name within the layer, or ATTENTION → 'keep', 'skip'; others run


class Store(Protocol):
    """Where kept tensors are between forward and backward. A handle is good for one `get`."""

    def put(self, tensor: Tensor) -> Any: ...

    def get(self, handle: Any) -> Tensor: ...


class OnDevice:
    """Keeps tensors where they are."""

    def put(self, tensor: Tensor) -> Tensor:
        return tensor

    def get(self, handle: Tensor) -> Tensor:
        return handle


def analyse(layer: nn.Module, run: Callable[[], object]) -> dict[RecomputeLevel, Actions]:
    """Actions for each level from ADAPTER up. `run` calls the layer's forward as training does; it is called five times
    at most.

    `layer` may be on fake tensors. The tensors autograd saves are observed, so gradients must be enabled.
    """
    weights = {name: p for name, p in layer.named_parameters() if p.dim() == 2}
    adapters = {name for name, p in weights.items() if p.requires_grad and _reads_little(name)}

    def reached(kept: set[str]) -> _Dataflow:
        flow = _Dataflow(_keys(layer, weights), kept)
        with torch.autograd.graph.saved_tensors_hooks(flow.saves, lambda t: t), flow:
            run()
        return flow

    kept: set[str] = set()
    flow = reached(kept)
    actions: dict[RecomputeLevel, Actions] = {}
    for level in (
        RecomputeLevel.ADAPTER,
        RecomputeLevel.ATTENTION,
        RecomputeLevel.PROJECTIONS,
        RecomputeLevel.EVERYTHING,
    ):
        candidates = {
            RecomputeLevel.ADAPTER: adapters,
            RecomputeLevel.ATTENTION: {ATTENTION},
            RecomputeLevel.PROJECTIONS: flow.feeds_attention,
            RecomputeLevel.EVERYTHING: flow.needed,
        }[level]
        more, seen = candidates & flow.needed, flow.seen
        if more - kept:
            kept = kept | more
            flow = reached(kept)
        unneeded = (seen | kept) - flow.needed - kept
        actions[level] = dict.fromkeys(kept, "keep") | dict.fromkeys(unneeded - {ATTENTION}, "skip")
    return actions


def recompute(
    forward: Callable[..., Any], layer: nn.Module, actions: Actions, store: Store, *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args)` under checkpointing: what `actions` says is kept goes to `store`, the input too."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        results: dict[str, list[Any]] = defaultdict(list)
        roles = _keys(layer, actions)
        return _Keep(roles, actions, store, results), _Replay(roles, actions, store, results)

    with torch.autograd.graph.saved_tensors_hooks(store.put, store.get):  # sees the input and nothing inside the layer
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _reads_little(name: str) -> bool:
    """Whether a trained matrix's product with the layer's states is small, [T, R], by its name in our layers or PEFT's."""
    return name.endswith(SMALL)


def _keys(layer: nn.Module, names: Iterable[str]) -> dict[int, str]:
    """Storage → name. Looked up at each call: `.to` or a checkpoint may have put another storage there."""
    parameters = dict(layer.named_parameters())
    return {_storage(parameters[name]): name for name in names if name != ATTENTION}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _role(roles: dict[int, str], func: Any, args: Any) -> str | None:
    """The weight's name for a product with one, ATTENTION for attention without dropout, None for all else."""
    if (name := str(func)) in PRODUCTS:
        return next((roles[key] for t in args if isinstance(t, Tensor) and (key := _storage(t)) in roles), None)
    return ATTENTION if "attention" in name and "backward" not in name and not _drops(func, args) else None


def _drops(func: Any, args: Any) -> bool:
    """Attention with dropout is run again: skipping it would shift the random numbers of what follows."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    return bool(named.get("dropout_p", 0.0))


class _Keep(TorchDispatchMode):
    """Forward: puts the results to keep into the store."""

    def __init__(self, roles: dict[int, str], actions: Actions, store: Store, results: dict[str, list[Any]]) -> None:
        super().__init__()
        self.roles, self.actions, self.store, self.results = roles, actions, store, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        role = _role(self.roles, func, args)
        if role is not None and self.actions.get(role) == "keep":
            self.results[role].append(tree_map_only(Tensor, lambda t: _Handle(self.store.put(_alias(t))), result))
        return result


class _Replay(TorchDispatchMode):
    """The second run: kept results come from the store, skipped ones are memory nobody reads."""

    def __init__(self, roles: dict[int, str], actions: Actions, store: Store, results: dict[str, list[Any]]) -> None:
        super().__init__()
        self.roles, self.actions, self.store, self.results = roles, actions, store, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        role = _role(self.roles, func, args)
        action = None if role is None else self.actions.get(role)
        if action == "keep":
            kept = self.results[str(role)].pop(0)
            return tree_map_only(_Handle, lambda handle: _alias(self.store.get(handle.value)), kept)
        if action == "skip":
            return args[0].new_empty(PRODUCTS[str(func)](*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Handle:
    """Marks a store's handle among the plain values an operation returned."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _alias(tensor: Tensor) -> Tensor:
    """The same memory without autograd's record, which is made anew when the operation returns it once more."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Dataflow(TorchDispatchMode):
    """Follows which weights' products each tensor depends on; `kept` ones end there, as they do when replayed.

    A kernel of our own fills a tensor from `empty` unseen, so such a tensor counts as depending on all before it.
    """

    def __init__(self, roles: dict[int, str], kept: set[str]) -> None:
        super().__init__()
        self.roles, self.kept = roles, kept
        self.reaches: dict[int, frozenset[str]] = {}  # storage → what it depends on
        self.every = frozenset[str]()  # what any of them depends on
        self.alive: list[Tensor] = []  # a freed storage's number could be given to another
        self.seen: set[str] = set()
        self.feeds_attention: set[str] = set()
        self.needed: set[str] = set()

    def saves(self, tensor: Tensor) -> Tensor:
        """As the hook of what autograd saves."""
        self.needed |= self.reaches.get(_storage(tensor), frozenset())
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        depends = frozenset[str]().union(*(self.reaches.get(_storage(t), ()) for t in inputs))
        if func in ALLOCATIONS:
            depends = self.every
        if (role := _role(self.roles, func, args)) is not None:
            self.seen.add(role)
            if role == ATTENTION:
                self.feeds_attention |= depends
            depends = frozenset() if role in self.kept else depends | {role}
        mutated = [
            t for t, a in zip(args, func._schema.arguments, strict=False) if a.alias_info and a.alias_info.is_write
        ]
        for tensor in (t for t in (*tree_leaves(result), *mutated) if isinstance(t, Tensor)):
            self.alive.append(tensor)
            self.reaches[_storage(tensor)] = self.reaches.get(_storage(tensor), frozenset()) | depends
            self.every |= depends
        return result
