"""Which layers each stage owns and what each layer keeps, chosen together so that the slowest stage is as fast as can be.

Takes the model's cost, the devices' memory, the rates, the run's shape and the host memory that the stages share; gives a
`Plan`. Exact over this space, up to MAX_POINTS below:
- a stage's layers are contiguous; ranges may be given;
- the layers whose kept tensors go to the host are the first of their stage's, whose backward comes last, all at one level;
- the others stay on the device, each at any level; what recomputes more comes first;
- room for recomputation is left as if the stage's layers were all at the lowest level that one of them is at.
It must fit at three times: in a layer's pass, in a trained embedding's backward, and in the optimizer's update.

For a stage, the ways to keep its resident layers form a front: fewest seconds for so many bytes. Layers that may keep the same
are interchangeable, so a front is built once for each number of them. For each number of layers on the host and their level
the front says what the rest of the device buys, which leaves a few choices (seconds, host bytes). A search over the time
that no stage may exceed, with dynamic programming over (stage, first layer) for the least host memory, finds the split.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.planning.cut import Choice, Ranges, best_split, check_possible, undominated
from pipeline.planning.quantities import Link, ModelCost, Plan, Rates, Shape, StagePlan
from pipeline.planning.stage_cost import (
    compute_seconds,
    copied,
    embedding_bytes,
    evaluate,
    first_trained_stage,
    flight_of,
    kept_bytes,
    passing_bytes,
    seconds,
    update_bytes,
    weights_of,
    working_bytes,
)
from pipeline.planning.timeline import simulate

# A front with more points keeps the fastest in each of so many equal parts of its range of bytes: off by less than a part.
MAX_POINTS = 1024


class Point(NamedTuple):
    """Of a front: kept bytes and recomputation seconds per token; the (class, level) of each layer, linked."""

    kept: float
    seconds: float
    chosen: Any


class _Kept(NamedTuple):
    """What a stage's layers keep: the first `n_host` that run backward at `host_level` on the host; the others on the device,
    `resident` as in a `Point`."""

    n_host: int
    host_level: RecomputeLevel
    resident: Any


_Choice = Choice[_Kept | None]  # None where every layer's keeping is given


class _Limit(NamedTuple):
    """At one point of the step, the tensors kept for `tokens` tokens must fit in `room_bytes`."""

    room_bytes: float
    tokens: int


class _Placement(NamedTuple):
    """`n_host` layers on the host at `level`; the others, so many of each class, on the device, none below `floor`, within
    `limits`. `copied_bytes` are of one micro-batch."""

    limits: tuple[_Limit, ...]
    floor: RecomputeLevel
    resident: tuple[int, ...]
    copied_bytes: float
    flight: int
    n_host: int
    level: RecomputeLevel

    @property
    def host_bytes(self) -> float:
        return self.copied_bytes * self.flight

    @property
    def room(self) -> float:
        """The most bytes per token that may be kept; below zero where nothing fits."""
        if (least := min(limit.room_bytes for limit in self.limits)) < 0:
            return least
        return min(limit.room_bytes / limit.tokens for limit in self.limits if limit.tokens)

    def above(self, kept: float) -> float:
        """Bytes by which `kept` bytes per token exceed the device's memory, or, below zero, what is left."""
        return max(kept * limit.tokens - limit.room_bytes for limit in self.limits)


