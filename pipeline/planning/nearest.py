"""What to change in a run that does not fit, so that it does.

Takes the run as it is and the model's cost for other lengths; gives the nearest configuration that fits, and one sentence
that says it in the config's own keys.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pipeline.planning.quantities import ModelCost, Plan, Rates, Shape
from pipeline.planning.solve import fastest

GIB = 2**30
STAGES = (2, 3, 4, 8)
SHORTEST_TOKENS = 256


class Nearest(NamedTuple):
    """A plan that fits, its shape, and how to come to it."""

    plan: Plan
    shape: Shape
    sentence: str


class _Try(NamedTuple):
    """One configuration: micro-batch tokens, stages, host memory, and the words for what differs from the run as it is."""

    tokens: int
    stages: int
    host_bytes: int
    words: tuple[str, ...]


def nearest(
    cost_of: Callable[[int], ModelCost],
    device_bytes: int,
    rates: Rates,
    shape: Shape,
    host_bytes: int,
    *,
    max_host_bytes: int,
    chosen_already: bool,
) -> Nearest | None:
    """The first that fits of: what is kept and each stage's layers chosen; host memory up to `max_host_bytes`; more stages
    of the same devices; half the tokens of a micro-batch, a quarter, …. None where nothing does.

    cost_of: the model's cost for micro-batches of so many tokens. device_bytes: usable bytes of the smallest device.
    chosen_already: the run leaves to the planner what is kept and where the stages are cut ('auto').
    """
    for attempt in _attempts(shape, host_bytes, max_host_bytes // GIB * GIB, chosen_already):
        model = cost_of(attempt.tokens)
        if attempt.stages > len(model.layers):
            continue
        tried = shape._replace(tokens=attempt.tokens, stages=attempt.stages)
        plan = fastest(model, [device_bytes] * attempt.stages, rates, tried, attempt.host_bytes)
        if plan is None:
            continue
        words = attempt.words
        if attempt.host_bytes > host_bytes:
            least, plan = _least_host(model, device_bytes, rates, tried, host_bytes, attempt.host_bytes, plan)
            words = (*words, f"host_memory_gib = {least}")
        return Nearest(plan, tried, f"The nearest that fits: {' and '.join(words)}.")
    return None


def _attempts(shape: Shape, host_bytes: int, max_host_bytes: int, chosen_already: bool) -> Iterator[_Try]:
    auto = () if chosen_already else ("activation_checkpointing = 'auto'",)
    hosts = [host_bytes, max_host_bytes] if max_host_bytes > host_bytes else [host_bytes]
    for host in hosts:
        if auto or host > host_bytes:
            yield _Try(shape.tokens, shape.stages, host, auto)
    more = [stages for stages in STAGES if stages > shape.stages]
    for stages in more:
        for host in hosts:
            yield _Try(shape.tokens, stages, host, (f"pipeline_stages = {stages} on as many of these devices", *auto))
    tokens = shape.tokens // 2
    while tokens >= SHORTEST_TOKENS:
        for host in hosts:
            yield _Try(tokens, shape.stages, host, (f"batch_size_tokens = {tokens} and sequence_len no longer", *auto))
        tokens //= 2


def _least_host(
    model: ModelCost, device_bytes: int, rates: Rates, shape: Shape, low_bytes: int, high_bytes: int, plan: Plan
) -> tuple[int, Plan]:
    """Fewest whole GiB of host memory with which the run fits, and its plan; `plan` fits with `high_bytes`."""
    low, high = low_bytes // GIB, high_bytes // GIB  # fits with `high`, perhaps not with `low`
    while high - low > 1:
        middle = (low + high) // 2
        tried = fastest(model, [device_bytes] * shape.stages, rates, shape, middle * GIB)
        if tried is not None:
            high, plan = middle, tried
        else:
            low = middle
    return high, plan
