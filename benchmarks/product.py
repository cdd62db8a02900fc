"""Training through the product, `train.py`, against Hugging Face's Trainer over PEFT, and against its own stage alone.

    python -m benchmarks.product [--pipeline]

A small Cohere model with random weights, steps of eight micro-batches, all as a user starts it: reading data, the optimizer's
step and the log are in the time. `kernels` is left at its default. Each variant is a run of its own from start to end; they
take turns, and the fastest step of all rounds counts, the first of a run left out. The stage alone is forward, loss and
backward in one process, without DeepSpeed, data, optimizer and log. Figures are ratios to be read within one run.
`--pipeline`: nothing but two processes against one that has all cores, at steps of sixteen micro-batches.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch

from benchmarks import record
from benchmarks.gpu_check.setting import Setting, base_folder
from benchmarks.shapes import CPU, TINY, Shape
from benchmarks.variants import name
from benchmarks.worker import Worker
from pipeline.console import UserError
from pipeline.model.memory.levels import RecomputeLevel

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT / "datasets" / "sample_books" / "*.md"
SHAPE = CPU._replace(vocabulary=16384)
MICRO_BATCHES, STEPS = 8, 4
STAGE_ALONE = "stage alone"
LEARNING_RATE = 1e-4


class Run(NamedTuple):
    """One variant: `stages` of train.py (0: the peer), threads of each process, and micro-batches of a step."""

    stages: int
    threads: int
    checkpointing: bool = False
    micro_batches: int = MICRO_BATCHES

    @property
    def name(self) -> str:
        if self.stages:
            return f"train.py, {self.stages} process{'es' if self.stages > 1 else ''} of {self.threads} thread(s)"
        return f"peer{' + checkpointing' if self.checkpointing else ''}, {self.threads} thread(s)"


def runs(cores: int) -> list[Run]:
    """One process with one thread and with all cores, two with half of them each, and the peer with all."""
    single = [Run(1, threads) for threads in sorted({1, cores})]
    return [*single, Run(2, max(1, cores // 2)), Run(0, cores), Run(0, cores, checkpointing=True)]


def pipeline_runs(cores: int) -> list[Run]:
    """Steps of so many micro-batches that the schedule's bubble of two stages is a seventeenth."""
    return [Run(1, cores, micro_batches=16), Run(2, max(1, cores // 2), micro_batches=16)]


def step_seconds(run: Run, shape: Shape, folder: Path) -> list[float]:
    """Of each step but the first. UserError with the end of the output where it failed."""
    out = Path(tempfile.mkdtemp(dir=folder))
    if run.stages:
        config = write_config(run, shape, folder, out)
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(run.stages)]
        command = [*(launcher if run.stages > 1 else [sys.executable]), str(ROOT / "train.py"), "--config", str(config)]
    else:
        request = json.dumps({"shape": list(shape), "checkpointing": run.checkpointing, "out": str(out)})
        command = [sys.executable, "-m", "benchmarks.product", "--peer", request]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{run.name} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-15:]))
    (log,) = out.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    speeds = [line["train/tokens_per_s"] for line in lines if "train/tokens_per_s" in line]
    return [run.micro_batches * shape.tokens / speed for speed in speeds[1:]]


def write_config(run: Run, shape: Shape, folder: Path, out: Path) -> Path:
    """What a user would write."""
    given = Setting(torch.device("cpu"), folder, shape, shape, shape, speed_counts=False)
    settings = {
        "model": str(base_folder(given, shape)),
        "output_dir": str(out),
        "adapter_type": "multiplicative_lora",
        "lora_rank": shape.rank,
        "lora_alpha": shape.rank,
        "target_modules": ["down_proj"],
        "layers_to_transform": f"0:{shape.adapted[-1]}",
        "pipeline_stages": run.stages,
        "gradient_accumulation_steps": run.micro_batches,
        "model_weight_dtype": shape.dtype,
        "max_steps": STEPS,
        "optimizer": {"type": "adamw_kahan", "lr": LEARNING_RATE},
        "datasets": [
            {"name": "books", "dataset_type": "textfile", "dataset_path": str(BOOKS), "sequence_len": shape.tokens}
        ],
    }
    path = out / "config.toml"
    path.write_text(tomli_w.dumps(settings))
    return path


