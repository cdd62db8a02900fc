"""What layers recompute or keep on the host changes no bit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import variants
from benchmarks.gpu_check.setting import Outcome, Setting, deterministic
from pipeline.model.memory.levels import RecomputeLevel


def check(given: Setting) -> Outcome:
    """Loss and gradients of a second step at every level, on the device and in the arena, with all kernels and with none."""
    differ: list[str] = []
    arena: dict[str, float] = {}
    counted, ids = 0, variants.tokens(given.small, given.device)
    with deterministic():
        for kernels in ("none", "all"):
            expected = second_step(build(given, RecomputeLevel.EVERYTHING, kernels, False), ids)
            for level, on_host in cases():
                variant = build(given, level, kernels, on_host)
                name, counted = variants.name(level, kernels, on_host), counted + 1
                if not same(second_step(variant, ids), expected):
                    differ.append(name)
                if variant.arena:
                    arena[name] = variant.arena.peak_bytes
                    if not variant.arena.peak_bytes or variant.arena.overflowed_bytes:
                        differ.append(f"{name}: {variant.arena.overflowed_bytes} bytes found no room in the arena")
    return Outcome(
        passed=not differ,
        compared="loss and adapters' gradients of a second step with those of nothing recomputed; first, that with itself",
        tolerance="none, to the bit: what is computed twice is computed by the same code from the same values "
        "(under torch.use_deterministic_algorithms, as attention's backward on a GPU else sums in any order)",
        figures={"cases": counted, "differ": differ, "arena_peak_bytes": arena},
    )


def cases() -> Iterator[tuple[RecomputeLevel, bool]]:
    """Nothing recomputed, once more, comes first: where that differs, the device is not deterministic."""
    yield RecomputeLevel.EVERYTHING, False
    yield from ((level, False) for level in RecomputeLevel if level != RecomputeLevel.EVERYTHING)
    yield from ((level, True) for level in RecomputeLevel)


def build(given: Setting, level: RecomputeLevel, kernels: str, on_host: bool) -> variants.Variant:
    """The variant."""
    return variants.VARIANTS[variants.name(level, kernels, on_host)](given.small, given.device)


def second_step(variant: variants.Variant, ids: Tensor) -> dict[str, Tensor]:
    """Loss and gradients; the first step fills the arena, the second reuses it."""
    variant.step(ids)
    return {"loss": variant.step(ids), **{n: p.grad for n, p in variant.trained.items() if p.grad is not None}}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To the bit, and all finite."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[n], t) and bool(t.isfinite().all()) for n, t in expected.items()
    )
