"""Peak memory of the fold in all its forms, and of the export, on a base of 1 GiB: bounded by tensors, not by the model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts.fold.test_merge_process import ROOT, adapter_for, big_base

ROWS, COLUMNS, LAYERS = 4096, 8192, 8  # two bf16 tensors of 64 MiB a layer
CASES: dict[str, dict[str, Any]] = {
    "one adapter": {"adapters": 1},
    "three": {"adapters": 3},
    "one, nf4": {"adapters": 1, "base_quant": "nf4"},
    "three, nf4": {"adapters": 3, "base_quant": "nf4"},
    "three, nf4-double": {"adapters": 3, "base_quant": "nf4-double"},
    # So weak that its inverse exists, and is not refused for what rounding would do to it.
    "two taken out": {"adapters": 2, "unmerge": True, "scale": 0.01},
    "exported": {"format": "peft"},
}
GROWTH = """
import contextlib, io, json, re, sys
from pathlib import Path
from pipeline.artifacts.export.export import export
from pipeline.artifacts.fold.merge import merge
folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])

def run(size, adapters=None, **asked):
    adapter, output = folder / f"adapter_{size}", folder / f"out_{size}"
    if adapters is None:
        export(folder / size, adapter, output, **asked)
    else:
        merge(folder / size, [adapter] * adapters, output, **asked)

def peak():  # in bytes; getrusage would give the peak of the process that started this one where that was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

with contextlib.redirect_stdout(io.StringIO()):
    run("small", **asked)
    before = peak()
    run("large", **asked)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    big_base(folder / "small", 1, 64, 128, 1), adapter_for(folder / "adapter_small", 1, 64, 128)
    big_base(folder / "large", LAYERS, ROWS, COLUMNS, 2), adapter_for(folder / "adapter_large", LAYERS, ROWS, COLUMNS)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("case", CASES)
def test_memory_is_below_that_of_two_tensors_of_a_gibibyte(bases: Path, tmp_path: Path, case: str) -> None:
    """As in test_merge_process, where the libraries and one small fold are in the figure before."""
    for name in ("small", "large", "adapter_small", "adapter_large"):
        (tmp_path / name).symlink_to(bases / name)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), json.dumps(CASES[case])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    whole = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    written = sum(file.stat().st_size for file in (tmp_path / "out_large").glob("*.safetensors"))
    assert whole > 2**30
    assert written == whole or "adapters" not in CASES[case]
    shutil.rmtree(tmp_path / "out_large")
    print(f"{case}: {int(done.stdout) / 2**20:.0f} MiB more")
    assert int(done.stdout) < 2 * 2 * ROWS * COLUMNS, f"{int(done.stdout) / 2**20:.0f} MiB more"
