"""How fast the device at hand is at what a training step does, measured in a few seconds.

Takes the device, the model's largest products and the tokens of a micro-batch; gives `Rates`. Each figure is the best of a
few repetitions: what disturbs a measurement only makes it slower.

On a GPU the clock is CUDA events, and copies are between pinned and device memory. On the CPU a copy to the host is a copy
in memory. Two processes are not at hand before the launcher starts them: the link is what doctor.py measured on this machine,
or is taken to be as fast as a copy out.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.planning import link
from pipeline.planning.quantities import Rates

REPETITIONS = 5
COPY_BYTES = 256 * 2**20  # large enough that starting the copy is nothing, and beyond any cache
CPU_COPY_BYTES = 64 * 2**20
MAX_GEMM_BYTES = 2**30  # of weight: a larger product is cut, its rate is the same


def measure(device: torch.device, products: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype) -> Rates:
    """Rates of `device` for frozen linear layers (in, out) of the model with `tokens` rows, in the weights' dtype.

    The GEMM rate is that of all `products` together, as a layer runs them. On the CPU few tokens do: at most 512.
    Raises ValueError without products.
    """
    if not products:
        raise ValueError("no products to measure")
    on_gpu = device.type == "cuda"
    rows = tokens if on_gpu else min(tokens, 512)
    n_bytes = COPY_BYTES if on_gpu else CPU_COPY_BYTES
    out = copy_rate(device, n_bytes, to_host=True)
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    return Rates(
        flops_per_s=_gemm_rate(device, products, rows, dtype),
        memory_bytes_per_s=_memory_rate(device, n_bytes, dtype),
        copy_out_bytes_per_s=out,
        copy_in_bytes_per_s=copy_rate(device, n_bytes, to_host=False),
        link_bytes_per_s=link.rate(name) or out,
        source=f"measured here, on {name}",
    )


def best_seconds(work: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> float:
    """Of `repetitions` runs of `work` after one to warm up, the shortest."""
    work()
    return min(_timed(work, device) for _ in range(repetitions))


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return max(time.perf_counter() - begin, 1e-9)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        before.record()
        work()
        after.record()
        after.synchronize()
    return max(before.elapsed_time(after) / 1e3, 1e-9)


def _gemm_rate(device: torch.device, products: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype) -> float:
    """FLOPs per second. One weight at a time is in memory; values are random, as zeros draw less power and run faster."""
    flops = seconds = 0.0
    for n_in, n_out in products:
        n_out = max(1, min(n_out, MAX_GEMM_BYTES // (n_in * dtype.itemsize)))
        weight = torch.randn(n_out, n_in, device=device, dtype=dtype)
        x = torch.randn(rows, n_in, device=device, dtype=dtype)
        seconds += best_seconds(lambda x=x, w=weight: torch.nn.functional.linear(x, w), device)  # type: ignore[misc]
        flops += 2.0 * rows * n_in * n_out
    return flops / seconds


def _memory_rate(device: torch.device, n_bytes: int, dtype: torch.dtype) -> float:
    """Bytes read and written per second by an elementwise operation: two tensors read, one written."""
    a, b = (torch.ones(n_bytes // dtype.itemsize, device=device, dtype=dtype) for _ in range(2))
    into = torch.empty_like(a)
    return 3 * a.nbytes / best_seconds(lambda: torch.add(a, b, out=into), device)


def copy_rate(device: torch.device, n_bytes: int, to_host: bool) -> float:
    """Bytes per second between `device` and the host's pinned memory."""
    here: Tensor = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    host = torch.ones(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target, source = (host, here) if to_host else (here, host)
    return n_bytes / best_seconds(lambda: target.copy_(source, non_blocking=True), device)
