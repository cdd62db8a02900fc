"""Carries all checks out, each in its own process, and writes the results."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu_check import page
from benchmarks.gpu_check.checks import CHECKS, failed
from benchmarks.worker import ROOT
from pipeline.console import EXIT_CONFIG
from pipeline.files import write_text
from pipeline.kernels import dispatch

PATIENCE_ON_CPU = 4  # times the budget: there nothing is said about time


def main() -> int:
    given = arguments()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here; --device cpu --tiny shows that the checks run", file=sys.stderr)
        return EXIT_CONFIG
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        for name in given.only or CHECKS:
            print(f"{name} …", flush=True)
            row = in_a_process(name, given.device, given.tiny, Path(folder))
            print(f"{name}: {'passed' if row['passed'] else 'FAILED'}, {row['seconds']:.1f} s", flush=True)
            if "problem" in row:
                print(row["problem"], flush=True)
            rows.append(row)
    seconds = time.monotonic() - began
    device_name = torch.cuda.get_device_name(0) if given.device == "cuda" else "the CPU"
    kinds = dispatch.kinds(given.device == "cuda")
    settings = {"device_name": device_name, "kinds": kinds, "tiny": given.tiny, "seconds": seconds}
    path = record.write(f"gpu_check_{re.sub('[^a-z0-9]+', '_', device_name.lower())}", settings, rows, given.out)
    write_text(path.with_suffix(".md"), page.page(record.machine(), settings, rows))
    print(f"written: {path}\n         {path.with_suffix('.md')}")
    if wrong := page.failures(rows):
        print(f"FAILED: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"all {len(rows)} checks passed in {seconds:.0f} s")
    if new := [kind for kind in kinds if kind not in dispatch.CHECKED and len(rows) == len(CHECKS) and not given.tiny]:
        print(
            f"kernels = 'auto' takes them here once these results are committed and CHECKED in kernels/dispatch.py has {new}"
        )
    return 0


def arguments() -> argparse.Namespace:
    """--device, --tiny, --only, --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a second, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=[*CHECKS], default=[], metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser.parse_args()


def in_a_process(name: str, device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """The row of a check, carried out within its budget in a process of its own; also where that dies or hangs."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.one", name, device, "tiny" if tiny else "card", str(folder)]
    budget_s = CHECKS[name].budget_s * (PATIENCE_ON_CPU if device == "cpu" else 1)
    errors = folder / f"{name}.stderr"
    began = time.monotonic()
    with errors.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=stream, env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True
        )
        try:
            code: int | None = process.wait(budget_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started too
            process.wait()
    result = folder / f"{name}.json"
    if code == 0 and result.exists():
        return json.loads(result.read_text())  # type: ignore[no-any-return]
    how = f"given up after {budget_s:.0f} s" if code is None else f"its process ended with {code}"
    last = "\n".join(errors.read_text(errors="replace").splitlines()[-20:])
    return {**failed(name, f"{how}\n{last}"), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    sys.exit(main())
