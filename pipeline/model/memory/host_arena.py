"""Tensors kept for backward in one pinned host buffer, copied out and back beside the computation.

Takes tensors as a layer's forward makes them (`Ticket.put`) and gives them back in its backward (`Ticket.get`), with the
same values, dtype and shape; strides too where the tensor was dense (a transposed q, k, v), else dense in the same order.

Order, on a GPU. All copies, out and in, are on one side stream; each waits for what the current stream was given before it.
- A host slot is free as soon as its copy in is enqueued: what is copied out into it later is later on the same stream.
- The source of a copy out is held until the current stream has been told to wait for that copy, at the second layer after
  its own. Then it is let go, and whatever reuses its memory is later on the current stream.
- The target of a copy in is an ordinary allocation of the current stream. The copy waits for that stream, hence for the
  memory's last user, and the stream waits for the copy before it reads. Returned tensors may be held for any time.
So nothing depends on how far the CPU runs ahead, `Tensor.record_stream` is not needed (what it frees comes back when the
CPU notices, which lets memory grow with every layer the CPU is ahead), and there are no staging buffers: double buffering
is that sources leave one layer late and targets come one layer early. On the device are at most two tickets' tensors each
way, beside what the caller holds. A layer's forward waits only where copying a layer takes longer than computing one.

Forward, backward and all puts and gets run on one current stream, as in DeepSpeed's pipeline and torch's autograd; a tensor
that was put is not written to afterwards, which autograd asks of saved tensors anyway. On the CPU the same code has no
streams. The idea of offloading what backward keeps: vDNN, Rhu et al. 2016 (arXiv:1602.08124).
"""

import bisect
import weakref
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.console import UserError, gib

ALIGNMENT = 512  # bytes; the granule of CUDA's copies and of torch's device allocator


class FreeRanges:
    """The free byte ranges of a buffer: first fit by address, neighbours joined, sizes rounded up to ALIGNMENT."""

    def __init__(self, capacity: int) -> None:
        whole = capacity // ALIGNMENT * ALIGNMENT
        self.ranges: list[tuple[int, int]] = [(0, whole)] if whole else []  # (start, end), by address
        self.taken = 0  # bytes

    def take(self, n_bytes: int) -> int | None:
        """Start of a range of `n_bytes` > 0 that is now taken; None where none is long enough."""
        size = _rounded(n_bytes)
        for i, (start, end) in enumerate(self.ranges):
            if end - start >= size:
                self.ranges[i : i + 1] = [(start + size, end)] if end - start > size else []
                self.taken += size
                return start
        return None

    def give_back(self, start: int, n_bytes: int) -> None:
        """The range that `take(n_bytes)` returned is free again."""
        end = start + _rounded(n_bytes)
        self.taken -= end - start
        i = bisect.bisect(self.ranges, (start, end))
        first, last = i, i
        if i > 0 and self.ranges[i - 1][1] == start:
            first, start = i - 1, self.ranges[i - 1][0]
        if i < len(self.ranges) and self.ranges[i][0] == end:
            last, end = i + 1, self.ranges[i][1]
        self.ranges[first:last] = [(start, end)]


class CopyStream:
    """Copies in one order, beside the current stream; on the CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> "torch.cuda.Event | None":
        """Copy each (target, source), after all copies before and all work the current stream has; the end to wait for."""
        if self._side is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._side.record_event()

    def wait(self, end: "torch.cuda.Event | None") -> None:
        """What the current stream is given from now on comes after `end`."""
        if end is not None:
            torch.cuda.current_stream(self._device).wait_event(end)

    def synchronize(self) -> None:
        """Returns when all copies are done."""
        if self._side is not None:
            self._side.synchronize()


class Held(NamedTuple):
    """Device tensors that copies still read or write, and the end of these copies."""

    tensors: list[Tensor]
    end: "torch.cuda.Event | None"


class Kept(NamedTuple):
    """What a ticket knows of a tensor: its form, and its slot in the arena or the tensor itself."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int
    start: int | None
    tensor: Tensor | None


