"""How long commands take to start:  python -m benchmarks.start [--rounds 5]

`--help` of every script; `--check` and `--plan` of the founding run, whose model is made here without its weights' values; and
what no `--check` can do without, the imports of torch and of transformers' models. Gives the least wall and CPU seconds of each,
in results/start.json.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, transformers; transformers.PreTrainedModel"
CONFIG = "config_creative_writer.toml"


def make_model(folder: Path) -> None:
    """A folder that is Command-R 35B but for its weights' values, which take no room, and its tokenizer, which is small."""
    import torch
    from transformers import CohereConfig

    from benchmarks.preparing import make_tokenizer
    from pipeline.formats.safetensors import TensorSpec, header_bytes
    from pipeline.model.stage import empty_model
    from pipeline.names import HEAD

    config = CohereConfig()  # transformers' defaults are Command-R's dimensions
    config.save_pretrained(folder)
    make_tokenizer(folder)
    model = empty_model(config, torch.bfloat16, None)
    specs = [
        TensorSpec(name, "BF16", tuple(parameter.shape)) for name, parameter in model.named_parameters() if name != HEAD
    ]
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_bytes(specs, {"format": "pt"}))
        file.truncate(file.tell() + sum(spec.n_bytes for spec in specs))


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by its name: arguments of Python."""
    made = {f"{script.name} --help": [script.name, "--help"] for script in sorted(ROOT.glob("*.py"))}
    books = ROOT / "datasets/sample_books/*.md"
    sets = [f"model={folder / 'model'}", f"output_dir={folder / 'out'}", f"datasets.0.dataset_path={books}"]
    founding = ["train.py", "--config", CONFIG, *(part for setting in sets for part in ("--set", setting))]
    made[f"train.py --config {CONFIG} --check"] = [*founding, "--check"]
    made[f"train.py --config {CONFIG} --plan --devices 2x48GiB"] = [*founding, "--plan", "--devices", "2x48GiB"]
    return {**made, "the imports of a --check alone": ["-c", IMPORTS]}


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, show and record."""
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each, of which the least counts")
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write (default benchmarks/results)")
    asked = command.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "model").mkdir()
        make_model(Path(made) / "model")
        for name, words in commands(Path(made)).items():
            walls, cpus = zip(*(seconds(words) for _ in range(asked.rounds)), strict=True)
            rows.append({"command": name, "wall_s": round(min(walls), 3), "cpu_s": round(min(cpus), 3)})
            print(f"{name:70} {min(walls):6.2f} s, {min(cpus):6.2f} s of CPU", flush=True)
    print(record.write("start", {"rounds": asked.rounds}, rows, asked.out))


if __name__ == "__main__":
    main()
