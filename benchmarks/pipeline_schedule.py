"""Two processes of a pipeline over gloo: the measured step against a simulation from the stages' own times.

    python -m benchmarks.pipeline_schedule

DeepSpeed's launcher starts two real processes, which run whole steps through the engine the product trains with. The
simulation is the planner's own (pipeline/planning/timeline.py), from each stage's forward and backward measured by
themselves; the optimizer's step, which is not in it, is added as measured. Minima of the rounds on both sides. The ratio
says how far the planner's account of a step can be trusted; it says nothing about GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.shapes import CPU, TINY, Shape
from pipeline.console import UserError
from pipeline.planning.timeline import simulate

ROOT = Path(__file__).resolve().parent.parent
SMALL = CPU._replace(vocabulary=8192, tokens=256)
TIMEOUT_S = 900


def launch(request: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    """What the two processes measured. UserError with the end of their output if they failed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        worker = ROOT / "benchmarks" / "pipeline_stage.py"
        launcher = Path(sys.executable).parent / "deepspeed"
        command = [launcher, "--num_gpus", "2", worker, folder / "request.json", folder]
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        results = sorted(folder.glob("[01].json"))
        if len(results) != 2:
            raise UserError("the two processes failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
        return [json.loads(path.read_text()) for path in results]


def stage_seconds(found: list[dict[str, Any]], condition: str) -> tuple[list[float], list[float]]:
    """The least forward and backward seconds of each stage."""
    return [min(f for f, _ in facts[condition]) for facts in found], [
        min(b for _, b in facts[condition]) for facts in found
    ]


def compare(found: list[dict[str, Any]], micro_batches: int) -> dict[str, Any]:
    """One row: measured step, simulated steps, and what they are made of."""
    transfer = min(found[0]["transfer_s"])
    optimizer = max(min(facts["optimizer_s"]) for facts in found)
    row: dict[str, Any] = {
        "micro_batches": micro_batches,
        "measured_s": min(found[0]["step_s"]),
        "transfer_s": transfer,
        "optimizer_s": optimizer,
    }
    for condition in ("together", "alone"):
        forward, backward = stage_seconds(found, condition)
        simulated = simulate(forward, backward, transfer, micro_batches).step_s + optimizer
        row |= {
            f"forward_s_{condition}": forward,
            f"backward_s_{condition}": backward,
            f"simulated_s_{condition}": simulated,
            f"ratio_{condition}": row["measured_s"] / simulated,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--cut", type=int, help="the second stage's first layer; the middle unless given")
    parser.add_argument("--level", default="everything", help="what the layers keep for backward")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="of each process")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    given = parser.parse_args()
    shape: Shape = TINY if given.tiny else SMALL
    cut = given.cut or shape.layers // 2
    rows = []
    print(
        f"{'micro-batches':>13} {'measured s':>11} {'simulated s':>12} {'ratio':>6} {'(alone)':>8}   "
        "forward s, backward s of each stage"
    )
    for count in given.micro_batches:
        request = {
            "shape": list(shape),
            "micro_batches": count,
            "rounds": given.rounds,
            "cut": cut,
            "level": given.level,
        }
        row = compare(launch(request, given.threads), count)
        rows.append(row)
        times = zip(row["forward_s_together"], row["backward_s_together"], strict=True)
        print(
            f"{count:>13} {row['measured_s']:11.3f} {row['simulated_s_together']:12.3f} {row['ratio_together']:6.3f} "
            f"{row['ratio_alone']:8.3f}   {', '.join(f'{f:.3f} + {b:.3f}' for f, b in times)}",
            flush=True,
        )
    print("(simulated from stage times with both processes at work; alone: with the other one idle)")
    settings = {
        "shape": shape._asdict(),
        "cut": cut,
        "level": given.level,
        "rounds": given.rounds,
        "threads_each": given.threads,
    }
    print("written:", record.write("pipeline_schedule", settings, rows, given.out))


if __name__ == "__main__":
    main()
