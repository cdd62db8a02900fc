"""One optimizer step over all stages: gradients in fp32, one norm, one clip coefficient, one rounding, one update.

Takes a stage's trained parameters; gives the optimizer DeepSpeed's engine calls `step()` on. DeepSpeed itself neither
reduces, clips nor casts: its norm sees the first stage only, and its accumulation is in the parameter's dtype.

A micro-batch's gradient is added to an fp32 accumulator as soon as autograd has it, and freed. At the step the
accumulators are averaged over the data-parallel replicas, their norm is taken over all stages, and each is clipped and
rounded once to its parameter's dtype for the update.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.console import EXIT_NON_FINITE, UserError


class NonFiniteError(UserError):
    """A loss or gradient that is not a number; nothing has been updated or saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_NON_FINITE)


class PipelineOptimizer(Optimizer):
    """`inner` over gradients that are accumulated in fp32, reduced over replicas and clipped by the norm over all stages.

    `parameters`: this stage's trained ones by global name. `clip`: largest norm, 0 for none. `tied`: names of
    parameters that exist on the first and on the last stage; their gradients are summed over `tied_group`, and they
    count once in the norm (`counts_tied` on one of the two stages). `update_lock` is held during an update: a save that
    a stop asks for meanwhile waits for the update's end. `common`: names and sizes of parameters of which any stage may have a
    copy (`share`); their gradients are summed over all stages, and of the copies the first stage's counts in the norm.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], inner: Optimizer, clip: float) -> None:
        super().__init__([{"params": list(parameters.values())}], {})
        self.parameters_by_name = parameters
        self.inner = inner
        self.param_groups = inner.param_groups
        self.clip = clip
        self.completed_steps = 0
        self.update_lock = threading.RLock()
        self.updated: torch.cuda.Event | None = None  # on a GPU, when the last update is done
        self.grad_norm = math.nan
        self.clip_coefficient = 1.0
        self.pipe_group: Any = None
        self.replica_group: Any = None
        self.tied_group: Any = None
        self.tied: frozenset[str] = frozenset()
        self.counts_tied = True
        self.common: dict[str, int] = {}
        self.counted_elsewhere: frozenset[str] = frozenset()
        self.on_gradients: Callable[[dict[str, Tensor]], None] | None = None
        self.before_norm: list[Callable[[dict[str, Tensor]], object]] = []  # each step, with the sums of gradients
        self.before_update: list[Callable[[], object]] = []  # each step, when the gradients are known to be finite
        self.after_update: list[Callable[[], object]] = []
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(_adder(self._sums[name]))

    def connect(self, pipe_group: Any, replica_group: Any) -> None:
        """The process groups over which the norm is summed (stages) and gradients are averaged (replicas)."""
        self.pipe_group, self.replica_group = pipe_group, replica_group

    def tie(self, names: frozenset[str], group: Any, counts: bool) -> None:
        """Sum the gradients of `names` over `group` at each step; they enter the norm where `counts` is true."""
        self.tied, self.tied_group, self.counts_tied = names, group, counts

    def share(self, common: dict[str, int], counted_elsewhere: frozenset[str]) -> None:
        """Sum the gradients of `common` (names and numbers of elements, the same on every stage) over the stages at each step;
        those `counted_elsewhere` are in the norm of an earlier stage."""
        self.common, self.counted_elsewhere = common, counted_elsewhere

    def held_tensors(self) -> list[Tensor]:
        """Gradient sums and optimizer state."""
        state = (value for states in self.inner.state.values() for value in states.values())
        return [*self._sums.values(), *(value for value in state if isinstance(value, Tensor))]

    def set_lr(self, lr: float) -> None:
        """For the next step, in every group, times its `lr_factor` where it has one."""
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Reduce, measure, clip, round, update. Raises NonFiniteError before anything is changed."""
        self._reduce()
        for add in self.before_norm:
            add(self._sums)
        self.grad_norm = math.sqrt(self._sum_of_squares())
        if not math.isfinite(self.grad_norm):
            raise NonFiniteError(f"the gradient's norm is {self.grad_norm}")
        self.clip_coefficient = min(1.0, self.clip / (self.grad_norm + 1e-6)) if self.clip else 1.0
        if self.on_gradients:
            self.on_gradients(self._sums)
        with self.update_lock:
            for name, parameter in self.parameters_by_name.items():
                parameter.grad = self._sums[name].mul_(self.clip_coefficient).to(parameter.dtype)
            for call in self.before_update:
                call()
            if self.parameters_by_name:
                self.inner.step()
            for (
                call
            ) in self.after_update:  # on a stage that trains nothing, too: others may wait for what it has to say
                call()
            if self.parameters_by_name and next(iter(self.parameters_by_name.values())).is_cuda:
                self.updated = torch.cuda.current_stream().record_event()
            self.completed_steps += 1
        for name, parameter in self.parameters_by_name.items():
            parameter.grad = None
            self._sums[name].zero_()

    def _reduce(self) -> None:
        replicas = dist.get_world_size(self.replica_group) if self.replica_group is not None else 1
        for name, gradient in self._sums.items():
            if replicas > 1:
                dist.all_reduce(gradient, group=self.replica_group)
                gradient.div_(replicas)
            if name in self.tied:
                dist.all_reduce(gradient, group=self.tied_group)
        if self.common:
            self._sum_common()

    def _sum_common(self) -> None:
        """All in one message."""
        device = next(iter(self._sums.values())).device if self._sums else communication_device()
        parts = [
            self._sums[n].flatten() if n in self._sums else torch.zeros(size, device=device)
            for n, size in self.common.items()
        ]
        total = torch.cat(parts)
        self.sum_over_stages(total)
        for name, part in zip(self.common, total.split(list(self.common.values())), strict=True):
            if name in self._sums:
                self._sums[name].copy_(part.view_as(self._sums[name]))

    def _sum_of_squares(self) -> float:
        """Over all stages, in fp64: a sum of many fp32 norms must not depend on how they are split."""
        elsewhere = self.counted_elsewhere | (frozenset() if self.counts_tied else self.tied)
        counted = [g for name, g in self._sums.items() if name not in elsewhere]
        squares = sum(
            (torch.linalg.vector_norm(g).double() ** 2 for g in counted), torch.zeros((), dtype=torch.float64)
        )
        if self.pipe_group is None or dist.get_world_size(self.pipe_group) == 1:
            return float(squares)
        device = next(iter(self._sums.values())).device if self._sums else communication_device()
        total = torch.as_tensor(squares, dtype=torch.float64).to(device)
        self.sum_over_stages(total)
        return float(total)

    def sum_over_stages(self, tensor: Tensor) -> None:
        """In place; all stages must come."""
        if self.pipe_group is not None and dist.get_world_size(self.pipe_group) > 1:
            dist.all_reduce(tensor, group=self.pipe_group)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that holds the sum alone: one that held the optimizer would keep it, and all it has, alive for ever."""

    def add(parameter: Tensor) -> None:
        total.add_(parameter.grad)  # type: ignore[arg-type]
        parameter.grad = None

    return add


def communication_device() -> torch.device:
    """Where tensors are that go between processes."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
