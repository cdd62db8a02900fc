"""What every benchmark records beside its figures: machine, versions, load."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline import version
from pipeline.files import write_text

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "triton", "liger_kernel")


def machine() -> dict[str, Any]:
    """Facts a reader needs to judge a figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {version.NAME: version.full(), **{package: _version(package) for package in PACKAGES}},
    }


def replace_row(name: str, key: str, row: dict[str, Any], folder: Path | None = None) -> Path:
    """Put `row`, with the machine it was measured on, in the place of the one with the same `key` in results/<name>.json."""
    path = (folder or Path(__file__).resolve().parent / "results") / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    (at,) = (index for index, other in enumerate(result["rows"]) if other[key] == row[key])
    result["rows"][at] = {**row, "machine": machine()}
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(name: str, settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """benchmarks/results/<name>.json, or `folder`/<name>.json; its path."""
    folder = folder or Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=1) + "\n")
    return path
