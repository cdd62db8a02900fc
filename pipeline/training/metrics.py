"""What a run reports: metrics.jsonl, samples.jsonl, TensorBoard events, and the console's line a step.

Takes numbers by TensorBoard tag; gives one JSON object a line (`step`, then the tags, full precision) and the same as
events. Only the first process writes. A resumed run goes on in the same files, from which later steps are removed.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.console import duration, gib, log, rank
from pipeline.files import sync_stream, write_text
from pipeline.generation.shown import Sample
from pipeline.training.trackers import Trackers


class Metrics:
    """The files of a run, and its trackers. `resumed_at`: the step to go on from, 0 for a new run; `settled`: it was
    evaluated. The run's configuration is put beside the curves."""

    def __init__(self, run_dir: Path, resumed_at: int, settled: bool, trackers: Trackers | None = None) -> None:
        self._file: Any = None
        self._trackers = trackers
        self._events: Any = None
        if rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        path, self._samples = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
        for file in (path, self._samples):
            _keep_until(file, resumed_at, settled)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir), purge_step=resumed_at + 1 if resumed_at else None)
        if (config := run_dir / "config.toml").exists():
            self._events.add_text("config", _block(config.read_text(encoding="utf-8")))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line and the events of `step`."""
        if self._file is None:
            return
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)
        if self._trackers:
            self._trackers.log(step, values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Append a line for each of the `samples` of `step`, and their texts to the events; durable when it returns."""
        if self._file is None:
            return
        with self._samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
            sync_stream(file)
        for number, sample in enumerate(samples):
            self._events.add_text(f"samples/{number}", _markdown(sample), step)
        if self._trackers:
            self._trackers.samples(step, samples)
        self.log(step, {"samples/stopped": sum(sample["stopped"] for sample in samples) / len(samples)})

    def sync(self) -> None:
        """Put everything on disk, as a checkpoint is about to say that it is there."""
        if self._file is not None:
            sync_stream(self._file)
            self._events.flush()

    def close(self) -> None:
        """The run is over."""
        if self._file is not None:
            self._file.close()
            self._events.close()
        if self._trackers:
            self._trackers.close()


def _markdown(sample: Sample) -> str:
    """A sample's texts as TensorBoard shows them: each in a block, line breaks kept."""
    texts = [sample["prompt"], sample["text"], *([sample["base"]["text"]] if "base" in sample else [])]
    heads = ["prompt", "answer", "the base's answer"]
    return "\n\n".join(f"{head}\n\n{_block(text)}" for head, text in zip(heads, texts, strict=False))


def _block(text: str) -> str:
    """As Markdown shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _keep_until(path: Path, step: int, settled: bool) -> None:
    """Drop what the resumed run will write again (and a line cut short by a kill) from an existing file."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            repeated = content["step"] == step and not settled and "train/loss" not in content
            if content["step"] <= step and not repeated:
                kept.append(line + "\n")
        except ValueError:
            pass
    write_text(path, "".join(kept))


class Clock:
    """Time spent in steps, without evaluations and saves, and what is left at that pace."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._spent = self._first = 0.0
        self._steps = 0
        self._since = 0.0

    def start(self) -> None:
        """A step begins."""
        self._since = time.perf_counter()

    def stop(self) -> float:
        """The step has ended; returns its seconds."""
        seconds = time.perf_counter() - self._since
        self._spent += seconds
        self._first = self._first if self._steps else seconds
        self._steps += 1
        return seconds

    @property
    def steps(self) -> int:
        """Steps so far in this process."""
        return self._steps

    @property
    def mean_s(self) -> float:
        """Seconds of a step; the first, in which much is set up, is left out where there are others."""
        return (self._spent - self._first) / (self._steps - 1) if self._steps > 1 else self._spent

    def line(self, step: int, loss: float, lr: float, norm: float, tokens_per_s: float, memory: int) -> None:
        """Say one line about `step`."""
        left = self._spent / self._steps * (self._total - step)
        log(
            f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.3g}  {tokens_per_s:,.0f} tokens/s  "
            f"{gib(memory)}  {duration(self._spent)} elapsed, {duration(left)} left"
        )


class StepMemory:
    """The peak memory of training steps, without what else a process holds in main memory.

    Libraries, what they set up at their first use, and data are not the model's. So `reset` is called before the first
    step and again after it.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held_besides = 0
        self.reset(tensors)

    def reset(self, tensors: Iterable[Tensor]) -> None:
        """Reset peak-memory tracking. Call while idle, passing every tensor that is alive."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        self._held_besides = _resident("VmRSS") - sum(tensor.nbytes for tensor in tensors)
        with contextlib.suppress(OSError):  # some containers forbid it; the peak is then the whole run's
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Bytes: the peak since `reset`, on a GPU of all tensors, else without what the process held besides."""
        return peak_memory() - self._held_besides


def peak_memory() -> int:
    """Bytes: the largest amount this process has held, on its GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: a process inherits that from the one that started it.
    return _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024
