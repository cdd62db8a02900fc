"""One big GPU: Command-R 35B's shape with random weights, ours against Hugging Face Trainer + PEFT.

    python -m benchmarks.gpu_h200                              the full model (65 GiB of weights, for 141 GB)
    python -m benchmarks.gpu_h200 --layers 8                   ablations, and GPUs of 80 GB
    python -m benchmarks.gpu_h200 --device cpu --tiny          to see that it runs

First the kernels against fp64 and the training against the peer's on a small model; then ceilings; then every variant
in a process of its own, the important ones first: 3 steps to warm up, 5 timed between CUDA events, the peak of torch's
allocator. Beside each stands what performance.md's FLOP counts and the ceilings predict. What does not fit into the
wall limit is skipped and said. One step is forward, loss and backward of one row; no optimizer step on either side.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ceilings, correctness, cpu_training, record
from benchmarks.shapes import COMMAND_R, TINY, Ceilings, Shape, Work, kept_bytes, peer_step, predicted_s, step
from benchmarks.variants import HF, HF_CHECKPOINTING, ORACLE, name
from benchmarks.worker import Worker, WorkerError
from pipeline.console import UserError
from pipeline.model.memory.levels import RecomputeLevel

WARM_UP, TIMED = 3, 5
WALL_LIMIT_S = 570.0
TARGET = 1.6
SMALL = COMMAND_R._replace(hidden=1024, feed_forward=2816, heads=8, layers=4, vocabulary=32000, tokens=1024)
# What allocators return to cudaMalloc only reluctantly must not decide what fits.
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


class Case(NamedTuple):
    """A variant, its work by formula, and the bytes a token and layer that go to the host."""

    variant: str
    work: Work
    host_bytes: int = 0


def cases(shape: Shape) -> list[Case]:
    """The most important first."""
    every = RecomputeLevel.EVERYTHING
    levels = (RecomputeLevel.INPUT, RecomputeLevel.PROJECTIONS, RecomputeLevel.ATTENTION, RecomputeLevel.ADAPTER)
    return [
        Case(HF_CHECKPOINTING, peer_step(shape, checkpointing=True)),
        Case(name(every), step(shape, every)),
        Case(HF, peer_step(shape, checkpointing=False)),
        Case(name(RecomputeLevel.INPUT), step(shape, RecomputeLevel.INPUT)),
        Case(name(every, on_host=True), step(shape, every), kept_bytes(shape, every)),
        Case(name(every, "none"), step(shape, every, fused=False)),
        *(Case(name(level), step(shape, level)) for level in levels[1:]),
        Case(name(RecomputeLevel.INPUT, "none"), step(shape, RecomputeLevel.INPUT, fused=False)),
        Case(
            name(RecomputeLevel.PROJECTIONS, on_host=True),
            step(shape, RecomputeLevel.PROJECTIONS),
            kept_bytes(shape, RecomputeLevel.PROJECTIONS),
        ),
    ]


def prediction(case: Case, shape: Shape, rates: Ceilings) -> dict[str, Any]:
    """The part of a row that is known before anything runs."""
    host = float(case.host_bytes) * shape.tokens * shape.layers
    return {
        "variant": case.variant,
        "predicted_s": predicted_s(case.work, rates, host),
        "gflop_per_token": case.work.flops(shape) / shape.tokens / 1e9,
    }


def run(case: Case, shape: Shape, device: str, rates: Ceilings, left_s: float) -> dict[str, Any]:
    """A row: seconds, memory, prediction; or the reason why there is none."""
    row = prediction(case, shape, rates)
    deadline = time.monotonic() + left_s

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    try:
        with Worker(case.variant, shape, device, ENVIRONMENT if device == "cuda" else None) as worker:
            row |= worker.ask(left(), do="memory")
            for _ in range(WARM_UP - 1):
                worker.ask(left(), do="time")
            seconds = [worker.ask(left(), do="time")["seconds"] for _ in range(TIMED)]
    except WorkerError as error:
        return {**row, "reason": str(error)[-600:]}
    best = min(seconds)
    return {
        **row,
        "seconds": best,
        "median_s": statistics.median(seconds),
        "all_seconds": seconds,
        "tokens_per_s": shape.tokens / best,
        "flops_per_s": case.work.flops(shape) / best,
        "measured_over_predicted": best / row["predicted_s"],
    }


def show(row: dict[str, Any], peer_s: float | None) -> None:
    """One line of the table."""
    head = f"{row['variant']:34} {row['gflop_per_token']:8.1f} {row['predicted_s']:9.3f} "
    if "seconds" not in row:
        print(f"{head} {row['reason'].splitlines()[-1][:90]}", flush=True)
        return
    ratio = f"{peer_s / row['seconds']:6.2f}" if peer_s else f"{'–':>6}"
    print(
        f"{head}{row['seconds']:9.3f} {row['measured_over_predicted']:6.2f} {row['tokens_per_s']:9.0f} {ratio} "
        f"{row['flops_per_s'] / 1e12:8.3g} {row['activation_mib'] / 1024:10.3f} {row['peak_mib'] / 1024:8.3f} "
        f"{row.get('total_peak_mib', 0) / 1024:8.2f}",
        flush=True,
    )


def same_training(device: str, shape: Shape) -> dict[str, Any]:
    """Loss and gradients of ours, with all kernels and with none, beside the peer's, on a model of seconds."""
    variants = [
        ORACLE,
        HF,
        name(RecomputeLevel.EVERYTHING),
        name(RecomputeLevel.EVERYTHING, "none"),
        name(RecomputeLevel.INPUT),
    ]
    try:
        with contextlib.ExitStack() as stack:
            return cpu_training.check({v: stack.enter_context(Worker(v, shape, device)) for v in variants})
    except (UserError, WorkerError) as error:
        return {"problem": str(error)}


