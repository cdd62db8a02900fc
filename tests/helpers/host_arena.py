"""Tensors of all forms and random training over a host arena, for its tests on the CPU, on simulated streams and on a GPU."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.model.memory.host_arena import HostArena, Ticket


class Form(NamedTuple):
    """What a layer may keep: a view of a tensor [a, b, c], and whether the view is dense."""

    view: Callable[[Tensor], Tensor]
    dense: bool


FORMS = {
    "contiguous": Form(lambda t: t, True),
    "transposed": Form(lambda t: t.transpose(0, 1), True),
    "inside out": Form(lambda t: t.permute(2, 0, 1), True),
    "part with an offset": Form(lambda t: t[1:], True),
    "part of a fused product": Form(lambda t: t[..., 1:3].transpose(0, 1), False),
    "every other": Form(lambda t: t[:, ::2], False),
    "expanded": Form(lambda t: t[:, :1].expand(-1, 5, -1), False),
    "one element": Form(lambda t: t[1, 1, 1], True),
    "nothing": Form(lambda t: t[:, :0], False),  # its strides mean nothing
}
DTYPES = [torch.bfloat16, torch.float32, torch.int64, torch.bool]


class Drawn(NamedTuple):
    """A tensor's memory [a, b, c] on the CPU, and the view of it that is kept."""

    memory: Tensor
    form: Form


def draw(rng: random.Random) -> Drawn:
    dtype, form = rng.choice(DTYPES), rng.choice(list(FORMS.values()))
    shape = (rng.randint(2, 4), rng.randint(2, 9), rng.choice([3, 4, 40]))
    values = torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    return Drawn(values > 0 if dtype == torch.bool else values.to(dtype), form)


def same_form(tensor: Tensor, drawn: Drawn, right: Tensor) -> bool:
    """Dtype, shape and, for a dense view, strides."""
    return (
        tensor.dtype == right.dtype
        and tensor.shape == right.shape
        and (not drawn.form.dense or tensor.stride() == right.stride())
    )


class Pass:
    """A micro-batch's forward: its tickets so far, each with what it holds, and whether its backward has begun."""

    def __init__(self) -> None:
        self.layers: list[tuple[Ticket, list[tuple[int, Drawn]]]] = []
        self.backward = False


def train_at_random(
    rng: random.Random,
    arena: HostArena,
    keep: Callable[[Ticket, Drawn], int],
    check: Callable[[Tensor, Drawn], None],
    steps: int,
) -> Iterator[None]:
    """Layers' forwards and backwards of several micro-batches in any order, forwards given up, prefetches. Yields between."""
    passes: list[Pass] = []
    for _ in range(steps):
        what = rng.choice(["new", *["forward"] * 6, *["backward"] * 6, "give up", "prefetch", "resident"])
        if what == "new":
            passes.append(Pass())
        elif what == "resident":
            arena.advance()
        elif not passes:
            continue
        elif what == "give up":
            passes.pop(rng.randrange(len(passes)))
        else:
            one = rng.choice(passes)
            if what == "forward" and not one.backward:
                ticket = arena.ticket(one.layers[-1][0] if one.layers else None)
                drawn = [draw(rng) for _ in range(rng.randint(0, 5))]
                one.layers.append((ticket, [(keep(ticket, d), d) for d in drawn]))
            elif what == "prefetch" and one.layers:
                one.backward = True
                one.layers[-1][0].prefetch()
            elif what == "backward" and one.layers:
                one.backward = True
                ticket, kept = one.layers.pop()
                left_out = rng.random() < 0.1 and bool(kept)  # a backward that broke off
                for handle, one_drawn in rng.sample(kept, len(kept) - left_out):
                    check(ticket.get(handle), one_drawn)
        yield
