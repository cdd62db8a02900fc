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

# Kinds of devices on which all kernels were checked, by their compute capability, and what shows it: for a GPU the results of
# `make gpu-check` that are committed under benchmarks/results/ (tests/house/test_gpu_check.py reads them).
CHECKED = {"cpu": "the tests"}
NOT_HERE = "a GPU that is not here"

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


def kinds(on_gpu: bool) -> list[str]:
    """Of the devices of this machine that a run or a plan is for: 'cpu', or 'sm_90' and the like for its GPUs."""
    if not on_gpu:
        return ["cpu"]
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"sm_{major}{minor}" for major, minor in sorted(capabilities)] or [NOT_HERE]


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, each kernel's PyTorch form is run by `watcher(form, arguments)`, which returns what the form returned."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
