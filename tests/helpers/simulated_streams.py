"""A GPU's streams and memory in the order of events only: runs code written for CUDA streams on the CPU, at its worst.

Takes a `random.Random`; `SimulatedStreams.installed` makes `torch.cuda`'s streams and `Tensor.copy_` its own. Nothing runs
when it is enqueued. `run` takes operations off the fronts of the streams at random, as far as their events allow, so any order a
GPU may take can happen, with the CPU as far ahead as can be. Device memory is a pool: a tensor's memory goes back when the
CPU drops the last reference (not when the streams are done with it), is overwritten by the current stream at that point,
as its next owner could, and is handed out again. That is what CUDA's caching allocator does on one stream.
"""

import contextlib
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GARBAGE = 0xAB
GRANULE = 512  # bytes; sizes that the device's allocator gives


class Operation:
    """Something enqueued on a stream, which may run after those it `needs`."""

    def __init__(self, action: Callable[[], None], needs: list["Operation"]) -> None:
        self.action, self.needs, self.done = action, needs, False


class Stream:
    """What `torch.cuda.Stream` has, as far as it is used."""

    def __init__(self) -> None:
        self.queue: deque[Operation] = deque()
        self.last = Operation(lambda: None, [])
        self.last.done = True

    def enqueue(self, action: Callable[[], None], needs: list[Operation] | None = None) -> Operation:
        self.last = Operation(action, needs or [])
        self.queue.append(self.last)
        return self.last

    def record_event(self) -> Operation:
        return self.last

    def wait_event(self, event: Operation) -> None:
        self.enqueue(lambda: None, [event])

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.last)


class SimulatedStreams(TorchFunctionMode):
    """The current stream, a side stream, and device memory. Tensors are the CPU's; which are 'on the device' is `empty`'s."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.current, self.side = Stream(), Stream()
        self.active = self.current  # whose turn `with torch.cuda.stream` says it is
        self.memories: list[Tensor] = []  # all there is, uint8, never given back
        self.pool: dict[int, list[Tensor]] = {}
        self.live_bytes = self.peak_live_bytes = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within, copies and `torch.empty_strided` are this machine's."""

        @contextlib.contextmanager
        def active(stream: Stream) -> Iterator[None]:
            before, self.active = self.active, stream
            yield
            self.active = before

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(torch.cuda, "current_stream", lambda _device: self.current)
            patch.setattr(torch.cuda, "stream", active)
            yield

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty_strided:
            return self.empty(args[0], args[1], kwargs["dtype"])
        if function is Tensor.copy_:
            target, source = (self.alias(t) for t in args[:2])
            self.active.enqueue(lambda: _copy(target, source))
            return args[0]
        return function(*args, **kwargs)

    def empty(self, shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        """A device tensor; memory of its size that was let go is used again."""
        with torch._C.DisableTorchFunction():
            form = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            used = form.untyped_storage().nbytes()
            if not used:
                return torch.empty_strided(shape, strides, dtype=dtype)
            n_bytes = -(-used // GRANULE) * GRANULE
            pool = self.pool.setdefault(n_bytes, [])
            if not pool:
                pool.append(self.own(torch.empty(n_bytes, dtype=torch.uint8)))
            memory = pool.pop()
            owner = memory.numpy()[:]  # dies with the tensor's storage
            weakref.finalize(owner, self._let_go, memory).atexit = False
            self.live_bytes += n_bytes
            self.peak_live_bytes = max(self.peak_live_bytes, self.live_bytes)
            return torch.from_numpy(owner).view(dtype).as_strided(shape, strides)

    def own(self, memory: Tensor) -> Tensor:
        """Memory that copies may read and write, uint8."""
        self.memories.append(memory)
        return memory

    def _let_go(self, memory: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self.live_bytes -= memory.nbytes
            self.pool[memory.nbytes].append(memory)
            self.current.enqueue(lambda: memory.numpy().fill(GARBAGE))

    def alias(self, tensor: Tensor) -> Tensor:
        """The tensor over memory it does not own, as a kernel sees it."""
        if not tensor.numel():
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        address = tensor.data_ptr()
        memory = next((m for m in self.memories if m.data_ptr() <= address < m.data_ptr() + m.nbytes), None)
        if memory is None:  # no device memory: an ordinary CPU tensor that lives as long as it must
            return tensor
        whole = memory[: memory.nbytes // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), (address - memory.data_ptr()) // tensor.itemsize)

    def kernel(self, action: Callable[[], None]) -> None:
        """Enqueue work on the current stream; it must hold no device tensor, only aliases."""
        self.current.enqueue(action)

    def run(self, at_most: int | None = None, only: Stream | None = None) -> int:
        """Run operations of one stream, then the other, while any can (or of `only` that one); how many."""
        count, turn = 0, self.current
        with torch._C.DisableTorchFunction():
            while at_most is None or count < at_most:
                streams = [only] if only else [self.current, self.side]
                ready = [s for s in streams if s.queue and all(o.done for o in s.queue[0].needs)]
                if not ready:
                    break
                # Long turns, so that one stream is often as late as its events let it be.
                if turn not in ready or self.rng.random() < 0.1:
                    turn = self.rng.choice(ready)
                operation = turn.queue.popleft()
                operation.action()
                operation.done = True
                count += 1
        return count


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
