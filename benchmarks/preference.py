"""What preference training does, on a task whose answer is known (planted.py), as trained and measured by the product itself.

    python -m benchmarks.preference    → results/preference.json; then `python -m docs.preference` puts it into docs/preference.md

For each seed a base is pre-trained and pairs are drawn anew; every variant is trained by the product's trainer in this process,
on one stage, and all of them are measured by `evaluate_lora.py` on what was trained, on new prompts of the same topics, on
topics that were not trained, and on pairs without a preference. Of the
journal that docs/preference.md compares with, nothing is taken but what it tried.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tomli_w

from benchmarks import planted, record
from benchmarks.planted import Sizes
from pipeline.config import loading
from pipeline.data import tokenizer
from pipeline.training.data.read import read_data
from pipeline.training.engine import engine
from pipeline.training.run import assemble
from pipeline.training.run.stop import Watcher, hold_signals
from pipeline.training.start import resolve

ROOT = Path(__file__).resolve().parent.parent
LR, BETA, RANK = 3e-3, 0.1, 8
LAYERS, RETAIN = [1, 2], 0.3  # of taps; circuit breakers' weight of what stays
# Circuit breakers have to tell topics apart in states of words that all topics share, and what o_proj and down_proj put out says
# too little of a topic there: with these two and rank 8 what should stay was broken, too. All modules are the paper's choice.
WIDE: dict[str, Any] = {
    "target_modules": [*(f"{letter}_proj" for letter in "qkvo"), "gate_proj", "up_proj", "down_proj"],
    "lora_rank": 32,
    "lora_alpha": 32,
    "lr_scheduler": "cosine",
}
MEASURES = ("pref_acc_mean", "pref_prob_mean", "nll")
ROLES = {"train": "in-sample", "test": "test", "ood": "ood", "unrelated": "unrelated"}
PAIRS: dict[str, Any] = {"dataset_type": "preference", "sequence_len": 32}
DPO: dict[str, Any] = {"type": "preference", "loss_type": "sigmoid", "beta": BETA}
USUAL, TINY = Sizes(), Sizes(pretraining=20, trained=32, measured=16, steps=2, tap_steps=2, breaker_steps=2)


def tap(
    name: str, of: str, layers: list[int] | str, distance: str, weight: float, schedule: str, **more: str
) -> dict[str, Any]:
    """A table of [[objective.tap]]."""
    given = {"name": name, "of": of, "layers": layers, "distance": distance, "weight": weight, "schedule": schedule}
    return {**given, **more}


def reprpo(retain: float) -> dict[str, Any]:
    """The journal's two terms: rejected answers led to the chosen ones' states, chosen ones held, the second times `retain`."""
    taps = [tap("reroute", "rejected", LAYERS, "l2", 1.0, "1 - p/2", to="chosen")]
    if retain:
        taps.append(tap("retain", "chosen", LAYERS, "l2", retain, "p/2"))
    return {"objective": {"type": "representation", "tap": taps}}


def circuit_breakers(retain: float, held: str = "retain") -> dict[str, Any]:
    """Of the trained topics states turned away, of the rows in `held` kept, the second times `retain`."""
    broken = tap("break", "breaker", LAYERS, "relu_cosine", 1.0, "1 - p/2", mask="all")
    kept = tap("retain", "retain", "all", "l2", retain, "p/2", mask="all")
    rows = {"dataset_type": "completion", "sequence_len": 32}
    return {
        "run": WIDE,
        "objective": {"type": "circuit_breaker", "tap": [broken, kept]},
        "streams": [
            {"name": name, "stream": stream, **rows} for stream, name in (("breaker", "breaker"), ("retain", held))
        ],
    }


def variants() -> dict[str, dict[str, Any]]:
    """Of each run the keys that differ from the first's, by its name in the results."""
    inverted = {"field_chosen": "rejected", "field_rejected": "chosen"}
    return {
        "sigmoid": {},
        "ipo": {"objective": {"loss_type": "ipo"}},
        "sigmoid, a fiftieth of the rate": {"optimizer": {"lr": LR / 50}},
        "sigmoid, labels inverted": {"datasets": inverted},
        "reroute alone": reprpo(0.0),
        "reroute, retain × 0.1": reprpo(0.1),
        "reroute, retain × 1": reprpo(1.0),
        "circuit breakers": circuit_breakers(RETAIN),
        "circuit breakers, retain × 0": circuit_breakers(0.0),
        "circuit breakers, retain of the same topics": circuit_breakers(1.0, "same"),
    }


