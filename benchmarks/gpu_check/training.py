"""Real runs of train.py: one that is killed goes on to the bit, and one is compared with its plan."""

import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file

from benchmarks.gpu_check.setting import Outcome, Setting, base_folder, use_deterministic_operations
from benchmarks.worker import ROOT

BOOK = ROOT / "datasets" / "sample_books" / "the_salt_ledger.md"
SAVED, COMPARED = 2, 4  # steps
PLANNED_STEPS = 8
POLL_S = 0.01
# As tests/planning/test_planned.py asks of the CPU.
PLANNED_MEMORY = 0.10


def killed_and_resumed(given: Setting, start_method: str = "spawn") -> Outcome:
    """A run is killed (SIGKILL) after its checkpoint of step 4, that checkpoint is taken away, and it goes on from step 2."""
    config = write_config(given, "killed", save_steps=SAVED, checkpoint_on_save=True, max_steps=10**6)
    runs = given.folder / "killed"
    process = start(start_method, given, ["--config", str(config)], exact=True)
    pattern = f"*/global_step{COMPARED}/manifest.json"
    try:
        while process.is_alive() and not [*runs.glob(pattern)]:
            time.sleep(POLL_S)
    finally:
        process.kill()
        process.join()
    if not (found := [*runs.glob(pattern)]):
        raise RuntimeError(f"it ended with {process.exitcode} before step {COMPARED}:\n{said(given)}")
    run = found[0].parent.parent
    logged = losses(run)
    shutil.move(found[0].parent, given.folder / "expected")
    for later in run.glob("global_step*"):
        if int(later.name.removeprefix("global_step")) > SAVED:
            shutil.rmtree(later)
    train(start_method, given, ["--config", str(config), "--resume_from_checkpoint", "--set", f"max_steps={COMPARED}"])
    expected, resumed = (tensors(folder) for folder in (given.folder / "expected", run / f"global_step{COMPARED}"))
    differ = [name for name in sorted(expected | resumed) if not _equal(expected.get(name), resumed.get(name))]
    again = losses(run)
    differ += [f"loss of step {n}" for n in range(1, COMPARED + 1) if logged.get(n) != again.get(n)]
    return Outcome(
        passed=not differ and bool(expected),
        compared=f"weights, optimizer state and RNG after step {COMPARED} and the losses, killed and resumed from step {SAVED}, "
        "with those of the run that went on",
        tolerance="none, to the bit (under torch.use_deterministic_algorithms)",
        figures={"tensors": len(expected), "differ": differ, "losses": list(again.values())},
    )


def planned(given: Setting, start_method: str = "spawn") -> Outcome:
    """A run of a few steps: its plan.json says what was planned and what was measured."""
    config = write_config(given, "planned", max_steps=PLANNED_STEPS)
    train(start_method, given, ["--config", str(config)], exact=False)
    (file,) = (given.folder / "planned").glob("*/plan.json")
    plan = json.loads(file.read_text())
    (stage,) = plan["stages"]
    memory, time_ratio = stage["measured_bytes"] / stage["planned_bytes"], plan["measured_step_s"] / plan["step_s"]
    return Outcome(
        passed=abs(memory - 1) <= PLANNED_MEMORY or not given.speed_counts,
        compared="device memory at its peak and seconds of a step, measured, with the plan's (counted on fake tensors)",
        tolerance=f"memory within {PLANNED_MEMORY:.0%}, as tests/planning/test_planned.py asks on the CPU; time shown, not judged"
        if given.speed_counts
        else "shown, not judged: a tiny model's figures mean nothing",
        figures={
            "planned_bytes": stage["planned_bytes"],
            "measured_bytes": stage["measured_bytes"],
            "measured_over_planned_memory": memory,
            "planned_step_s": plan["step_s"],
            "measured_step_s": plan["measured_step_s"],
            "measured_over_planned_time": time_ratio,
        },
    )


def write_config(given: Setting, name: str, **changes: Any) -> Path:
    """A multiplicative LoRA on all layers, with all kernels, over one stage."""
    shape = given.run
    settings = {
        "model": str(base_folder(given, shape)),
        "output_dir": str(given.folder / name),
        "adapter_type": "multiplicative_lora",
        "lora_rank": shape.rank,
        "lora_alpha": shape.rank,
        "target_modules": ["down_proj"],
        "kernels": "all",
        "pipeline_stages": 1,
        "gradient_accumulation_steps": 2,
        "model_weight_dtype": shape.dtype,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-3},
        "datasets": [
            {"name": "book", "dataset_type": "textfile", "dataset_path": str(BOOK), "sequence_len": shape.tokens}
        ],
    }
    path = given.folder / f"{name}.toml"
    path.write_text(tomli_w.dumps({**settings, **changes}))
    return path


def train(start_method: str, given: Setting, arguments: list[str], exact: bool = True) -> None:
    """Run train.py to its end; RuntimeError, with the end of what it said, if it fails."""
    process = start(start_method, given, arguments, exact)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"train.py ended with {process.exitcode}:\n{said(given)}")


def start(start_method: str, given: Setting, arguments: list[str], exact: bool) -> Any:
    """train.py in a process of its own; `exact`: with deterministic operations."""
    context = multiprocessing.get_context(start_method)
    process = context.Process(target=become_train, args=(str(log_file(given)), arguments, exact))  # type: ignore[attr-defined]
    process.start()
    return process


def become_train(log: str, arguments: list[str], exact: bool) -> None:
    """This process is train.py from here on."""
    with Path(log).open("a", buffering=1) as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
        sys.stdout = sys.stderr = out
        if exact:
            use_deterministic_operations()
        sys.argv = ["train.py", *arguments]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def log_file(given: Setting) -> Path:
    """Where runs say what they say."""
    return given.folder / "train.log"


def said(given: Setting) -> str:
    """The end of that."""
    return "\n".join(log_file(given).read_text().splitlines()[-20:])


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint."""
    return {name: t for shard in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(shard).items()}


def losses(run: Path) -> dict[int, float]:
    """By step, as far as they are compared."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {n["step"]: n["train/loss"] for n in lines if "train/loss" in n and n["step"] <= COMPARED}


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
