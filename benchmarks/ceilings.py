"""What a device can do at most, at a model's shapes: before a benchmark's figures, so that they can be judged.

Takes a shape and a device; gives the rates of bf16 (or the shape's) matrix products, of memory, of copies from and to
pinned host memory, and the seconds of one layer's attention. Each is the best of several rounds after a warm-up.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from benchmarks.shapes import Ceilings, Shape
from pipeline.formats.dtypes import DTYPES

ROUNDS = 5
COPIED_BYTES = 2**30
STREAMED_BYTES = 2**31


def measure(shape: Shape, device: torch.device) -> Ceilings:
    """All of them; a few seconds on a GPU. On the CPU with small buffers, and a copy of memory for want of a link."""
    small = 2**24 if device.type == "cpu" else None
    out, back = copies(device, small or COPIED_BYTES)
    forward_s, backward_s = attention(shape, device)
    rate = memory(device, small or STREAMED_BYTES)
    return Ceilings(products(shape, device), rate, out, back, forward_s, backward_s)


def products(shape: Shape, device: torch.device) -> float:
    """FLOP/s over one layer's seven products, each at its own size, weighed by their FLOPs."""
    d, f = shape.hidden, shape.feed_forward
    flops = seconds = 0.0
    for wide, narrow, times in ((d, d, 4), (f, d, 2), (d, f, 1)):
        x = torch.randn(shape.tokens, narrow, device=device, dtype=DTYPES[shape.dtype])
        weight = torch.randn(wide, narrow, device=device, dtype=DTYPES[shape.dtype])
        flops += times * 2.0 * shape.tokens * wide * narrow
        seconds += times * best(lambda x=x, weight=weight: linear(x, weight), device)  # type: ignore[misc]
    return flops / seconds


def memory(device: torch.device, n_bytes: int) -> float:
    """Bytes read and written per second by an elementwise operation on `n_bytes` of bf16."""
    source = torch.zeros(n_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / best(lambda: torch.mul(source, 2.0, out=target), device)


def copies(device: torch.device, n_bytes: int) -> tuple[float, float]:
    """Bytes per second from the device to pinned host memory, and back."""
    on_device = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    out = best(lambda: host.copy_(on_device, non_blocking=True), device)
    back = best(lambda: on_device.copy_(host, non_blocking=True), device)
    return n_bytes / out, n_bytes / back


def attention(shape: Shape, device: torch.device) -> tuple[float, float]:
    """Seconds of one layer's causal attention forward, and backward."""
    size = 1, shape.heads, shape.tokens, shape.hidden // shape.heads
    q, k, v = (torch.randn(size, device=device, dtype=DTYPES[shape.dtype]).requires_grad_() for _ in range(3))

    def forward() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    gradient = torch.randn(size, device=device, dtype=DTYPES[shape.dtype])
    with torch.no_grad():
        forward_s = best(forward, device)
    output = forward()
    backward_s = best(lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True), device)
    return forward_s, backward_s


def best(run: Callable[[], object], device: torch.device) -> float:
    """The least seconds of ROUNDS calls after two."""
    run()
    run()
    found = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


def table(found: Ceilings, shape: Shape) -> None:
    """In units one knows."""
    attention_flops = 2.0 * shape.tokens * shape.hidden * shape.tokens
    print("ceilings")
    for text, value, unit in (
        ("products at the model's shapes", found.gemm_flops_per_s / 1e12, "TFLOP/s"),
        ("attention forward", attention_flops / found.attention_forward_s / 1e12, "TFLOP/s"),
        ("attention backward", 2.5 * attention_flops / found.attention_backward_s / 1e12, "TFLOP/s"),
        ("memory, read + written", found.memory_bytes_per_s / 1e9, "GB/s"),
        ("copy to pinned host memory", found.copy_out_bytes_per_s / 1e9, "GB/s"),
        ("copy back", found.copy_in_bytes_per_s / 1e9, "GB/s"),
    ):
        print(f"  {text:34} {value:9.3g} {unit}")