def arguments() -> argparse.Namespace:
    """--device, --tiny, --layers, --tokens, --only, --wall-limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a second, to see that everything runs")
    parser.add_argument("--layers", type=int, help="of 40; 8 for ablations")
    parser.add_argument("--tokens", type=int, help="of 8192")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="these, in this order")
    parser.add_argument("--wall-limit", type=float, default=WALL_LIMIT_S, help="seconds; what does not fit is skipped")
    parser.add_argument("--skip-checks", action="store_true", help="they were run by an earlier command")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    return parser.parse_args()


def main() -> int:
    began, given = time.monotonic(), arguments()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; --device cpu --tiny shows that the benchmark runs")
    shape = TINY if given.tiny else COMMAND_R
    shape = shape._replace(layers=given.layers or shape.layers, tokens=given.tokens or shape.tokens)
    settings: dict[str, Any] = {
        "shape": shape._asdict(),
        "warm_up": WARM_UP,
        "timed": TIMED,
        "environment": ENVIRONMENT,
        "optimizer_step": "excluded on both sides",
        "ours": "one process, no DeepSpeed",
    }
    device = torch.device(given.device)
    if not given.skip_checks:
        settings["kernels"] = correctness.check(shape, device)
        settings["same_training"] = same_training(given.device, TINY if given.tiny else SMALL)
    rates = ceilings.measure(shape, device)
    ceilings.table(rates, shape)
    settings["ceilings"] = rates._asdict()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # this process must not hold what the variants need
    print(
        f"\n{'variant':34} {'GFLOP/t':>8} {'predicted':>9} {'seconds':>9} {'m/p':>6} {'tokens/s':>9} {'× ckpt':>6} "
        f"{'TFLOP/s':>8} {'kept GiB':>10} {'peak GiB':>8} {'of all':>8}   ({shape.layers} layers, {shape.tokens} tokens)"
    )
    known = {case.variant: case for case in cases(shape)}
    if unknown := set(given.only) - set(known):
        raise UserError(f"no variant {sorted(unknown)}; there are {sorted(known)}")
    rows = measure([known[v] for v in given.only or known], shape, given.device, rates, began + given.wall_limit)
    seconds = {row["variant"]: row["seconds"] for row in rows if "seconds" in row}
    if {HF_CHECKPOINTING, name(RecomputeLevel.EVERYTHING)} <= set(seconds):
        ratio = seconds[HF_CHECKPOINTING] / seconds[name(RecomputeLevel.EVERYTHING)]
        settings["speed_over_checkpointing"] = ratio
        print(f"nothing recomputed against the checkpointing peer: × {ratio:.2f} (target {TARGET})")
    label = f"gpu_{shape.layers}_layers" if device.type == "cuda" else "gpu_on_cpu"
    print("written:", record.write(label, settings, rows, given.out))
    wrong = [row["kernel"] for row in settings.get("kernels", []) if not row["good"]]
    if wrong or "problem" in settings.get("same_training", {}):
        print(f"WRONG: {', '.join(wrong)} {settings.get('same_training', {}).get('problem', '')}", file=sys.stderr)
        return 1
    return 0


def measure(wanted: list[Case], shape: Shape, device: str, rates: Ceilings, deadline: float) -> list[dict[str, Any]]:
    """A row for each case until `deadline`; one is not begun where the longest so far would not fit any more."""
    rows: list[dict[str, Any]] = []
    longest = 0.0
    peer_s: float | None = None
    for case in wanted:
        began = time.monotonic()
        if began + longest > deadline:
            row = {**prediction(case, shape, rates), "reason": "skipped: the wall limit is near"}
        else:
            row = run(case, shape, device, rates, deadline - began)
        longest = max(longest, time.monotonic() - began)
        rows.append(row)
        if case.variant == HF_CHECKPOINTING and "seconds" in row:
            peer_s = row["seconds"]
        show(row, peer_s)
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        sys.exit(f"error: {problem}")