class HostArena:
    """One buffer in host memory, pinned on a GPU, for the tensors that layers keep between forward and backward.

    `overflowed_bytes`: bytes of all tensors that found no room so far and stayed on the device, for a run to warn of.
    `short_bytes`: the most of them that stayed there at once. `peak_bytes`: the most of the arena in use at once.
    """

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        """Raises UserError where the host cannot give (or pin) that much memory."""
        if capacity_bytes < 0:
            raise ValueError(f"an arena of {capacity_bytes} bytes")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.capacity_bytes = device, capacity_bytes
        self.peak_bytes = self.overflowed_bytes = self.short_bytes = 0
        self._outside = 0  # bytes that stay on the device now
        self._copies = CopyStream(device)
        self._buffer = _host_buffer(capacity_bytes)
        if device.type == "cuda" and capacity_bytes:
            _pin(self._buffer)
            weakref.finalize(self, _unpin, self._buffer, self._copies).atexit = False
        self._free = FreeRanges(capacity_bytes)
        self._leaving = Held([], None), Held([], None)  # sources of copies out: the last layer's, and this one's
        self._abandoned: deque[tuple[list[Kept], Held]] = deque()  # of tickets that are gone

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the arena's slots that are taken, each rounded up to ALIGNMENT."""
        self._reclaim()
        return self._free.taken

    def ticket(self, previous: "Ticket | None" = None) -> "Ticket":
        """A ticket for one layer's forward. `previous`: that of the host layer before it in the same forward pass.

        In backward, `previous` is fetched ahead while this ticket's layer computes.
        """
        self.advance()
        return Ticket(self, previous)

    def advance(self) -> None:
        """A layer begins: the sources of the copies before the last layer's are let go, once these copies are done.

        Opening a ticket and its first get do this. Layers that keep their tensors on the device should do it too, or the
        last two tickets' sources stay there until the next pass.
        """
        last, this = self._leaving
        self._copies.wait(last.end)
        self._leaving = this, Held([], None)
        self._reclaim()

    def _send(self, source: Tensor) -> int | None:
        """Start copying a dense `source` to a slot; the slot's start, or None where the arena is full."""
        self._reclaim()
        start = self._free.take(source.nbytes)
        if start is None:
            self.overflowed_bytes += source.nbytes
            self._outside += source.nbytes
            self.short_bytes = max(self.short_bytes, self._outside)
            return None
        self.peak_bytes = max(self.peak_bytes, self._free.taken)
        end = self._copies.copy([(self._slot(start, source.nbytes), _bytes_of(source))])
        last, this = self._leaving
        # Without an end the copy is done already.
        self._leaving = last, Held([*this.tensors, source], end) if end is not None else this
        return start

    def _bring(self, kept: list[Kept]) -> tuple[list[Tensor | None], "torch.cuda.Event | None"]:
        """Start copying tensors back and free their slots; the tensors, whole once the returned end is reached."""
        tensors: list[Tensor | None] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        for k in kept:
            tensor = k.tensor
            if tensor is None:
                tensor = torch.empty_strided(k.shape, k.strides, dtype=k.dtype, device=self.device)
            if k.start is not None:
                pairs.append((_bytes_of(tensor), self._slot(k.start, k.n_bytes)))
            tensors.append(tensor)
        end = self._copies.copy(pairs) if pairs else None
        self._free_slots(kept)
        return tensors, end

    def _slot(self, start: int, n_bytes: int) -> Tensor:
        return self._buffer[start : start + n_bytes]

    def _free_slots(self, kept: list[Kept]) -> None:
        for k in kept:
            if k.start is not None:
                self._free.give_back(k.start, k.n_bytes)
            elif k.tensor is not None:
                self._outside -= k.n_bytes

    def _reclaim(self) -> None:
        """Take back what tickets that are gone held. The garbage collector may end a ticket anywhere: only here it counts."""
        while self._abandoned:
            kept, arriving = self._abandoned.popleft()
            self._free_slots(kept)
            self._copies.wait(arriving.end)  # these may still be written to


