"""Training on the CPU: ours at each activation level, and with each set of kernels, against Hugging Face Trainer + PEFT.

    python -m benchmarks.cpu_training             levels     → results/cpu_training.json
    python -m benchmarks.cpu_training --kernels   kernels    → results/cpu_kernels.json

One step is forward, loss and backward of one row through the same small Cohere model; no optimizer step on either side;
ours in one process without DeepSpeed. Every variant is a process of its own. First all are checked: loss and adapter
gradients against the peer in fp32. Then all live side by side and are timed in turn, the minimum of the rounds. Then
each runs one step in a fresh process for its memory. Figures are ratios to be read within one run.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import record
from benchmarks.shapes import CPU, TINY, Shape
from benchmarks.variants import HF, HF_CHECKPOINTING, ORACLE, kernel_sets, name
from benchmarks.worker import MEMORY_ENVIRONMENT, Worker
from pipeline.console import UserError
from pipeline.model.memory.levels import RecomputeLevel

LEVELS = [HF, HF_CHECKPOINTING, *(name(level) for level in reversed(RecomputeLevel))]
KERNELS = [HF, HF_CHECKPOINTING, *(name(RecomputeLevel.EVERYTHING, label) for label in kernel_sets())]
# Every bf16 variant rounds at the same places but for what a kernel keeps in fp32, so its distance from fp32 is about the
# peer's. Twice the peer's leaves room for roundings that fall differently.
ALLOWED = 2.0
FASTER_THAN_CHECKPOINTING, OF_ITS_ACTIVATIONS = 1.4, 0.65


def check(workers: dict[str, Worker]) -> dict[str, dict[str, float]]:
    """Loss and relative distance of all adapter gradients from the fp32 peer's. UserError if one is not the same training.

    The fp32 peer, ORACLE, must be among the workers, and the bf16 one, HF.
    """
    losses: dict[str, float] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (variant, worker) in enumerate(workers.items()):
            path = Path(folder) / f"{number}.safetensors"
            losses[variant] = worker.ask(do="gradients", path=str(path))["loss"]
            gradients[variant] = load_file(path)
    found, off = compare(losses, gradients)
    if off:
        raise UserError(f"{', '.join(off)}: not the same training as the peer's; nothing was timed")
    return found


def compare(
    losses: dict[str, float], gradients: dict[str, dict[str, Tensor]]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """By variant, ORACLE and HF among them: loss and gradients' distance from ORACLE's; those that are not the same training."""
    found = {v: {"loss": losses[v], "gradient_error": distance(gradients[v], gradients[ORACLE])} for v in losses}
    print(f"{'the same training?':34} {'loss':>10} {'gradients: distance from fp32':>32}")
    for variant, facts in found.items():
        print(f"{variant:34} {facts['loss']:10.5f} {facts['gradient_error']:32.2e}")
    # fp32 has no rounding to speak of: there all must be within what sums of thousands of fp32 products may differ.
    limit = max(ALLOWED * found[HF]["gradient_error"], 1e-5)
    # A bf16 logit is off by 2^-9 of its size at most, and the loss is a mean of differences of logits.
    off = [
        v
        for v, f in found.items()
        if f["gradient_error"] > limit or abs(f["loss"] - found[ORACLE]["loss"]) > 2**-9 * found[ORACLE]["loss"]
    ]
    return found, off


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖one − other‖ / ‖other‖ over all tensors."""
    wide = torch.cat([other[n].flatten() for n in sorted(other)]).double()
    return float((torch.cat([one[n].flatten() for n in sorted(one)]).double() - wide).norm() / wide.norm())