def settings(place: Path, name: str, sizes: Sizes, seed: int, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run; `keys`: of tables, those that differ, and of the run's own in `run`."""
    objective = keys.get("objective", {})
    steps = {"representation": sizes.tap_steps, "circuit_breaker": sizes.breaker_steps}
    datasets = keys.get("streams") or [{"name": "pairs", **PAIRS, **keys.get("datasets", {})}]
    return {
        "model": str(place / "base"),
        "output_dir": str(place / "runs" / name),
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "target_modules": ["o_proj", "down_proj"],
        "epochs": 10**6,
        "max_steps": steps.get(objective.get("type", ""), sizes.steps),
        "micro_batch_size_per_gpu": sizes.micro_batch,
        "pipeline_stages": 1,
        "seed": seed,
        "model_weight_dtype": "float32",
        "kernels": "none",
        "logging_steps": 10,
        "steps_per_print": 1000,
        "report_every_minutes": 0,
        "save_checkpoint_on_epoch_end": False,
        "save_every_n_epochs": 10**6,
        "optimizer": {"type": "adamw", "lr": LR, "weight_decay": 0.0, **keys.get("optimizer", {})},
        "objective": objective if objective.get("tap") else {**DPO, **objective},
        "datasets": [{**one, "dataset_path": str(place / f"{one['name']}.jsonl")} for one in datasets],
        **({"layers_to_transform": f"0:{LAYERS[-1]}"} if objective.get("tap") else {}),
        **keys.get("run", {}),
    }


def train(file: Path, watcher: Watcher) -> Path:
    """Run the configuration in `file` to its end; the adapter's folder."""
    config = loading.load(str(file), None, [])
    place = engine.initialise(1, file.parent / ".rendezvous", column_major=False)
    plan = resolve.resolve(config)
    data = read_data(plan.data, tokenizer.load(config.model), plan)
    run = assemble.trainer(config, plan, data, place, watcher, None, ["train.py", "--config", str(file)])
    run.outcome = lambda seconds, peak_bytes: None  # what was planned of so small a model takes longer than to train it
    run.run()
    engine.let_go(run.engine)
    return run.saver.run_dir / f"step{run.step}"


def evaluate(place: Path, adapters: list[Path]) -> Path:
    """The folder that evaluate_lora.py leaves of these adapters, the base among them."""
    datasets = [
        {"name": name, "role": role, "dataset_path": str(place / f"{name}.jsonl"), **PAIRS}
        for name, role in ROLES.items()
    ]
    config = {
        "model": str(place / "base"),
        "output_dir": str(place / "evaluations"),
        "model_weight_dtype": "float32",
        "micro_batch_size_per_gpu": 64,
        "beta": BETA,
        "bootstrap_resamples": 1000,
        "datasets": datasets,
    }
    file = place / "eval.toml"
    file.write_text(tomli_w.dumps(config))
    command = [sys.executable, "evaluate_lora.py", "--config", str(file), "--adapters", "base", *map(str, adapters)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (folder,) = (place / "evaluations").glob("2*")
    return folder


def rows_of(folder: Path, seed: int, cosines: Mapping[str, dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each run and dataset: figures, their differences to the base with intervals over prompts, mean log-probabilities
    of a token of either answer, lights, and of runs with taps the last step's `cosines`."""
    lights = json.loads((folder / "evaluation.json").read_text())["lights"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with (folder / "table.csv").open(newline="") as file:
        for line in (line for line in csv.DictReader(file) if line["measure"] in MEASURES):
            run, dataset, measure = line["adapter"], line["dataset"], line["measure"]
            row = found.setdefault((run, dataset), {"run": run, "seed": seed, "dataset": dataset})
            row[measure] = number(line["value"])
            if line["delta"]:
                row[f"{measure}_delta"] = [
                    number(line[key]) for key in ("delta", "delta_low", "delta_high") if line[key]
                ]
            for key in ("p", "perplexity_ratio"):
                if line[key]:
                    row[key if key != "p" else f"{measure}_p"] = number(line[key])
    records = pq.read_table(folder / "records.parquet").to_pylist()
    for (run, dataset), row in found.items():
        mine = [one for one in records if (one["adapter"], one["dataset"]) == (run, dataset)]
        for side in "wl":
            row[f"lp_{side}"] = number(sum(one[f"lp_{side}"] / one[f"n_{side}"] for one in mine) / len(mine))
        of_run = [light for light in lights if light["adapter"] == run and light["dataset"] in (dataset, None)]
        row["lights"] = sorted(light["what"] for light in of_run)
        if cosines.get(run):
            row["cosines"] = cosines[run]
    return list(found.values())


def number(text: str | float) -> float:
    """To seven digits: more would be rounding's."""
    return float(f"{float(text):.7g}")


def last_cosines(run_dir: Path) -> dict[str, float]:
    """Of the run's last step, by tap and layer; empty without taps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    head = "tap_cosine/"
    return {name.removeprefix(head): number(value) for name, value in steps[-1].items() if name.startswith(head)}


def measure(place: Path, seed: int, sizes: Sizes, wanted: Mapping[str, Any], watcher: Watcher) -> list[dict[str, Any]]:
    """All variants `wanted` of one seed."""
    began = time.monotonic()
    (place / "base").mkdir(parents=True)
    loss = planted.save_base(place / "base", seed, sizes.pretraining)
    planted.write_rows(place, seed, sizes)
    print(f"seed {seed}: pre-trained to {loss:.3f} nats a token, {time.monotonic() - began:.0f} s", flush=True)
    adapters, cosines = [], {}
    for name, keys in wanted.items():
        began = time.monotonic()
        file = place / f"{name}.toml"
        file.write_text(tomli_w.dumps(settings(place, name, sizes, seed, keys)))
        adapters.append(place / "adapters" / name)
        saved = train(file, watcher)
        shutil.copytree(saved, adapters[-1])
        cosines[name] = last_cosines(saved.parent)
        print(f"seed {seed}: {name}, {time.monotonic() - began:.0f} s", flush=True)
    return rows_of(evaluate(place, adapters), seed, cosines)


def main() -> None:
    """Train, measure, show and record."""
    command = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    command.add_argument("--seeds", type=int, default=5, metavar="N", help="how many")
    command.add_argument("--tiny", action="store_true", help="to see that it runs")
    command.add_argument("--only", nargs="+", metavar="RUN", help="of the variants, by their names")
    command.add_argument("--out", type=Path, help="folder of the JSON")
    asked = command.parse_args()
    watcher = Watcher(hold_signals())
    sizes = TINY if asked.tiny else USUAL
    wanted = {name: keys for name, keys in variants().items() if not asked.only or name in asked.only}
    began, rows = time.monotonic(), list[dict[str, Any]]()
    fixed = {**sizes._asdict(), "lr": LR, "beta": BETA, "rank": RANK, "layers": LAYERS, "retain": RETAIN}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.seeds):
            found = measure(Path(folder) / str(seed), seed, sizes, wanted, watcher)
            rows += found
            show(found)
            settings_used = {**fixed, "seeds": seed + 1, "seconds": time.monotonic() - began}
            print("written:", record.write("preference", settings_used, rows, asked.out), flush=True)
    engine.shutdown()


def show(rows: list[dict[str, Any]]) -> None:
    """A line each."""
    for row in rows:
        figures = (
            f"acc {row['pref_acc_mean']:.2f} prob {row['pref_prob_mean']:.3f} lp {row['lp_w']:6.2f} {row['lp_l']:6.2f}"
        )
        print(f"{row['run']:44} seed {row['seed']} {row['dataset']:10} {figures}  {', '.join(row['lights'])}")


if __name__ == "__main__":
    main()