class Ticket:
    """The tensors that one call of a layer keeps for its backward. Made by `HostArena.ticket`.

    Each handle is fetched once. A ticket that is dropped, after an error or when its graph is, gives its slots back.
    """

    def __init__(self, arena: HostArena, previous: "Ticket | None") -> None:
        self._arena = arena
        # Weak: a later ticket does not keep an earlier one's slots.
        self._previous = None if previous is None else weakref.ref(previous)
        self._kept: list[Kept] = []
        self._tensors: list[Tensor | None] | None = None  # once they are on their way back
        self._end: torch.cuda.Event | None = None
        self._arrived = False

    def put(self, tensor: Tensor) -> int:
        """Keep `tensor`, of any shape and dtype on the arena's device; the handle to fetch it by.

        Raises ValueError for another device, RuntimeError once something was fetched.
        """
        if tensor.device != self._arena.device:
            raise ValueError(f"the arena keeps tensors of {self._arena.device}, and this one is on {tensor.device}")
        if self._tensors is not None:
            raise RuntimeError("a ticket takes no more tensors once its first was fetched")
        self._kept.append(self._keep(tensor.detach()))
        return len(self._kept) - 1

    def get(self, handle: int) -> Tensor:
        """The tensor of that handle, on the arena's device, its own to keep. Raises RuntimeError the second time."""
        if not self._arrived:
            self._arena.advance()
            self.prefetch()
            self._arena._copies.wait(self._end)
            self._arrived = True
            previous = None if self._previous is None else self._previous()
            if previous is not None:
                previous.prefetch()
        assert self._tensors is not None
        tensor, self._tensors[handle] = self._tensors[handle], None
        if tensor is None:
            raise RuntimeError(f"tensor {handle} was fetched before; a second backward is not possible")
        return tensor

    def prefetch(self) -> None:
        """Start copying all tensors back. For the last ticket of a pass, when the layer above it begins its backward."""
        if self._tensors is None:
            self._tensors, self._end = self._arena._bring(self._kept)
            self._kept = []

    def _keep(self, tensor: Tensor) -> Kept:
        strides = torch.empty_like(tensor, device="meta").stride()  # the tensor's own if it is dense
        start, stays = None, None
        if tensor.numel():
            if tensor.stride() != strides:
                dense = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
                tensor = dense.copy_(tensor)
            start = self._arena._send(tensor)
            stays = tensor if start is None else None
        return Kept(tensor.shape, strides, tensor.dtype, tensor.nbytes, start, stays)

    def __del__(self) -> None:
        arriving = [t for t in self._tensors or [] if t is not None] if not self._arrived else []
        if self._kept or arriving:
            self._arena._abandoned.append((self._kept, Held(arriving, self._end)))


def _rounded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _bytes_of(dense: Tensor) -> Tensor:
    """The memory of a dense tensor in its order of addresses, uint8 [nbytes]; both sides of a copy are then one piece."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _host_buffer(n_bytes: int) -> Tensor:
    try:
        return torch.empty(n_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise UserError(f"{gib(n_bytes)} of host memory for kept tensors is more than this machine gives") from error


def _pin(buffer: Tensor) -> None:
    """Page-lock `buffer`. (torch's own pinned memory is rounded up to a power of two: 40 GiB would take 64.)"""
    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if error:
        raise UserError(
            f"{gib(buffer.nbytes)} of host memory could not be pinned (CUDA error {error}): "
            "ask for less host memory, or raise the machine's limit on locked memory (ulimit -l)"
        )


def _unpin(buffer: Tensor, copies: CopyStream) -> None:
    copies.synchronize()
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
