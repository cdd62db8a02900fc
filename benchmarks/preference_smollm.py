"""DPO of a real model on forty pairs, over two stages: what it learns of them, and what elsewhere.

    python -m benchmarks.preference_smollm    → results/preference_smollm.json; then `python -m docs.preference`

Takes SmolLM2-135M-Instruct as `make demo` unpacks it and configs/demo_preference.toml: to prefer answers in metric units.
`evaluate_lora.py`, over two stages too, compares adapter and base on the pairs that were trained, on new questions of the same
kinds, on temperatures, volumes and areas, of which no pair speaks, and on answers to other questions, which should have stayed.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

import demo
import quickstart
from benchmarks import record
from pipeline.config import loading

CONFIG = "demo_preference.toml"
PAIRS = {"dataset_type": "preference", "sequence_len": 128, "conversational": True}
FOLDER = "datasets/sample_preferences"
TALKS = {"dataset_type": "chat", "dataset_path": "datasets/sample_chats/the_tide_table.jsonl", "sequence_len": 256}
DATASETS: list[dict[str, Any]] = [
    {"name": "trained", "role": "in-sample", "dataset_path": f"{FOLDER}/metric_measures.jsonl", **PAIRS},
    {"name": "new_questions", "role": "test", "dataset_path": f"{FOLDER}/metric_measures_new.jsonl", **PAIRS},
    {"name": "other_quantities", "role": "ood", "dataset_path": f"{FOLDER}/metric_measures_elsewhere.jsonl", **PAIRS},
    {"name": "other_answers", "role": "unrelated", **TALKS},
]
MEASURES = ("pref_acc_mean", "pref_prob_mean", "reward_acc", "margin", "nll")
TEXTS = ("adapter", "dataset", "role", "measure")


def evaluate(adapter: Path) -> Path:
    """The folder that evaluate_lora.py leaves of base and adapter, over two stages."""
    config = {
        "model": str(demo.HERE / "base"),
        "output_dir": str(demo.HERE / "preference_evaluations"),
        "model_weight_dtype": "float32",
        "micro_batch_size_per_gpu": 8,
        "datasets": DATASETS,
    }
    file = demo.HERE / "preference_eval.toml"
    file.write_text(tomli_w.dumps(config))
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [str(deepspeed), "--quiet", "--num_gpus", str(quickstart.STAGES), "evaluate_lora.py"]
    command += ["--config", str(file), "--adapters", "base", str(adapter)]
    if code := subprocess.run(command, env=quickstart.environment()).returncode:
        sys.exit(code)
    return quickstart.newest(demo.HERE / "preference_evaluations", "2*")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row for each adapter, dataset and measure, as in evaluate_lora.py's own table; the adapter is called so."""
    rows = list[dict[str, Any]]()
    with (folder / "table.csv").open(newline="") as file:
        for line in (line for line in csv.DictReader(file) if line["measure"] in MEASURES):
            figures = {key: float(f"{float(text):.7g}") for key, text in line.items() if text and key not in TEXTS}
            rows.append({key: line[key] for key in TEXTS} | figures)
    for row in rows:
        row["adapter"] = "base" if row["adapter"] == "base" else "adapter"
    return rows


def said(run: Path) -> list[dict[str, Any]]:
    """What the model answered before the first step and after the last one."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = (lines[0]["step"], lines[-1]["step"])
    return [{key: line[key] for key in ("step", "prompt", "text")} for line in lines if line["step"] in ends]


def main() -> None:
    """Train, measure and record."""
    command = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    command.add_argument("--max-steps", type=int, metavar="N", help="a short look")
    command.add_argument("--out", type=Path, help="folder of the JSON")
    asked = command.parse_args()
    os.chdir(quickstart.ROOT)
    if not (demo.HERE / "base").exists():
        demo.HERE.mkdir(parents=True, exist_ok=True)
        demo.make_base()
    for name in ("preference_runs", "preference_evaluations"):
        shutil.rmtree(demo.HERE / name, ignore_errors=True)
    quickstart.train(CONFIG, *(["--set", f"max_steps={asked.max_steps}"] if asked.max_steps else []))
    print("written:", measure(asked.out))


def measure(out: Path | None) -> Path:
    """Evaluate what was trained last, and record it."""
    run = quickstart.newest(demo.HERE / "preference_runs", "2*")
    adapter = quickstart.newest(run, "step*")
    begun = datetime.strptime(run.name, "%Y%m%d_%H-%M-%S").replace(tzinfo=UTC)
    began = time.monotonic()
    folder = evaluate(adapter)
    config = loading.load(CONFIG)
    settings = {
        "stages": config.pipeline_stages,
        "steps": int(adapter.name.removeprefix("step")),
        "epochs": config.epochs,
        "pairs_a_step": config.micro_batch_size_per_gpu * config.gradient_accumulation_steps,
        "lr": config.optimizer.lr,
        "rank": config.lora_rank,
        "beta": config.objective.beta if config.objective else None,
        "train_seconds": round(adapter.stat().st_mtime - begun.timestamp(), 1),
        "evaluate_seconds": round(time.monotonic() - began, 1),
        "lights": json.loads((folder / "evaluation.json").read_text())["lights"],
        "said": said(run),
    }
    for light in settings["lights"]:
        light["adapter"] = "adapter"
    return record.write("preference_smollm", settings, rows_of(folder), out)


if __name__ == "__main__":
    main()