def solve(
    model: ModelCost,
    devices: list[int],
    rates: Rates,
    shape: Shape,
    host_bytes: int,
    host_bytes_each: int | None = None,
    *,
    links: Sequence[Link] | None = None,
    ranges: Ranges | None = None,
    keeping: ActivationPolicy | None = None,
) -> Plan:
    """The fastest plan that fits; where none does, the one that exceeds the devices' memory least, with `fits` False.

    devices: usable bytes of each stage's device. host_bytes: for kept tensors, of all stages together, and
    at most host_bytes_each of one. links: between each stage and the next; None for the rates' own. ranges: the layers of
    each stage, first and one past the last; None chooses them. keeping: of every layer; None chooses for each.
    Raises UserError where there are more stages than layers.
    """
    if len(devices) != shape.stages or (ranges is not None and len(ranges) != shape.stages):
        raise ValueError(f"{shape.stages} stages, {len(devices)} devices, ranges {ranges}")
    check_possible(None, shape.stages, len(model.layers))
    search = _Search(model, devices, rates, shape, host_bytes, keeping, host_bytes_each, links)
    if (plan := _fastest(search, ranges)) is not None:
        return plan
    for memory in (host_bytes, math.inf):
        if (split := search.best_split(search.least, memory, ranges)) is not None:
            return _plan(search, split, fits=False)
    raise ValueError(f"ranges {ranges} do not follow on one another from 0 to {len(model.layers)}")


def fastest(model: ModelCost, devices: list[int], rates: Rates, shape: Shape, host_bytes: int) -> Plan | None:
    """Like `solve` with everything chosen, but None where nothing fits, which is quicker to find than the least bad fit."""
    return _fastest(_Search(model, devices, rates, shape, host_bytes, None), None)


def _fastest(search: "_Search", ranges: Ranges | None) -> Plan | None:
    split = search.best_split(search.fitting, search.host_bytes, ranges)
    return _plan(search, split, fits=True) if split is not None else None


def _plan(search: "_Search", split: list[tuple[int, int, _Choice]], fits: bool) -> Plan:
    model, shape = search.model, search.shape
    stages = [search.stage_plan(stage, *cut) for stage, cut in enumerate(split)]
    first = first_trained_stage(model, [(s.first, s.end) for s in stages])
    crossing = model.carried_bytes(shape.tokens) + model.reference_bytes * shape.tokens
    link_s = [crossing / link.bytes_per_s for link in search.links]
    time = simulate([s.forward_s for s in stages], [s.backward_s for s in stages], link_s, shape.micro_batches, first)
    least = sum(c.forward.flops + c.backward.flops for c in model.layers) + model.head.work.flops
    tokens_per_s = shape.tokens * shape.micro_batches / time.step_s if time.step_s else math.inf
    return Plan(stages, time.step_s, time.bubble, tokens_per_s, sum(s.flops for s in stages), least, fits)


