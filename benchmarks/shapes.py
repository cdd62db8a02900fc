"""The models the training benchmarks run, and what performance.md's formulas say of them.

Takes dimensions; gives, for each activation level and for the peer, the bytes kept per token and layer, the FLOPs of a
step, and the seconds these take at measured ceilings. Letters as in shared notation: T tokens, d hidden, f feed-forward,
V vocabulary, L layers, r rank; key width = d, as in Command-R. Frozen weights: backward computes no dW.
"""

from typing import NamedTuple

from pipeline.model.memory.levels import RecomputeLevel

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Elementwise traffic of one layer in bytes per token and unit of d, bf16: counted at Command-R's dimensions, where an
# 8192-token pass moves 2.6 GB forward and 4.5 GB backward with our kernels, 14.3 and 24.3 GB through transformers' layer.
FUSED, EAGER = ((2.6e9, 4.5e9), (14.3e9, 24.3e9))
COUNTED_AT = 8192 * 8192  # T · d of those


class Shape(NamedTuple):
    """A Cohere model, one row of `tokens`, and adapters of `rank` on down_proj of all layers but the last."""

    hidden: int
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int
    tokens: int
    rank: int
    dtype: str = "bfloat16"

    @property
    def adapted(self) -> range:
        """The layers with an adapter."""
        return range(max(1, self.layers - 1))


TINY = Shape(hidden=64, feed_forward=128, heads=4, layers=3, vocabulary=512, tokens=64, rank=8)
# Command-R's proportions where they matter here: f = 2.75 d, as many key heads as heads, a tied head with a scale.
CPU = Shape(hidden=512, feed_forward=1408, heads=8, layers=8, vocabulary=32768, tokens=1024, rank=16)
COMMAND_R = Shape(hidden=8192, feed_forward=22528, heads=64, layers=40, vocabulary=256000, tokens=8192, rank=64)


def kept_bytes(shape: Shape, level: RecomputeLevel) -> int:
    """Per token and layer: x with its mean and reciprocal deviation; z; attention's output and log-sum-exp; q, k, v; gate, up."""
    size = BYTES[shape.dtype]
    parts = [
        size * shape.hidden,
        size * shape.rank,
        size * shape.hidden + 4 * shape.heads,
        3 * size * shape.hidden,
        2 * size * shape.feed_forward + 8,
    ]
    return sum(parts[: level + 1])


class Work(NamedTuple):
    """Of one step, all layers and tokens: FLOPs of linear layers and of the head, attention passes, elementwise bytes."""

    linear_flops: float
    attention_forwards: int
    attention_backwards: int
    elementwise_bytes: float

    def flops(self, shape: Shape) -> float:
        """With attention's: 2Td a token and forward (causal), 2.5 times that backward."""
        one = 2.0 * shape.tokens * shape.hidden * shape.tokens
        return self.linear_flops + one * (self.attention_forwards + 2.5 * self.attention_backwards)


def step(shape: Shape, level: RecomputeLevel, fused: bool = True) -> Work:
    """Ours: L forwards, backward from the last layer down to the first adapter, and what `level` computes once more."""
    T, d, f = shape.tokens, shape.hidden, shape.feed_forward
    layer = 2 * (4 * d * d + 3 * d * f)
    attention_input, mlp_input = 2 * 3 * d * d, 2 * 2 * d * f
    again = {
        RecomputeLevel.INPUT: layer,
        RecomputeLevel.ADAPTER: attention_input + mlp_input,
        RecomputeLevel.ATTENTION: attention_input + mlp_input,
        RecomputeLevel.PROJECTIONS: mlp_input,
        RecomputeLevel.EVERYTHING: 0,
    }[level]
    L, back = shape.layers, shape.layers - 1
    # The first adapted layer's backward ends at its adapter; recomputing it takes what its level says all the same.
    adapters = len(shape.adapted) * (4 + 8) * d * shape.rank
    per_token = L * layer + back * (layer + again) + adapters + 2 * 2 * shape.vocabulary * d
    repeats = back if level <= RecomputeLevel.ADAPTER else 0
    forward, backward = (x * shape.tokens * d / COUNTED_AT for x in (FUSED if fused else EAGER))
    recomputed = back * forward * (0 if level == RecomputeLevel.EVERYTHING else 1)
    return Work(per_token * T, L + repeats, back, L * forward + back * backward + recomputed)


def peer_step(shape: Shape, checkpointing: bool) -> Work:
    """Hugging Face: with checkpointing transformers has the embedding's output want a gradient, so all layers run backward."""
    level = RecomputeLevel.INPUT if checkpointing else RecomputeLevel.EVERYTHING
    work = step(shape, level, fused=False)
    if not checkpointing:
        return work
    T, d = shape.tokens, shape.hidden
    layer = 2 * (4 * d * d + 3 * d * shape.feed_forward) * T
    forward, backward = (x * T * d / COUNTED_AT for x in EAGER)
    return Work(
        work.linear_flops + 2 * layer,
        work.attention_forwards + 1,
        work.attention_backwards + 1,
        work.elementwise_bytes + forward + backward,
    )


class Ceilings(NamedTuple):
    """Measured rates of one device at a shape. `attention_*_s`: one layer's causal attention over T tokens."""

    gemm_flops_per_s: float
    memory_bytes_per_s: float
    copy_out_bytes_per_s: float
    copy_in_bytes_per_s: float
    attention_forward_s: float
    attention_backward_s: float


def predicted_s(work: Work, rates: Ceilings, host_bytes: float = 0.0) -> float:
    """Products at the GEMM ceiling, attention as measured, elementwise bytes at the memory's rate, one after another.

    Copies to and from the host run beside them: they count where they take longer than all the rest.
    """
    computing = (
        work.linear_flops / rates.gemm_flops_per_s
        + work.attention_forwards * rates.attention_forward_s
        + work.attention_backwards * rates.attention_backward_s
        + work.elementwise_bytes / rates.memory_bytes_per_s
    )
    return max(computing, host_bytes / rates.copy_out_bytes_per_s + host_bytes / rates.copy_in_bytes_per_s)
