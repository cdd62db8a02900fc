"""The head alone: loss and hidden gradient of a frozen linear cross-entropy, by blocks, against the whole logits.

    python -m benchmarks.head

Variants are timed in turn in one process (the minimum of several rounds, so that a busy moment hits all alike); peak
memory is taken in a process per variant and vocabulary. Figures are ratios to be read within one run.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from pipeline.kernels.cross_entropy import LogitTransform, linear_cross_entropy, reference

from benchmarks import record

T, D = 1024, 512
VOCABULARIES = (8192, 32768, 131072, 262144)
SCALE = LogitTransform(before=0.0625)


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, None, labels, SCALE, block_tokens=128).mean()


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return reference(hidden, weight, None, labels, SCALE).mean()


def torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear_cross_entropy(
        hidden * SCALE.before, weight, labels, options=torch.nn.LinearCrossEntropyOptions()
    )


VARIANTS: dict[str, Callable[..., torch.Tensor]] = {"ours": ours, "whole logits": whole_logits, "torch": torch_chunked}


def inputs(vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(vocabulary, D, dtype=dtype) * 0.05, torch.randint(0, vocabulary, (T,))


def seconds(variant: str, vocabulary: int, dtype: torch.dtype) -> float:
    hidden, weight, labels = inputs(vocabulary, dtype)
    began = time.perf_counter()
    VARIANTS[variant](hidden, weight, labels).backward()
    return time.perf_counter() - began


def peak_mib(variant: str, vocabulary: int) -> float:
    """Of loss and gradient, beyond inputs and weight, in a process of its own."""
    code = (
        "import sys; from benchmarks import head; import torch\n"
        f"h = head.inputs({vocabulary}, torch.float32); head.seconds({variant!r}, 512, torch.float32)\n"
        "def now(k): return int(open('/proc/self/status').read().split(k)[1].split()[0])\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = now('VmRSS:')\n"
        f"head.VARIANTS[{variant!r}](*h).backward(); print((now('VmHWM:') - before) / 1024)\n"
    )
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    rows = []
    print(
        f"{'vocabulary':>10} {'variant':14} {'seconds':>8} {'ratio':>6} {'peak MiB':>9}   (T {T}, D {D}, fp32, frozen head)"
    )
    for vocabulary in VOCABULARIES:
        times = {name: [] for name in VARIANTS}  # type: dict[str, list[float]]
        for _ in range(rounds if vocabulary <= 32768 else 3):
            for name in VARIANTS:
                times[name].append(seconds(name, vocabulary, torch.float32))
        for name, all_times in times.items():
            best, peak = min(all_times), peak_mib(name, vocabulary)
            ratio = best / min(times["whole logits"])
            rows.append({"vocabulary": vocabulary, "variant": name, "seconds": best, "ratio": ratio, "peak_mib": peak})
            print(f"{vocabulary:>10} {name:14} {best:8.3f} {ratio:6.2f} {peak:9.0f}", flush=True)
    print("written:", record.write("head", {"T": T, "D": D, "dtype": "float32", "block_tokens": 128}, rows))


if __name__ == "__main__":
    main()
