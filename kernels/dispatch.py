"""Which form of an operation runs: PyTorch's own operations, or our Triton kernel.

A `Kernel` is one operation in both forms, which take the same arguments and give the same results. The caller asks
`takes_triton` once, in forward, and hands the answer to every kernel of that forward and of its backward.

The planner counts what runs on fake tensors, where PyTorch's form stands for the kernel: while something watches, it is
handed that form with its arguments instead of running it unseen.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the PyTorch form serves every device
    triton = None

Watcher = Callable[[Callable[..., Any], tuple[Any, ...]], Any]
_watchers: list[Watcher] = []


class Kernel:
    """One operation: `pytorch`, the reference and the CPU's path, and `triton`, one launch on a GPU."""

    def __init__(self, pytorch: Callable[..., Any], triton: Callable[..., Any]) -> None:
        self.pytorch, self.triton = pytorch, triton

    def __call__(self, use_triton: bool, *args: Any) -> Any:
        if use_triton:
            return self.triton(*args)
        return _watchers[-1](self.pytorch, args) if _watchers else self.pytorch(*args)


def takes_triton(*tensors: Tensor) -> bool:
    """True for real CUDA tensors (no fake ones) of at most 32 bits an element, where Triton is installed."""
    return triton is not None and all(
        type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda and x.dtype != torch.float64 for x in tensors
    )


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, each kernel's PyTorch form is run by `watcher(form, arguments)`, which returns what the form returned."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
