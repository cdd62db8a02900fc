"""How fast the network between two nodes is, where neighbouring stages are on two of them.

Takes our place; gives bytes per second, the slowest of all such pairs, by sending what a large hidden state would be. All
processes call at the same time.
"""

import time
from itertools import pairwise

import torch
import torch.distributed as dist

from pipeline.training.engine.engine import Place

PROBE_BYTES = 32 * 2**20
TIMES = 3  # after one that makes the connection; the best counts


def crossings(place: Place) -> list[bool]:
    """For each stage but the last, whether it and the next are on two nodes, in any replica."""
    return [any(place.nodes[a] != place.nodes[b] for a, b in _pairs(place, stage)) for stage in range(place.stages - 1)]


def slowest_bytes_per_s(place: Place) -> float | None:
    """Of the pairs that are on two nodes; None where none is."""
    own = [
        _measured(a, b, place)
        for stage in range(place.stages - 1)
        for a, b in _pairs(place, stage)
        if place.nodes[a] != place.nodes[b] and place.rank in (a, b)
    ]
    everyone: list[float | None] = [None] * place.world
    dist.all_gather_object(everyone, min(own, default=None))
    return min((rate for rate in everyone if rate is not None), default=None)


def _pairs(place: Place, stage: int) -> list[tuple[int, int]]:
    """The ranks of `stage` and the next, of each replica."""
    return [
        next(pairwise(place.topology.get_rank(pipe=s, data=replica) for s in (stage, stage + 1)))
        for replica in range(place.replicas)
    ]


def _measured(sender: int, receiver: int, place: Place) -> float:
    """Bytes per second from one to the other, until the answer of one byte is back."""
    load, answer = (torch.zeros(n, dtype=torch.uint8, device=place.device) for n in (PROBE_BYTES, 1))
    best = float("inf")
    for _ in range(1 + TIMES):
        began = time.perf_counter()
        if place.rank == sender:
            dist.send(load, receiver)
            dist.recv(answer, receiver)
        else:
            dist.recv(load, sender)
            dist.send(answer, sender)
        answer.cpu()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return PROBE_BYTES / best
