"""The head alone: loss and hidden gradient of a frozen linear cross-entropy, by blocks, against the whole logits.

    python -m benchmarks.head

Ours, transformers' way (the logits of all tokens), torch's linear_cross_entropy, and Liger's fused one where
liger_kernel is installed and there is a GPU, for it is Triton only. Variants are timed in turn in one process (the
minimum of several rounds, so that a busy moment hits all alike). Peak memory beyond inputs and weight: on the CPU from a
process per variant and vocabulary, on a GPU from torch's allocator. Figures are ratios to be read within one run.
"""

import argparse
import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pipeline.kernels.cross_entropy import LogitTransform, linear_cross_entropy, reference

from benchmarks import record

SCALE = LogitTransform(before=0.0625)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Size(NamedTuple):
    """Tokens, hidden width, vocabularies; `block` tokens of ours at a time, None for its own choice."""

    tokens: int
    hidden: int
    dtype: torch.dtype
    vocabularies: tuple[int, ...]
    block: int | None


CPU = Size(1024, 512, torch.float32, (8192, 32768, 131072), 128)
TINY = Size(64, 32, torch.float32, (512,), 16)
GPU = Size(8192, 8192, torch.bfloat16, (32768, 256000), None)  # Command-R's chunk and head
SIZES = {"cpu": CPU, "tiny": TINY, "gpu": GPU}


def ours(size: Size) -> Loss:
    """kernels/cross_entropy."""
    return lambda h, w, labels: linear_cross_entropy(h, w, None, labels, SCALE, block_tokens=size.block).mean()


def whole_logits(size: Size) -> Loss:
    """The logits of all tokens, in fp32, kept for backward."""
    return lambda h, w, labels: reference(h, w, None, labels, SCALE).mean()


def torch_chunked(size: Size) -> Loss:
    """With bf16 inputs torch 2.13 rounds the loss it returns; the gradient is fine."""
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, labels: torch.nn.functional.linear_cross_entropy(h * SCALE.before, w, labels, options=options)


def liger(size: Size) -> Loss:
    """Liger-Kernel's LigerFusedLinearCrossEntropyLoss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda h, w, labels: loss(w, h * SCALE.before, labels)


VARIANTS: dict[str, Callable[[Size], Loss]] = {"ours": ours, "whole logits": whole_logits, "torch": torch_chunked}


def variants(device: torch.device) -> dict[str, Callable[[Size], Loss]]:
    """What runs here; says what does not."""
    if device.type != "cuda":
        print("Liger: not compared, its kernels need a GPU")
    elif importlib.util.find_spec("liger_kernel") is None:
        print("Liger: not compared, liger_kernel is not installed (pip install liger-kernel)")
    else:
        return {**VARIANTS, "liger": liger}
    return VARIANTS


def inputs(
    size: Size, vocabulary: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden [T, D], which wants a gradient, weight [V, D], labels [T]."""
    torch.manual_seed(0)
    hidden = torch.randn(size.tokens, size.hidden, dtype=size.dtype, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, size.hidden, dtype=size.dtype, device=device) * 0.05
    return hidden, weight, torch.randint(0, vocabulary, (size.tokens,), device=device)


LONG_S = 10.0


def seconds(loss: Loss, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Of loss and gradient; on a GPU between two events."""
    given[0].grad = None
    if given[0].is_cuda:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        loss(*given).backward()
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000
    start = time.perf_counter()
    loss(*given).backward()
    return time.perf_counter() - start


def peak_mib(variant: str, size: str, vocabulary: int) -> float:
    """Of loss and gradient on the CPU, beyond inputs and weight, in a process of its own."""
    code = (
        "from benchmarks.head import *\n"
        f"size = SIZES[{size!r}]; h = inputs(size, {vocabulary}); loss = VARIANTS[{variant!r}](size)\n"
        "seconds(loss, inputs(size._replace(tokens=64), 512))\n"
        "def now(k): return int(open('/proc/self/status').read().split(k)[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = now('VmRSS:')\n"
        "loss(*h).backward(); print((now('VmHWM:') - before) / 1024)\n"
    )
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_mib_on_gpu(loss: Loss, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    """Of loss and gradient, beyond inputs and weight."""
    given[0].grad = None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(*given).backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(
    names: dict[str, Callable[[Size], Loss]], label: str, vocabulary: int, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """A row for each variant that fits; times first, then memory."""
    size, given = SIZES[label], inputs(SIZES[label], vocabulary, device)
    losses = {name: make(size) for name, make in names.items()}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds):
        for name in list(times):
            if number and min(times[name]) > LONG_S:  # one round tells enough
                continue
            try:
                times[name].append(seconds(losses[name], given))
            except torch.OutOfMemoryError:
                del times[name]
    rows: list[dict[str, Any]] = [
        {"vocabulary": vocabulary, "variant": name, "reason": "out of memory"} for name in losses if name not in times
    ]
    for name, found in times.items():
        on_gpu = device.type == "cuda"
        peak = peak_mib_on_gpu(losses[name], given) if on_gpu else peak_mib(name, label, vocabulary)
        ratio = min(found) / min(times["whole logits"]) if "whole logits" in times else None
        rows.append(
            {"vocabulary": vocabulary, "variant": name, "seconds": min(found), "ratio": ratio, "peak_mib": peak}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.tiny else "cpu")
    label = "tiny" if given.tiny else "gpu" if device.type == "cuda" else "cpu"
    size = SIZES[label]
    names = variants(device)
    print(
        f"{'vocabulary':>10} {'variant':14} {'seconds':>8} {'ratio':>6} {'peak MiB':>9}   "
        f"(T {size.tokens}, D {size.hidden}, {size.dtype}, frozen head)"
    )
    rows = []
    for vocabulary in size.vocabularies:
        rounds = given.rounds if vocabulary <= 32768 or device.type == "cuda" else min(3, given.rounds)
        for row in compare(names, label, vocabulary, device, rounds):
            rows.append(row)
            if "reason" in row:
                print(f"{vocabulary:>10} {row['variant']:14} {row['reason']}")
                continue
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
            print(
                f"{vocabulary:>10} {row['variant']:14} {row['seconds']:8.3f} {ratio:>6} {row['peak_mib']:9.0f}",
                flush=True,
            )
    settings = {
        "T": size.tokens,
        "D": size.hidden,
        "dtype": str(size.dtype).removeprefix("torch."),
        "block_tokens": size.block,
    }
    print("written:", record.write("head_gpu" if label == "gpu" else "head", settings, rows, given.out))


if __name__ == "__main__":
    main()