def become_peer(shape: Shape, checkpointing: bool, out: Path) -> None:
    """Trainer.train over PEFT's model with the founding change; its speed as train.py logs its own."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.variants import peer_model, tokens

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            speed = MICRO_BATCHES * shape.tokens / (time.perf_counter() - self.began)
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"train/tokens_per_s": speed}) + "\n")

    model, *_ = peer_model(shape, torch.device("cpu"))
    (ids,) = tokens(shape, torch.device("cpu"))
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        save_strategy="no",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    rows = [{"input_ids": ids, "labels": ids}] * (STEPS * MICRO_BATCHES)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()  # type: ignore[arg-type]


def stage_seconds(shape: Shape, threads: int) -> float:
    """Of the micro-batches of one step through the stage alone."""
    with Worker(name(RecomputeLevel.EVERYTHING), shape, threads=threads) as worker:
        worker.ask(do="time")
        return MICRO_BATCHES * min(float(worker.ask(do="time")["seconds"]) for _ in range(MICRO_BATCHES))


def measure(shape: Shape, cores: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each variant, all in turn."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for run in runs(cores):
            seconds.setdefault(run.name, []).extend(step_seconds(run, shape, folder))
        for threads in sorted({1, cores}):
            seconds.setdefault(f"{STAGE_ALONE}, {threads} thread(s)", []).append(stage_seconds(shape, threads))
    peer = min(seconds[Run(0, cores).name])
    return [
        {**timed(variant, found, MICRO_BATCHES * shape.tokens), "speed_over_peer": peer / min(found)}
        for variant, found in seconds.items()
    ]


def measure_pipeline(shape: Shape, cores: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for one process, and one for two."""
    compared = pipeline_runs(cores)
    seconds: dict[Run, list[float]] = {run: [] for run in compared}
    for _ in range(rounds):
        for run in compared:
            seconds[run] += step_seconds(run, shape, folder)
    alone = min(seconds[compared[0]])
    return [
        {**timed(run.name, found, run.micro_batches * shape.tokens), "speed_over_one_process": alone / min(found)}
        for run, found in seconds.items()
    ]


def timed(variant: str, found: list[float], tokens: int) -> dict[str, Any]:
    """A row's name and times; `tokens` of a step."""
    return {"variant": variant, "seconds": min(found), "all_seconds": found, "tokens_per_s": tokens / min(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--tiny", action="store_true", help="a model of a second, to see that everything runs")
    parser.add_argument("--pipeline", action="store_true", help="two processes against one, at more micro-batches")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--dtype", default=SHAPE.dtype, help="of the weights; where a CPU multiplies bf16 slowly, float32"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # of a process that this one starts
    given = parser.parse_args()
    if given.peer:
        asked = json.loads(given.peer)
        become_peer(Shape(*asked["shape"]), asked["checkpointing"], Path(asked["out"]))
        return
    shape = (TINY if given.tiny else SHAPE)._replace(dtype=given.dtype)
    made = measure_pipeline if given.pipeline else measure
    with tempfile.TemporaryDirectory(prefix="product-") as folder:
        rows = made(shape, os.cpu_count() or 1, given.rounds, Path(folder))
    for row in rows:
        against, ratio = list(row.items())[-1]
        print(
            f"{row['variant']:44} {row['seconds']:9.2f} s a step {row['tokens_per_s']:9.0f} tokens/s {ratio:7.2f} {against}"
        )
    settings = {"shape": shape._asdict(), "micro_batches": MICRO_BATCHES, "steps": STEPS, "rounds": given.rounds}
    if given.pipeline:
        settings["micro_batches"] = pipeline_runs(1)[0].micro_batches
    print("written:", record.write("product_pipeline" if given.pipeline else "product", settings, rows, given.out))


if __name__ == "__main__":
    main()
