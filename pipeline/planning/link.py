"""How fast two neighbouring processes of a run hand a hidden state to each other, and whether they find each other at all.

    python -m pipeline.planning.link RENDEZVOUS RANK WORLD BYTES

is one of the processes: over NCCL where there are GPUs, else over gloo. `measure` starts them; what it found is remembered for
the machine, and `rate` is what a plan takes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from pipeline.files import machine_cache, write_text
from pipeline.foreign import read_object

BYTES = 64 * 2**20
ROUNDS = 4
PATIENCE_S = 120.0
FILE = "link.json"


class Link(NamedTuple):
    """Bytes a second one way, the slowest of all neighbours, and what it goes over ('nccl' or 'gloo')."""

    bytes_per_s: float
    backend: str


def measure(processes: int, n_bytes: int = BYTES, patience_s: float = PATIENCE_S) -> Link:
    """Start `processes` that send `n_bytes` to each other in turn. RuntimeError with what they said where they do not end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipeline.planning.link", str(Path(folder) / "rendezvous")]
        started = [
            subprocess.Popen(
                [*command, str(rank), str(processes), str(n_bytes)],
                cwd=Path(__file__).resolve().parents[2],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        until = time.monotonic() + patience_s
        try:
            said = [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"nothing came within {patience_s:.0f} s") from None
        finally:
            for process in started:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}")
    found = json.loads(said[0][0].strip().splitlines()[-1])
    return Link(found["bytes_per_s"], found["backend"])


def remember(link: Link, machine: str) -> None:
    """For plans on this machine, whose devices are called `machine`. OSError where there is no cache."""
    write_text(machine_cache() / FILE, json.dumps({**link._asdict(), "machine": machine}) + "\n")


def rate(machine: str) -> float | None:
    """Bytes a second between neighbours, as they were measured on devices called `machine`; None where they were not."""
    try:
        found = read_object(machine_cache() / FILE, "what doctor.py measured")
    except Exception:  # no cache, no file, or one of something else: then nothing is known
        return None
    speed = found.get("bytes_per_s")
    return speed if found.get("machine") == machine and isinstance(speed, float) and speed > 0 else None


def main() -> None:
    """One of the processes."""
    import torch
    import torch.distributed as dist

    rendezvous, rank, world, n_bytes = sys.argv[1], *map(int, sys.argv[2:5])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    block = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    slowest = 0.0
    for sender in range(world - 1):
        least = float("inf")
        for _ in range(ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            if rank == sender:
                dist.send(block, sender + 1)
            elif rank == sender + 1:
                dist.recv(block, sender)
            if on_gpu:
                torch.cuda.synchronize()
            least = min(least, time.perf_counter() - began)
        taken = torch.tensor(least if rank == sender + 1 else 0.0, device=device)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        slowest = max(slowest, float(taken))
    if rank == 0:
        print(json.dumps({"bytes_per_s": n_bytes / slowest, "backend": backend}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