def times(workers: dict[str, Worker], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant's steps, one of each in a round, in turn; the first round is not counted."""
    found: dict[str, list[float]] = {v: [] for v in workers}
    for counted in (False, *[True] * rounds):
        for variant, worker in workers.items():
            seconds = worker.ask(do="time")["seconds"]
            if counted:
                found[variant].append(seconds)
    return found


def memory(variant: str, shape: Shape, threads: int) -> dict[str, float]:
    """MiB of one step in a fresh process."""
    with Worker(variant, shape, environment=MEMORY_ENVIRONMENT, threads=threads) as worker:
        return worker.ask(do="memory")


def table(rows: list[dict[str, Any]], shape: Shape) -> None:
    """Speed and memory beside the two peers'."""
    by_name = {row["variant"]: row for row in rows}
    whole, checkpointing = by_name[HF], by_name[HF_CHECKPOINTING]
    print(
        f"\n{'variant':34} {'tokens/s':>9} {'× hf':>6} {'× ckpt':>6}  {'peak':>6} {'layers':>7} {'+ loss':>7} {'of hf':>6}"
        "   MiB beyond the weights: at the peak; kept by the layers; with the loss"
    )
    for row in rows:
        print(
            f"{row['variant']:34} {row['tokens_per_s']:9.0f} {whole['seconds'] / row['seconds']:6.2f} "
            f"{checkpointing['seconds'] / row['seconds']:6.2f}  {row['peak_mib']:6.0f} {row['layers_mib']:7.0f} "
            f"{row['activation_mib']:7.0f} {row['layers_mib'] / whole['layers_mib']:6.0%}"
        )
    print(f"({shape}; tokens/s from the fastest round)")


def targets(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was to be shown, and whether it was: nothing recomputed against both peers."""
    by_name = {row["variant"]: row for row in rows}
    ours, whole, checkpointing = by_name[name(RecomputeLevel.EVERYTHING)], by_name[HF], by_name[HF_CHECKPOINTING]
    found = {
        "speed_over_checkpointing": checkpointing["seconds"] / ours["seconds"],
        "speed_over_hf": whole["seconds"] / ours["seconds"],
        "layers_memory_of_hf": ours["layers_mib"] / whole["layers_mib"],
        "activation_memory_of_hf": ours["activation_mib"] / whole["activation_mib"],
    }
    met = {
        f"≥ {FASTER_THAN_CHECKPOINTING} × the checkpointing peer": (
            found["speed_over_checkpointing"] >= FASTER_THAN_CHECKPOINTING
        ),
        "no slower than the peer without": found["speed_over_hf"] >= 1,
        f"≤ {OF_ITS_ACTIVATIONS:.0%} of its layers' activations": found["layers_memory_of_hf"] <= OF_ITS_ACTIVATIONS,
    }
    print("nothing recomputed:", "; ".join(f"{text}: {'yes' if yes else 'NO'}" for text, yes in met.items()))
    return {**found, "met": met}


def arguments() -> argparse.Namespace:
    """--kernels, --tiny, --rounds, and the shape's dimensions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--kernels", action="store_true", help="compare sets of kernels instead of levels")
    parser.add_argument("--tiny", action="store_true", help="a model of a second, to see that everything runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="beside the two peers")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    for field in CPU._fields:
        parser.add_argument(f"--{field}", type=type(getattr(CPU, field)))
    return parser.parse_args()


def main() -> None:
    given = arguments()
    shape = TINY if given.tiny else CPU
    shape = shape._replace(**{f: v for f in Shape._fields if (v := getattr(given, f)) is not None})
    variants = KERNELS if given.kernels else LEVELS
    if given.only:
        variants = [HF, HF_CHECKPOINTING, *given.only]
    with contextlib.ExitStack() as stack:
        workers = {v: stack.enter_context(Worker(v, shape, threads=given.threads)) for v in [ORACLE, *variants]}
        checked = check(workers)
        workers.pop(ORACLE).close()
        measured = times(workers, given.rounds)
    rows = []
    for variant, seconds in measured.items():
        row = {"variant": variant, "seconds": min(seconds), "tokens_per_s": shape.tokens / min(seconds)}
        rows.append({**row, "all_seconds": seconds, **memory(variant, shape, given.threads), **checked[variant]})
    table(rows, shape)
    settings: dict[str, Any] = {
        "shape": shape._asdict(),
        "rounds": given.rounds,
        "threads": given.threads,
        "oracle": checked[ORACLE],
        "optimizer_step": "excluded on both sides",
        "ours": "one process, no DeepSpeed",
        "memory_environment": MEMORY_ENVIRONMENT,
    }
    if name(RecomputeLevel.EVERYTHING) in variants:
        settings["targets"] = targets(rows)
    print("written:", record.write("cpu_kernels" if given.kernels else "cpu_training", settings, rows, given.out))


if __name__ == "__main__":
    main()
