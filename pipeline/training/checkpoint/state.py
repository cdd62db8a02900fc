"""The state of the last completed step: what a checkpoint holds, and how it is put back.

Takes the optimizer and the position in the data; gives tensors by global name. Between two optimizer steps only
gradients change, so the state of the last completed step can be written at any time, also from another thread while a
step is under way; the lock of the update keeps the two apart.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.data.batches import Position
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer

INTEGER = "#int"  # marks an optimizer state that is a Python integer, not a tensor


class Progress(NamedTuple):
    """How far a run is: the last completed step, the position in the data after it, and the best evaluation loss.

    The fields are a manifest's keys. `order` tells the order of the epoch's rows from any other; a position means nothing
    in another order. `settled`: what is due at this step (evaluation, saves of what is trained) has been done. `waited`:
    evaluations in a row since the loss was last clearly better, when it was `waited_from`. `tokens`: seen in training.
    """

    step: int = 0
    epoch: int = 0
    rows: int = 0
    order: str = ""
    best_loss: float | None = None
    settled: bool = True
    waited: int = 0
    waited_from: float | None = None
    tokens: int = 0

    @property
    def position(self) -> Position:
        """In the data."""
        return Position(self.epoch, self.rows)

    def after_step(self, position: Position, order: str, tokens: int) -> "Progress":
        """One step of so many tokens further, at `position`; what is due at that step is yet to be done."""
        return self._replace(
            step=self.step + 1,
            epoch=position.epoch,
            rows=position.rows,
            order=order,
            settled=False,
            tokens=self.tokens + tokens,
        )

    def evaluated(self, loss: float, min_delta: float) -> "Progress":
        """After an evaluation. It is clearly better where it is more than `min_delta` below the last that was."""
        best = loss if self.best_loss is None else min(loss, self.best_loss)
        if self.waited_from is None or loss < self.waited_from - min_delta:
            return self._replace(best_loss=best, waited=0, waited_from=loss)
        return self._replace(best_loss=best, waited=self.waited + 1)

    @staticmethod
    def of(manifest: dict[str, Any]) -> "Progress":
        """As a checkpoint's manifest has it."""
        return Progress(**{key: manifest[key] for key in Progress._fields if key in manifest})


class RunState:
    """Snapshots of the last completed step. `number`: whose random states are which (`Place.number`); `writes_weights` is true
    on one replica of each stage."""

    def __init__(
        self,
        optimizer: PipelineOptimizer,
        device: torch.device,
        number: int,
        writes_weights: bool,
        facts: dict[str, Any],
    ) -> None:
        self.optimizer = optimizer
        self.device = device
        self.number = number
        self.writes_weights = writes_weights
        self.facts = facts
        self._progress: dict[int, Progress] = {}
        self._rng: dict[int, dict[str, Tensor]] = {}

    def completed(self, progress: Progress) -> None:
        """The trainer is at the boundary after `progress.step`; what it does next belongs to a later step."""
        with self.optimizer.update_lock:
            self._progress = {progress.step: progress}
            self._rng = {progress.step: rng_state(self.device)}

    def ahead(self, progress: Progress) -> None:
        """`progress.step` is about to be computed, and `progress` will be true once it is."""
        with self.optimizer.update_lock:
            self._progress[progress.step] = progress

    @property
    def completed_step(self) -> int:
        """The last step whose update is done."""
        return self.optimizer.completed_steps

    def snapshot(self) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """(step, tensors on the CPU, facts) of the last completed step."""
        with self.optimizer.update_lock:
            step = self.optimizer.completed_steps
            rng = self._rng.get(step) or rng_state(self.device)
            tensors = {f"rng/{self.number}/{name}": state for name, state in rng.items()}
            if self.writes_weights:
                tensors |= self._trained()
            progress = self._progress[step]._asdict()
            del progress["step"]
            return step, tensors, {**self.facts, **progress}

    def _trained(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.optimizer.parameters_by_name.items():
            tensors[f"weights/{name}"] = parameter.detach()
            for key, value in self.optimizer.inner.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
                elif isinstance(value, int):
                    tensors[f"optimizer/{name}/{key}{INTEGER}"] = torch.tensor(value)
        return self._on_host(tensors)

    def _on_host(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, taken after the last update and not after what the device has been given since.

        The main thread may hang in a collective whose kernel sits in its stream; these copies use a stream of their own.
        """
        if self.device.type != "cuda":
            return {key: value.to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            if self.optimizer.updated is not None:
                stream.wait_event(self.optimizer.updated)
            copies = {}
            for key, value in tensors.items():
                pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                copies[key] = pinned.copy_(value, non_blocking=True)
            stream.synchronize()
        return copies


def needed(key: str, names: Collection[str], aliases: dict[str, str], number: int) -> bool:
    """Whether `restore` reads the tensor `key` of a checkpoint into the parameters `names` of this process."""
    kind, _, rest = key.partition("/")
    if kind == "rng":
        return rest.startswith(f"{number}/")
    name = rest.partition("/")[0] if kind == "optimizer" else rest
    return name in names or any(theirs == name and ours in names for ours, theirs in aliases.items())


def restore(
    folder: Path,
    manifest: dict[str, Any],
    optimizer: PipelineOptimizer,
    device: torch.device,
    number: int,
    *,
    aliases: dict[str, str],
    optimizer_states: bool,
    same_layout: bool,
) -> Progress:
    """Put weights, optimizer states and (for the same layout of processes) RNG states back; returns how far the run was.

    `aliases`: our name of a parameter → another under which the checkpoint may hold it (a tied head). Raises
    CheckpointError if the checkpoint lacks a trained parameter.
    """
    own = set(optimizer.parameters_by_name)
    also = {theirs: ours for ours, theirs in aliases.items()}
    found: set[str] = set()
    rng: dict[str, Tensor] = {}
    for key, value in checkpoint.read(folder, manifest):
        kind, _, rest = key.partition("/")
        if kind == "rng" and rest.startswith(f"{number}/"):
            rng[rest.split("/")[1]] = value()
            continue
        name, _, state_key = rest.partition("/") if kind == "optimizer" else (rest, "", "")
        for ours in {name, also.get(name, name)} & own:
            parameter = optimizer.parameters_by_name[ours]
            if kind == "weights":
                tensor = value()
                if tensor.shape != parameter.shape:
                    raise checkpoint.CheckpointError(
                        f"{folder}: {name} has shape {list(tensor.shape)}, this run makes it {list(parameter.shape)}; "
                        "was it made with another lora_rank?"
                    )
                with torch.no_grad():
                    parameter.copy_(tensor)
                found.add(ours)
            elif optimizer_states:
                state = optimizer.inner.state[parameter]
                if state_key.endswith(INTEGER):
                    state[state_key.removesuffix(INTEGER)] = int(value())
                else:
                    state[state_key] = value().to("cpu" if state_key == "step" else parameter.device)
    if lacking := sorted(own - found):
        raise checkpoint.CheckpointError(
            f"{folder} has no weights for {', '.join(lacking[:3])}; was it made with other target_modules or "
            "trainable_modules?"
        )
    optimizer.completed_steps = manifest["step"]
    if same_layout and rng:
        set_rng_state(rng, device)
    return Progress.of(manifest)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators on the CPU and on `device` (a thread's own current device may be another)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
