"""`make golden`: carries the golden runs out, says what differs from what is committed, and writes it.

`python -m tests.golden.record [--output FOLDER] [RUN …]`. Run before and after a change that should change no number: on
one machine every run must be equal to the bit. Files of runs that are equal to the bit are left alone.
"""

import os

# Before torch. A machine with a GPU records what one without does.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.golden.compare import differences, largest
from tests.golden.runs import HERE, RUNS, golden, record


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("--output", type=Path, default=HERE, metavar="FOLDER", help="where to write (default: here)")
    command.add_argument(
        "runs", nargs="*", choices=[*RUNS, []], metavar="RUN", help=f"of {', '.join(RUNS)}; default all"
    )
    arguments = command.parse_args()
    for name in arguments.runs or RUNS:
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            found = record(RUNS[name], Path(folder))
        before = golden(name)
        print(f"{name}: {verdict(RUNS[name].rounding, before, found)}", flush=True)
        if arguments.output != HERE or before is None or without_facts(before) != found:
            text = json.dumps({"made_with": made_with(), **found}, indent=1)
            (arguments.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def verdict(rounding: float, before: dict[str, Any] | None, found: dict[str, Any]) -> str:
    """In words, what has become of a run."""
    if before is None:
        return "new"
    if without_facts(before) == found:
        return "equal to the bit"
    if lines := differences(before, found, rounding):
        return "\n  ".join(["NOT THE SAME RUN", *lines])
    shares = ", ".join(f"{kind} {share:.2g}" for kind, share in largest(before, found).items())
    return f"the same within rounding, not to the bit (in bounds: {shares or 'the weights alone'})"


def without_facts(digest: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in digest.items() if key != "made_with"}


def made_with() -> dict[str, str]:
    """What bits may depend on."""
    names = ("torch", "transformers", "deepspeed", "peft", "bitsandbytes", "numpy", "tokenizers")
    return {name: version(name) for name in names} | {"cpu": torch.backends.cpu.get_cpu_capability()}


if __name__ == "__main__":
    main()
