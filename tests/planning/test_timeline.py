"""The replayed schedule against DeepSpeed's own `TrainSchedule`, and its times against the longest path through it."""

import functools
from collections import defaultdict

import pytest
from deepspeed.runtime.pipe import schedule as theirs
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.quantities import Shape
from pipeline.planning.timeline import Do, Instruction, in_flight, instructions, simulate

NAMES = {
    theirs.ForwardPass: Do.FORWARD,
    theirs.BackwardPass: Do.BACKWARD,
    theirs.SendActivation: Do.SEND_ACTIVATION,
    theirs.RecvActivation: Do.RECEIVE_ACTIVATION,
    theirs.SendGrad: Do.SEND_GRADIENT,
    theirs.RecvGrad: Do.RECEIVE_GRADIENT,
}


def deepspeeds(stage: int, stages: int, micro_batches: int) -> list[Instruction]:
    """TrainSchedule's instructions of a stage. Each kind goes through the micro-batches in order, so the n-th is n's."""
    seen: dict[Do, int] = defaultdict(int)
    found = []
    for commands in theirs.TrainSchedule(micro_batches, stages, stage).steps():
        for command in commands:
            if do := NAMES.get(type(command)):
                found.append(Instruction(do, seen[do]))
                seen[do] += 1
    return found


def cut(todo: list[Instruction], stage: int, first_trained: int) -> list[Instruction]:
    """Without what nobody needs below the first trained stage (pipeline/training/engine/schedule.py)."""
    dropped: set[Do] = set()
    if stage <= first_trained:
        dropped |= {Do.SEND_GRADIENT}
    if stage < first_trained:
        dropped |= {Do.BACKWARD, Do.RECEIVE_GRADIENT}
    return [i for i in todo if i.do not in dropped]


def longest_path(f: list[float], b: list[float], links: list[float], m: int, first_trained: int) -> float:
    """Length of the longest chain of instructions. A transfer is one node of two lists; each follows its list's last."""
    node_seconds: dict[tuple, float] = {}
    after: dict[tuple, set[tuple]] = defaultdict(set)
    for stage in range(len(f)):
        previous = None
        for do, micro_batch in cut(deepspeeds(stage, len(f), m), stage, first_trained):
            if do in (Do.FORWARD, Do.BACKWARD):
                node = (stage, do, micro_batch)
                node_seconds[node] = (f if do is Do.FORWARD else b)[stage]
            else:
                activation = do in (Do.SEND_ACTIVATION, Do.RECEIVE_ACTIVATION)
                below = stage if do in (Do.SEND_ACTIVATION, Do.RECEIVE_GRADIENT) else stage - 1
                node = ("activation" if activation else "gradient", below, micro_batch)
                node_seconds[node] = links[below]
            if previous is not None:
                after[previous].add(node)
            previous = node

    @functools.cache
    def from_here(node: tuple) -> float:
        return node_seconds[node] + max((from_here(n) for n in after[node]), default=0.0)

    return max(from_here(node) for node in node_seconds)


COUNTS = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 7, 16)]


@pytest.mark.parametrize(("p", "m"), COUNTS)
def test_instructions_are_deepspeeds(p: int, m: int) -> None:
    for stage in range(p):
        assert instructions(stage, p, m) == deepspeeds(stage, p, m)
        for first in range(p):
            assert instructions(stage, p, m, first) == cut(deepspeeds(stage, p, m), stage, first)


@pytest.mark.parametrize(("p", "m"), COUNTS)
def test_in_flight_is_the_most_that_deepspeeds_order_holds(p: int, m: int) -> None:
    for stage in range(p):
        live = most = 0
        for do, _ in deepspeeds(stage, p, m):
            live += {Do.FORWARD: 1, Do.BACKWARD: -1}.get(do, 0)
            most = max(most, live)
        assert in_flight(stage, Shape(8, m, p)) == most
    assert in_flight(0, Shape(8, m, p), first_trained_stage=1) == 1


@pytest.mark.parametrize(("p", "m"), COUNTS)
def test_equal_stages_reach_m_of_m_plus_p_minus_1(p: int, m: int) -> None:
    """Times with exact sums in binary, so equality is equality, whatever forward is to backward."""
    for f, b in ((1.0, 1.0), (1.0, 2.0), (2.5, 0.25)):
        time = simulate([f] * p, [b] * p, 0.0, m)
        assert time.step_s == (m + p - 1) * (f + b)
        assert time.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert time.busy == pytest.approx([m / (m + p - 1)] * p, abs=1e-12)


def test_one_stage_never_waits() -> None:
    time = simulate([3.0], [5.0], 100.0, 7)
    assert time.step_s == 7 * 8.0
    assert time.busy == [1.0]
    assert time.bubble == 0.0


def test_forward_only_stages_are_no_burden() -> None:
    """A fast forward-only stage in front: the last one waits for it once, then works through."""
    time = simulate([1.0, 2.0], [99.0, 4.0], 0.0, 5, first_trained_stage=1)
    assert time.step_s == 1.0 + 5 * 6.0
    assert time.busy == pytest.approx([5 / 31, 30 / 31])


# Sixteenths: sums are exact in binary, so that two ways of adding agree to the bit.
seconds = st.integers(0, 160).map(lambda n: n / 16)
stages = st.integers(1, 5).flatmap(
    lambda p: st.tuples(
        st.lists(seconds, min_size=p, max_size=p), st.lists(seconds, min_size=p, max_size=p), st.integers(0, p - 1)
    )
)


@given(stages, st.lists(seconds, min_size=4, max_size=4), st.integers(1, 9))
def test_time_is_the_longest_path_through_deepspeeds_schedule(
    work: tuple[list[float], list[float], int], links: list[float], m: int
) -> None:
    """Each link with a time of its own, and all alike."""
    f, b, first = work
    links = links[: len(f) - 1]
    assert simulate(f, b, links, m, first).step_s == longest_path(f, b, links, m, first)
    alike = links[:1] * (len(f) - 1)
    assert simulate(f, b, links[0] if links else 0.0, m, first).step_s == longest_path(f, b, alike, m, first)


@given(stages, seconds, st.integers(1, 9))
def test_bounds(work: tuple[list[float], list[float], int], link: float, m: int) -> None:
    f, b, first = work
    p = len(f)
    time = simulate(f, b, link, m, first)
    trained = [b[s] if s >= first else 0.0 for s in range(p)]
    assert time.step_s >= max(m * (f[s] + trained[s]) for s in range(p))
    there_and_back = sum(f) + sum(trained) + link * ((p - 1) + (p - 1 - first))
    assert time.step_s >= there_and_back
    assert all(0 <= share <= 1 + 1e-12 for share in time.busy)
    assert -1e-12 <= time.bubble <= 1


@given(stages, seconds, st.integers(1, 6), st.integers(0, 4), st.sampled_from(["forward", "backward", "link", "m"]))
def test_more_work_never_ends_sooner(
    work: tuple[list[float], list[float], int], link: float, m: int, which: int, what: str
) -> None:
    f, b, first = work
    before = simulate(f, b, link, m, first).step_s
    f, b, stage = list(f), list(b), which % len(f)
    if what == "forward":
        f[stage] += 1
    elif what == "backward":
        b[stage] += 1
    after = simulate(f, b, link + (what == "link"), m + (what == "m"), first).step_s
    assert after >= before


def test_unlike_lists_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 forward and 1 backward"):
        simulate([1.0, 1.0], [1.0], 0.0, 4)
    with pytest.raises(ValueError, match="2 stages with 3 links"):
        simulate([1.0, 1.0], [1.0, 1.0], [0.0] * 3, 4)
