"""The learning rate of a step, from nothing but its number. Both shapes are qlora-pipe's."""

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int, shape: str, lowest: float) -> float:
    """Of optimizer step `step`, counted from 0.

    Warmup: linear from peak/warmup, reaching peak at step `warmup`. Then constant, or half a cosine from peak towards
    `lowest`, which would be reached at step `total`.
    """
    if step < warmup:
        return peak * (1 / warmup + (1 - 1 / warmup) * step / warmup)
    if shape != "cosine":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def warmup_steps(given: float, steps_per_epoch: int) -> int:
    """A whole number of steps as it is; between 0 and 1 a fraction of an epoch."""
    return int(given * steps_per_epoch) if 0 < given < 1 else int(given)
