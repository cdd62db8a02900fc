"""Ours against Hugging Face Trainer + PEFT: the same training, then a step's time and memory."""

import gc
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks import cpu_training, variants, worker
from benchmarks.gpu_check.setting import Outcome, Setting
from benchmarks.shapes import Shape
from benchmarks.variants import HF, HF_CHECKPOINTING, ORACLE, name
from pipeline.model.memory.levels import RecomputeLevel

WARM_UP, TIMED = 2, 5
SAME = [
    ORACLE,
    HF,
    name(RecomputeLevel.EVERYTHING),
    name(RecomputeLevel.EVERYTHING, "none"),
    name(RecomputeLevel.INPUT),
]
TIMES = [HF_CHECKPOINTING, name(RecomputeLevel.EVERYTHING), name(RecomputeLevel.INPUT)]


def check(given: Setting) -> Outcome:
    """One step is forward, loss and backward of one row; no optimizer step on either side."""
    losses, gradients = dict[str, float](), dict[str, dict[str, Tensor]]()
    for variant in SAME:
        losses[variant], gradients[variant] = one_step(variant, given.small, given.device)
    found, wrong = cpu_training.compare(losses, gradients)
    rows = [measured(variant, given.large, given.device) for variant in TIMES]
    seconds = {row["variant"]: row["seconds"] for row in rows}
    ratio = seconds[HF_CHECKPOINTING] / seconds[name(RecomputeLevel.EVERYTHING)]
    print(f"nothing recomputed against the checkpointing peer: × {ratio:.2f}")
    return Outcome(
        passed=not wrong and (ratio > 1 or not given.speed_counts),
        compared="loss and adapters' gradients with the peer's in fp32; then seconds and memory of a step with the peer's with "
        "checkpointing, the fastest of 5",
        tolerance="gradients at most twice as far from fp32 as the peer's in the same dtype, the loss 2^-9 of itself"
        + ("; nothing recomputed is faster than the peer" if given.speed_counts else "; the time is shown, not judged"),
        figures={
            "same_training": found,
            "not_the_same": wrong,
            "shape": given.large._asdict(),
            "variants": rows,
            "speed_over_checkpointing": ratio,
        },
    )


def one_step(variant: str, shape: Shape, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients."""
    made = variants.VARIANTS[variant](shape, device)
    loss = float(made.step(variants.tokens(shape, device)))
    return loss, {n: p.grad.float().cpu() for n, p in made.trained.items() if p.grad is not None}


def measured(variant: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of the variant's steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    made, ids = variants.VARIANTS[variant](shape, device), variants.tokens(shape, device)
    for _ in range(WARM_UP):
        made.step(ids)
    memory = (worker.cuda_memory if device.type == "cuda" else worker.resident_memory)(made, ids)
    seconds = [worker.timed(made, ids) for _ in range(TIMED)]
    best = min(seconds)
    row = {"variant": variant, "seconds": best, "median_s": statistics.median(seconds)}
    print(f"  {variant:34} {best:8.4f} s {shape.tokens / best:9.0f} tokens/s {memory['peak_mib']:9.0f} MiB", flush=True)
    return {**row, "tokens_per_s": shape.tokens / best, **memory}
