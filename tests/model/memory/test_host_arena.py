"""The host arena against plain clones, in any order of forwards and backwards, on the CPU and on a GPU; its rules."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.console import UserError
from pipeline.model.memory import host_arena
from pipeline.model.memory.host_arena import ALIGNMENT, FreeRanges, HostArena, Ticket
from tests.helpers.host_arena import Drawn, same_form, train_at_random

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_device = pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=needs_gpu)], ids=str)


def rounded(n_bytes: int) -> int:
    return (n_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


# The free list


@given(st.integers(0, 40 * ALIGNMENT), st.lists(st.integers(-20, 9 * ALIGNMENT), max_size=60))
def test_free_ranges(capacity: int, steps: list[int]) -> None:
    """Against a map of who holds which granule. A positive step takes that many bytes, another gives one slot back."""
    free, held = FreeRanges(capacity), list[tuple[int, int]]()
    owners: list[int | None] = [None] * (capacity // ALIGNMENT)
    for step, n in enumerate(steps):
        if n > 0:
            start, granules = free.take(n), rounded(n) // ALIGNMENT
            if start is None:
                runs = "".join("." if owner is None else "x" for owner in owners).split("x")
                assert max(map(len, runs)) < granules, "there was room"
                continue
            assert start % ALIGNMENT == 0
            assert start + n <= capacity
            mine = slice(start // ALIGNMENT, start // ALIGNMENT + granules)
            assert owners[mine] == [None] * granules, "nobody else holds it"
            owners[mine] = [step] * granules
            held.append((start, n))
        elif held:
            start, size = held.pop(-n % len(held))
            free.give_back(start, size)
            mine = slice(start // ALIGNMENT, start // ALIGNMENT + rounded(size) // ALIGNMENT)
            owners[mine] = [None] * (mine.stop - mine.start)
        assert free.taken == ALIGNMENT * sum(owner is not None for owner in owners)
    for start, size in held:
        free.give_back(start, size)
    whole = capacity // ALIGNMENT * ALIGNMENT
    assert free.ranges == ([(0, whole)] if whole else [])
    assert free.taken == 0


# Any order


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 3000, 20_000, 1 << 20]))
def test_any_order_gives_back_what_was_kept(seed: int, capacity: int) -> None:
    arena = HostArena(capacity, CPU)

    def keep(ticket: Ticket, drawn: Drawn) -> int:
        memory = drawn.memory.clone()
        handle, before = ticket.put(drawn.form.view(memory)), arena.overflowed_bytes
        if arena.overflowed_bytes == before == 0:
            memory.zero_()  # the arena has a copy
        return handle

    def check(tensor: Tensor, drawn: Drawn) -> None:
        right = drawn.form.view(drawn.memory)
        assert same_form(tensor, drawn, right)
        assert torch.equal(tensor, right)

    for _ in train_at_random(random.Random(seed), arena, keep, check, steps=120):
        assert arena.bytes_in_use <= arena.peak_bytes <= capacity
    assert arena.bytes_in_use == 0
    if capacity == 1 << 20:
        assert arena.overflowed_bytes == 0
    elif capacity == 0:
        assert arena.peak_bytes == 0


# A ticket's rules


@every_device
def test_full_arena_keeps_tensors_on_the_device_and_counts_them(device: torch.device) -> None:
    arena = HostArena(2 * ALIGNMENT, device)
    ticket, tensors = arena.ticket(), [torch.randn(128, device=device) for _ in range(3)]  # 512 bytes each
    handles = [ticket.put(t) for t in tensors]
    assert arena.overflowed_bytes == 512
    assert arena.bytes_in_use == arena.peak_bytes == 1024
    back = [ticket.get(h) for h in handles]
    assert all(torch.equal(b, t) for b, t in zip(back, tensors, strict=True))
    assert [b.data_ptr() == t.data_ptr() for b, t in zip(back, tensors, strict=True)] == [False, False, True]
    assert arena.bytes_in_use == 0
    again = arena.ticket()
    again.put(tensors[0])
    assert arena.overflowed_bytes == 512, "there is room again"


def test_a_dropped_ticket_gives_its_slots_back_alone() -> None:
    arena = HostArena(1 << 16, CPU)
    first = arena.ticket()
    first.put(torch.ones(128))
    second = arena.ticket(first)
    second.put(torch.ones(256))
    del first
    assert arena.bytes_in_use == 1024, "a later ticket does not hold an earlier one"
    assert torch.equal(second.get(0), torch.ones(256))
    assert arena.bytes_in_use == 0


def test_what_a_ticket_refuses() -> None:
    arena = HostArena(1 << 16, CPU)
    ticket = arena.ticket()
    handle = ticket.put(torch.ones(3))
    with pytest.raises(ValueError, match="keeps tensors of cpu, and this one is on meta"):
        ticket.put(torch.ones(3, device="meta"))
    ticket.get(handle)
    with pytest.raises(RuntimeError, match="fetched before"):
        ticket.get(handle)
    with pytest.raises(RuntimeError, match="no more tensors"):
        ticket.put(torch.ones(3))
    with pytest.raises(ValueError, match="-1 bytes"):
        HostArena(-1, CPU)
    with pytest.raises(UserError, match="more than this machine gives"):
        HostArena(1 << 60, CPU)


def test_parameters_and_graphs_are_not_kept() -> None:
    """What comes back is a plain tensor: the arena holds no graph."""
    arena = HostArena(1 << 16, CPU)
    ticket = arena.ticket()
    made = torch.ones(3, requires_grad=True) * 2
    back = ticket.get(ticket.put(made))
    assert not back.requires_grad
    assert back.grad_fn is None
    assert torch.equal(back, made)


# A GPU


def delay(device: torch.device, rng: random.Random) -> None:
    """Make the current stream late by up to about a millisecond."""
    if device.type == "cuda" and rng.random() < 0.3:
        torch.cuda._sleep(rng.randrange(2_000_000))


@every_device
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [20_000, 1 << 20])
def test_any_order_with_late_streams(
    device: torch.device, seed: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on simulated streams: both are late at random, memory that is let go is used again, and the CPU never waits."""
    rng, arena = random.Random(seed), HostArena(capacity, device)
    bank = torch.randint(-1000, 1000, (1 << 16,), device=device)
    side, copy = arena._copies._side, arena._copies.copy
    rights: dict[int, tuple[Drawn, Tensor]] = {}
    wrong: list[Tensor] = []

    def late_copy(pairs: list[tuple[Tensor, Tensor]]) -> "torch.cuda.Event | None":
        if side is not None:
            with torch.cuda.stream(side):
                delay(device, rng)
        return copy(pairs)

    def keep(ticket: Ticket, drawn: Drawn) -> int:
        m, offset = drawn.memory, rng.randrange(1 << 15)
        values = bank[offset : offset + m.numel()].view(m.shape)
        rights[id(drawn)] = drawn, drawn.form.view(values.to(m.dtype, copy=True))
        delay(device, rng)
        memory = values.to(m.dtype, copy=True)
        handle = ticket.put(drawn.form.view(memory))
        del memory
        torch.ones(m.shape, dtype=m.dtype, device=device)  # gets the memory if it was let go
        return handle

    def check(tensor: Tensor, drawn: Drawn) -> None:
        right = rights[id(drawn)][1]
        assert same_form(tensor, drawn, right)
        delay(device, rng)
        wrong.append((tensor != right).any())

    monkeypatch.setattr(arena._copies, "copy", late_copy)
    for _ in train_at_random(rng, arena, keep, check, steps=200):
        pass
    assert wrong
    assert not torch.stack(wrong).any()
    assert arena.bytes_in_use == 0


@needs_gpu
def test_the_buffer_is_pinned_while_the_arena_lives() -> None:
    arena = HostArena((1 << 20) + 512, torch.device("cuda"))
    buffer = arena._buffer
    assert buffer.is_pinned()
    assert buffer.nbytes == (1 << 20) + 512
    del arena
    assert not buffer.is_pinned()


def test_memory_that_cannot_be_pinned_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        @staticmethod
        def cudaHostRegister(_address: int, _n_bytes: int, _flags: int) -> int:
            return 2  # cudaErrorMemoryAllocation

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    with pytest.raises(UserError, match="64 KiB of host memory could not be pinned"):
        host_arena._pin(torch.empty(1 << 16, dtype=torch.uint8))
