"""What a piece of a model computes, moves and holds, counted exactly without computing it.

Takes a function that runs a forward, on fake tensors at the real dimensions or on real ones; gives, for forward and
backward, the FLOPs of its products, the bytes that everything else reads and writes, the number of kernels, the bytes
kept from forward to backward and the most bytes alive at once.

The conventions, which reproduce the figures of docs/performance.md:
- A product (matrix product, attention) counts its FLOPs, no bytes. Any other operation reads each of its distinct tensor
  arguments once and writes its results once; one in place reads and writes. Views and allocations count nothing.
- `kernels` are launches of both: every product and every other operation that reads or writes is one.
- Bytes are those of storages, no allocator's rounding; an operation's own workspace is not seen.

On the CPU our kernels run as several PyTorch operations, which is what is counted. Where `on_gpu` is asked for, each
counts as the one Triton kernel it is there: it reads its tensor arguments and writes its results, and what PyTorch makes
in between does not count, in bytes moved or alive.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.kernels import dispatch
from pipeline.planning.counts.operations import (
    bytes_of,
    flops_of,
    made_by,
    storage_of,
    tensors_in,
    traffic_of,
    written_by,
)


class Counts(NamedTuple):
    """Of one direction: FLOPs of products, bytes that other operations read and write, launches of both."""

    flops: float
    elementwise_bytes: float
    kernels: int


class Measured(NamedTuple):
    """Of one forward and its backward. Bytes are beyond what was alive before forward: weights, RoPE tables.

    `kept_bytes`: what forward made and is alive when its output has been handed on, whoever holds it (autograd, a cache of
    ours). The output counts only where it is held, as does an input made by `received`: between two layers that is one
    tensor, the second one's. The peaks hold the kept bytes too: `backward_peak_bytes − kept_bytes` is what backward works
    with, the gradients of the output and of the parameters included.
    """

    forward: Counts
    backward: Counts
    kept_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int


def measure(forward: Callable[[], Tensor], *, excluded: Iterable[Tensor] = (), on_gpu: bool = False) -> Measured:
    """Run `forward`, then backward with a gradient of the output's shape and unspecified values, and count both.

    Fake tensors need this to be called within their FakeTensorMode. An output that wants no gradient has no backward: its
    counts are zero. `excluded`: tensors whose storages are not counted wherever they turn up. Leaves have the gradients
    they had before. `on_gpu`: our kernels count as on a GPU.
    """
    counter = Counter(excluded)
    with _only_new_garbage(), counter, dispatch.watched(counter.one_kernel) if on_gpu else contextlib.nullcontext():
        handed_on = _HandedOn.apply(forward())
        gc.collect()  # what only a reference cycle holds is not kept
        kept = counter.alive_bytes()
        counts, forward_peak = counter.take()
        with _gradients_put_back(_leaves(handed_on)):
            if handed_on.requires_grad:
                handed_on.backward(torch.empty_like(handed_on))
            backward_counts, backward_peak = counter.take()
    return Measured(counts, backward_counts, kept, forward_peak, backward_peak)


@contextlib.contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Within it a collection looks at what has been made since: all the rest of a process, models among it, takes far longer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def received(shape: tuple[int, ...], dtype: torch.dtype, wants_gradient: bool = True) -> Tensor:
    """A hidden state from a layer below: held only by whoever keeps it, and no leaf that would keep its gradient."""
    return _Received.apply(torch.empty(0, dtype=dtype, requires_grad=wants_gradient), shape)


class _Received(torch.autograd.Function):
    """The end of the layer below: makes a hidden state, takes its gradient."""

    @staticmethod
    def forward(ctx: Any, below: Tensor, shape: tuple[int, ...]) -> Tensor:
        return below.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(0), None


class _HandedOn(torch.autograd.Function):
    """The beginning of the layer above: keeps nothing of the output, makes its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above.new_empty(ctx.shape, dtype=ctx.dtype)


class Counter(TorchDispatchMode):
    """Counts while it is entered; `take` reads and clears. Enter it inside a FakeTensorMode, not around one."""

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._excluded = {storage_of(t) for t in excluded}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._in_kernel = False
        self._written_in_kernel: set[int] = set()
        self._clear()

    def _clear(self) -> None:
        self.flops, self.bytes, self.kernels = 0.0, 0.0, 0
        self.peak = self.alive_bytes()

    def take(self) -> tuple[Counts, int]:
        """Counts and the most bytes alive since the last `take`, which starts anew."""
        taken = Counts(self.flops, self.bytes, self.kernels), self.peak
        self._clear()
        return taken

    def alive_bytes(self) -> int:
        """Bytes of the storages made within this counter that something still holds."""
        for key in [key for key, (reference, _) in self._alive.items() if reference.expired()]:
            del self._alive[key]
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CPU):
            with self:  # a composite operation arrives whole in inference mode; its parts are what runs
                if (composed := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return composed
        out = func(*args, **kwargs)
        flops = flops_of(func, args, kwargs, out)
        self.flops += flops or 0
        if self._in_kernel:
            self._written_in_kernel |= {storage_of(t) for t in written_by(func, args, kwargs)}
            return out
        if flops is not None:
            self.kernels += 1
        elif (moved := traffic_of(func, args, kwargs, out)) is not None:
            self.bytes += moved
            self.kernels += 1
        self._hold(made_by(tensors_in((args, kwargs)), out))
        return out

    def one_kernel(self, form: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """Run `form(*given)` as one kernel that reads `given` and writes what it changed of it and what it returns. Its
        temporaries are registers; its products still count FLOPs."""
        if self._in_kernel:
            return form(*given)
        self._in_kernel, self._written_in_kernel = True, set()
        try:
            out = form(*given)
        finally:
            self._in_kernel = False
        read = tensors_in(given)
        changed = [t for t in read if storage_of(t) in self._written_in_kernel]
        made = made_by(read, tensors_in(out))
        self.bytes += bytes_of(read) + bytes_of(changed + made)
        self.kernels += 1
        self._hold(made)
        return out

    def _hold(self, made: list[Tensor]) -> None:
        for tensor in made:
            key = storage_of(tensor)
            if key not in self._excluded and key not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.alive_bytes())


# Leaves of a graph


def _leaves(output: Tensor) -> list[Tensor]:
    """The tensors into whose `.grad` a backward from `output` adds."""
    leaves, seen, open_nodes = [], set(), [output.grad_fn]
    while open_nodes:
        node: Any = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        open_nodes.extend(following for following, _ in node.next_functions)
    return leaves


@contextlib.contextmanager
def _gradients_put_back(leaves: list[Tensor]) -> Iterator[None]:
    """Leaves without a gradient inside, so that none is added to; afterwards as before."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
