"""The host arena on simulated streams: right values in any order a GPU may run them, bounded memory, copies that overlap."""

import random
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.model.memory.host_arena import HostArena, Ticket
from tests.helpers.host_arena import FORMS, Drawn, same_form, train_at_random
from tests.helpers.simulated_streams import SimulatedStreams


def simulated(seed: int, capacity: int) -> tuple[SimulatedStreams, HostArena]:
    machine, arena = SimulatedStreams(random.Random(seed)), HostArena(capacity, torch.device("cpu"))
    arena._copies._side = machine.side  # type: ignore[assignment]
    machine.own(arena._buffer)
    return machine, arena


def keep_on(machine: SimulatedStreams, ticket: Ticket, drawn: Drawn) -> int:
    """A kernel makes the tensor, it is put and let go."""
    m = drawn.memory
    tensor = machine.empty(m.shape, m.stride(), m.dtype)
    target = machine.alias(tensor)
    machine.kernel(lambda: host_copy(target, m))
    return ticket.put(drawn.form.view(tensor))


def host_copy(target: Tensor, values: Tensor) -> None:
    target.copy_(values)


def check_on(machine: SimulatedStreams, wrong: list[str], tensor: Tensor, drawn: Drawn) -> None:
    """A kernel reads the tensor, which is let go before the kernel runs."""
    right, seen = drawn.form.view(drawn.memory), machine.alias(tensor)
    assert same_form(tensor, drawn, right)
    machine.kernel(lambda: None if torch.equal(seen, right) else wrong.append(f"{seen} for {right}"))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3000, 20_000, 1 << 20]))
def test_any_order_of_streams_gives_the_right_values(seed: int, capacity: int) -> None:
    """The GPU runs each stream when it likes, the CPU is ahead at will, and let-go memory is overwritten at once."""
    machine, arena = simulated(seed, capacity)
    wrong: list[str] = []
    with machine.installed():
        for _ in train_at_random(
            machine.rng, arena, partial(keep_on, machine), partial(check_on, machine, wrong), steps=120
        ):
            machine.run(machine.rng.choice([0, 0, 0, 3, 30]))
        arena.advance()
        arena.advance()
        machine.run()
    assert not wrong
    assert not machine.current.queue, "no stream waits for ever"
    assert not machine.side.queue, "no stream waits for ever"
    assert arena.bytes_in_use == 0, "neither host nor device memory is kept"
    assert machine.live_bytes == 0, "neither host nor device memory is kept"


def layer_of(n_tensors: int, n_elements: int) -> list[Drawn]:
    return [Drawn(torch.full((1, 1, n_elements), float(i)), FORMS["contiguous"]) for i in range(n_tensors)]


LAYERS, TENSORS, ELEMENTS = 12, 3, 256
TICKET_BYTES = TENSORS * ELEMENTS * 4


def forward(machine: SimulatedStreams, arena: HostArena) -> list[Ticket]:
    tickets: list[Ticket] = []
    for _ in range(LAYERS):
        tickets.append(arena.ticket(tickets[-1] if tickets else None))
        for drawn in layer_of(TENSORS, ELEMENTS):
            keep_on(machine, tickets[-1], drawn)
    return tickets


def test_two_tickets_are_on_the_device_however_far_the_cpu_is_ahead() -> None:
    """With nothing run at all until the end: device memory does not grow with the number of layers."""
    machine, arena = simulated(0, 1 << 20)
    with machine.installed():
        tickets = forward(machine, arena)
        assert machine.peak_live_bytes == 2 * TICKET_BYTES, "sources: the last layer's and this one's"
        assert arena.bytes_in_use == LAYERS * TICKET_BYTES
        arena.advance()
        arena.advance()
        assert machine.live_bytes == 0, "layers on the device let the last host layers' sources go"
        machine.peak_live_bytes = 0
        for ticket in reversed(tickets):
            tensors = [ticket.get(handle) for handle in range(TENSORS)]
            del tensors
        assert machine.peak_live_bytes == 2 * TICKET_BYTES, "this layer's, and the next one's on their way"
        machine.run()
    assert machine.live_bytes == arena.bytes_in_use == 0
    assert arena.peak_bytes == LAYERS * TICKET_BYTES


def test_copies_overlap_with_the_layers_work() -> None:
    """A copy out starts once its tensor is made; the next ticket's copy in does not wait for this layer's backward."""
    machine, arena = simulated(0, 1 << 20)
    with machine.installed():
        ticket = arena.ticket()
        keep_on(machine, ticket, layer_of(1, ELEMENTS)[0])
        machine.run(at_most=1, only=machine.current)
        machine.kernel(lambda: None)  # the rest of the layer
        machine.run(only=machine.side)
        assert machine.side.last.done, "copied out before the layer has ended"
        assert machine.current.queue, "copied out before the layer has ended"
        last = arena.ticket(ticket)
        keep_on(machine, last, layer_of(1, ELEMENTS)[0])
        machine.run()
        last.get(0)
        machine.run()
        machine.kernel(lambda: None)  # this layer's backward
        assert machine.side.last.done
        assert ticket._end is machine.side.last
        assert not machine.current.last.done
        before = len(machine.side.queue)
        ticket.get(0)
        assert len(machine.side.queue) == before, "nothing is left to copy at the next ticket's first get"


def test_a_fetched_ticket_may_be_dropped_while_its_copies_still_run() -> None:
    """Its tensors' memory must not have another owner before."""
    machine, arena = simulated(0, 1 << 20)
    first, second = layer_of(2, ELEMENTS)
    wrong: list[str] = []
    with machine.installed():
        ticket = arena.ticket()
        keep_on(machine, ticket, first)
        for _ in range(2):
            arena.advance()  # the source is let go
        machine.run()
        ticket.prefetch()
        del ticket
        arena.advance()
        taken = machine.empty((1, 1, ELEMENTS), (ELEMENTS, ELEMENTS, 1), torch.float32)
        assert len(machine.memories) == 2, "the arena's buffer and one tensor's memory, used again"
        alias = machine.alias(taken)
        machine.kernel(lambda: host_copy(alias, second.memory))
        machine.run(only=machine.current)
        machine.run(only=machine.side)
        check_on(machine, wrong, taken, second)
        machine.run()
    assert not wrong
