"""A variant in a process of its own, and the handle by which a benchmark drives it.

    python -m benchmarks.worker '{"variant": "hf", "shape": [...], "device": "cpu"}'

The process builds the variant and answers one JSON line per line of input: {"do": "time"} runs a step and gives its
seconds, {"do": "memory"} a step's memory, {"do": "gradients", "path": …} its loss, with the adapters' gradients in a
safetensors file. `{"error": …}` where memory ran out. Whatever libraries print goes to stderr.

Memory on the CPU is the resident set (the kernel's high-water mark), taken once per process, under an allocator that
returns memory at once (`MEMORY_ENVIRONMENT`); on a GPU it is what torch's allocator has handed out.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent
# One arena, and every tensor from 64 KiB up a mapping of its own that is gone when freed.
MEMORY_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 2**20
WARM_UP_TOKENS = 16


class WorkerError(Exception):
    """What a worker said instead of an answer: out of memory, out of time, or the end of its traceback."""


class Worker:
    """A variant's process. A context manager; the process ends with it."""

    def __init__(
        self,
        variant: str,
        shape: Shape,
        device: str = "cpu",
        environment: dict[str, str] | None = None,
        threads: int | None = None,
    ) -> None:
        request = json.dumps({"variant": variant, "shape": list(shape), "device": device})
        given = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads or os.cpu_count())}
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", request],
            cwd=ROOT,
            env={**given, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read_errors, daemon=True).start()

    def ask(self, timeout_s: float = 3600.0, **command: Any) -> dict[str, Any]:
        """The answer to `command`; raises WorkerError."""
        assert self._process.stdin
        assert self._process.stdout
        timer = threading.Timer(timeout_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        if not line:
            self._process.wait()
            raise WorkerError("out of time" if timed_out else "".join(self._errors[-5:]).strip() or "the process died")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _read_errors(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._errors = [*self._errors[-50:], line]

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        """End the process; it need not be the first time."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(request: dict[str, Any], commands: IO[str], answers: IO[str]) -> None:
    """Build the variant, answer every command."""
    import torch

    from benchmarks.variants import VARIANTS, Variant, tokens

    shape, device = Shape(*request["shape"]), torch.device(request["device"])
    variant: Variant | None = None
    answer: dict[str, Any]
    for line in commands:
        command = json.loads(line)
        try:
            variant = variant or VARIANTS[request["variant"]](shape, device)
            ids = tokens(shape, device)
            if command["do"] == "time":
                answer = {"seconds": timed(variant, ids)}
            elif command["do"] == "memory":
                variant.step(ids[:, :WARM_UP_TOKENS])  # what libraries set up at a first step is not the step's
                answer = (cuda_memory if device.type == "cuda" else resident_memory)(variant, ids)
            else:
                from safetensors.torch import save_file

                loss = float(variant.step(ids))
                save_file({n: p.grad.float().cpu() for n, p in variant.trained.items()}, command["path"])  # type: ignore[union-attr]
                answer = {"loss": loss}
        except torch.OutOfMemoryError:
            answer = {"error": "out of memory"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(variant: Any, ids: Any) -> float:
    """Seconds of one step: on a GPU between two events."""
    import torch

    if ids.is_cuda:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        variant.step(ids)
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000
    start = time.perf_counter()
    variant.step(ids)
    return time.perf_counter() - start


def resident_memory(variant: Any, ids: Any) -> dict[str, float]:
    """MiB beyond what is resident before the step: kept when the layers' forward has ended, when the loss is there, peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = _status("VmRSS")
    found = _marks(variant, lambda: _status("VmRSS") - before)
    variant.step(ids)
    return {**found, "peak_mib": _status("VmHWM") - before}


def cuda_memory(variant: Any, ids: Any) -> dict[str, float]:
    """The same of the device's memory, with the weights' MiB and the whole peak beside it."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / MIB
    found = _marks(variant, lambda: torch.cuda.memory_allocated() / MIB - before)
    variant.step(ids)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / MIB
    return {**found, "peak_mib": peak - before, "weights_mib": before, "total_peak_mib": peak}


def _marks(variant: Any, now: Any) -> dict[str, float]:
    """Filled during the step that follows: `layers_mib` and `activation_mib`."""
    found: dict[str, float] = {}

    def layers_done(*_: Any) -> None:
        found.setdefault("layers_mib", now())

    def loss_done() -> None:
        found["activation_mib"] = now()

    variant.decoder.register_forward_hook(layers_done)
    variant.before_backward = loss_done
    return found


def _status(key: str) -> float:
    """MiB, from the kernel."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(json.loads(sys.argv[1]), sys.stdin, pipe)