class _Search:
    """The choices of each stage. Fronts and choices are kept: ranges of like layers have the same."""

    def __init__(
        self,
        model: ModelCost,
        devices: list[int],
        rates: Rates,
        shape: Shape,
        host_bytes: int,
        keeping: ActivationPolicy | None,
        host_bytes_each: int | None = None,
        links: Sequence[Link] | None = None,
    ) -> None:
        self.model, self.devices, self.rates, self.shape = model, devices, rates, shape
        self.host_bytes, self.keeping = host_bytes, keeping
        self.links = links or [Link(rates.link_bytes_per_s, False, rates.source)] * (shape.stages - 1)
        self.host_bytes_each = math.inf if host_bytes_each is None else host_bytes_each
        kinds, classes = _numbered(model.layers), _numbered([layer.levels for layer in model.layers])
        self.kind_of = kinds  # alike in everything
        self.class_of = classes  # alike in what may be kept
        self.classes = [model.layers[classes.index(i)].levels for i in range(max(classes) + 1)]
        self._again_s = [
            {level: seconds(cost.recomputed, rates) for level, cost in levels.items()} for levels in self.classes
        ]
        self._fronts: dict[tuple[RecomputeLevel, tuple[int, ...]], list[Point]] = {}
        self._choices: dict[tuple[Any, ...], list[_Choice]] = {}

    def best_split(
        self, choices: Callable[[int, int, int], list[_Choice]], host_bytes: float, ranges: Ranges | None
    ) -> list[tuple[int, int, _Choice]] | None:
        """Of all cuts, or of the one given. A stage that begins behind the first trained layer sends a gradient back, and may
        hold what that takes where one that begins there has a layer more and does not."""
        behind = self.model.first_trained + 1
        return best_split(choices, len(self.model.layers), self.shape.stages, host_bytes, ranges, behind)

    def fitting(self, stage: int, first: int, end: int) -> list[_Choice]:
        """By host memory, the fastest that fits the device: more host memory, fewer seconds."""
        return [c for c in self._kept_choices(stage, first, end, self._fitting) if c.host_bytes <= self.host_bytes_each]

    def least(self, stage: int, first: int, end: int) -> list[_Choice]:
        """By host memory, the one that needs least of the device; values are bytes above its memory."""
        return self._kept_choices(stage, first, end, self._least)

    def _kept_choices(self, stage: int, first: int, end: int, of: Callable[..., Iterator[_Choice]]) -> list[_Choice]:
        trained = self.model.first_trained
        key = (
            of.__name__,
            stage,
            first == 0,
            end == len(self.model.layers),
            first > trained,
            end > trained,
            tuple(self.kind_of[first:end]),
        )
        if key not in self._choices:
            fewest_on_host_first = sorted(of(stage, first, end), key=lambda c: c.how.n_host if c.how else 0)
            self._choices[key] = undominated(fewest_on_host_first)
        return self._choices[key]

    def _fitting(self, stage: int, first: int, end: int) -> Iterator[_Choice]:
        if self.keeping is not None:
            if (plan := self._uniform(stage, first, end)).headroom_bytes >= 0:
                yield Choice(plan.forward_s + plan.backward_s, plan.host_bytes, None)
            return
        tokens = self.shape.tokens
        forward, backward = compute_seconds(self.model, first, end, self.rates, tokens)
        held = self._held(first, end)
        again_s = {  # of the first so many layers, per token
            level: [0.0, *itertools.accumulate(self._again_s[self.class_of[i]][level] for i in held)]
            for level in (self.model.layers[held[0]].levels if held else [RecomputeLevel.INPUT])
        }
        for place in self._placements(stage, first, end):
            if (room := place.room) < 0:
                continue
            front = self._front(place.floor, place.resident)
            at = bisect.bisect_right(front, room, key=operator.itemgetter(0)) - 1
            if at >= 0:
                again = front[at].seconds + again_s[place.level][place.n_host]
                both = copied((forward, backward + again * tokens), place.copied_bytes, self.rates)
                yield Choice(sum(both), place.host_bytes, _Kept(place.n_host, place.level, front[at].chosen))

    def _least(self, stage: int, first: int, end: int) -> Iterator[_Choice]:
        if self.keeping is not None:
            plan = self._uniform(stage, first, end)
            yield Choice(-plan.headroom_bytes, plan.host_bytes, None)
            return
        for place in self._placements(stage, first, end):
            least = self._front(place.floor, place.resident)[0]
            kept = _Kept(place.n_host, place.level, least.chosen)
            yield Choice(place.above(least.kept), place.host_bytes, kept)

    def _placements(self, stage: int, first: int, end: int) -> Iterator[_Placement]:
        """Every number of layers on the host at every level, with every lowest level of the stage's layers."""
        model, tokens = self.model, self.shape.tokens
        flight = flight_of(model, first, end, stage, self.shape)
        room = self.devices[stage] - sum(weights_of(model, first, end))
        of_embedding, of_update = embedding_bytes(model, first, end), update_bytes(model, first, end, tokens)
        held = self._held(first, end)
        levels = sorted(model.layers[held[0]].levels) if held else [RecomputeLevel.INPUT]
        counts = [0] * len(self.classes)
        for i in held:
            counts[self.class_of[i]] += 1
        for floor in levels:
            working = working_bytes(model, first, end, tokens, [floor] * (end - first))
            for level in [level for level in levels if level >= floor]:
                resident, hosted, largest = list(counts), 0.0, 0.0
                for n_host in range(len(held) + 1):
                    if n_host:
                        kept = kept_bytes(model.layers[held[n_host - 1]], level)
                        hosted, largest = hosted + kept, max(largest, kept)
                        resident[self.class_of[held[n_host - 1]]] -= 1
                    if hosted * tokens * flight > self.host_bytes:
                        break
                    if n_host == 0 and level > floor:
                        continue  # without a layer on the host its level means nothing: once is enough
                    passing = passing_bytes(model, first, end, flight, tokens, n_host > 0 and held[0] == first)
                    limits = (
                        _Limit(room - working - 2 * largest * tokens - passing, tokens * flight),
                        _Limit(room - of_embedding - passing, tokens * (flight - 1)),
                        _Limit(room - of_update, 0),
                    )
                    yield _Placement(limits, floor, tuple(resident), hosted * tokens, flight, n_host, level)

    def _held(self, first: int, end: int) -> list[int]:
        return [i for i in range(first, end) if self.model.layers[i].levels]

    def _front(self, floor: RecomputeLevel, counts: tuple[int, ...]) -> list[Point]:
        """Fewest recomputation seconds for so many kept bytes, of `counts` layers of each class, none below `floor`."""
        if not any(counts):
            return [Point(0.0, 0.0, None)]
        if (floor, counts) not in self._fronts:
            last = max(i for i, n in enumerate(counts) if n)
            fewer = self._front(floor, (*counts[:last], counts[last] - 1, *counts[last + 1 :]))
            ways = [
                (level, cost.kept_bytes, self._again_s[last][level])
                for level, cost in sorted(self.classes[last].items(), reverse=True)
                if level >= floor
            ]
            points = [
                Point(p.kept + kept, p.seconds + again_s, (last, level, p.chosen))
                for level, kept, again_s in ways
                for p in fewer
            ]
            self._fronts[floor, counts] = _front_of(points)
        return self._fronts[floor, counts]

    def _uniform(self, stage: int, first: int, end: int) -> StagePlan:
        assert self.keeping is not None
        keeping = [
            self.keeping if layer.levels else ActivationPolicy(RecomputeLevel.INPUT)
            for layer in self.model.layers[first:end]
        ]
        return evaluate(self.model, first, end, stage, keeping, self.devices[stage], self.rates, self.shape)

    def stage_plan(self, stage: int, first: int, end: int, choice: _Choice) -> StagePlan:
        if (kept := choice.how) is None:
            return self._uniform(stage, first, end)
        keeping = {i: ActivationPolicy(kept.host_level, on_host=True) for i in self._held(first, end)[: kept.n_host]}
        levels: dict[int, list[RecomputeLevel]] = {}
        linked = kept.resident
        while linked is not None:
            of_class, level, linked = linked
            levels.setdefault(of_class, []).append(level)
        for each in levels.values():
            each.sort(reverse=True)  # taken from the end: what recomputes most has its backward last
        for i in self._held(first, end)[kept.n_host :]:
            keeping[i] = ActivationPolicy(levels[self.class_of[i]].pop())
        every = [keeping.get(i, ActivationPolicy(RecomputeLevel.INPUT)) for i in range(first, end)]
        return evaluate(self.model, first, end, stage, every, self.devices[stage], self.rates, self.shape)


def _numbered(things: list[Any]) -> list[int]:
    """For each thing a number; equal things have the same."""
    distinct: list[Any] = []
    for thing in things:
        if thing not in distinct:
            distinct.append(thing)
    return [distinct.index(thing) for thing in things]


def _front_of(points: list[Point]) -> list[Point]:
    """Points that no other beats in both bytes and seconds, by bytes; of equals the first; thinned to MAX_POINTS."""
    front: list[Point] = []
    for point in sorted(points, key=operator.itemgetter(0, 1)):
        if not front or point.seconds < front[-1].seconds:
            front.append(point)
    if len(front) <= MAX_POINTS:
        return front
    low, part = front[0].kept, (front[-1].kept - front[0].kept) / MAX_POINTS
    thin = {int((p.kept - low) / part): p for p in front}  # the last of each part is its fastest
    return [front[0], *(p for p in thin.values() if p is not front[0])]
