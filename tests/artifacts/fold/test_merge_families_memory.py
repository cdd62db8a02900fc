"""Peak memory of the fold of all families in one go, with a pass over the weight between them: that of about one tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.artifacts.adapter.write import save_adapter, write_family
from tests.artifacts.fold.test_merge_process import GROWTH as ONE_FOLD
from tests.artifacts.fold.test_merge_process import ROOT, adapter_for, big_base
from tests.helpers.artifacts import FACTS as LORA
from tests.helpers.artifacts import random_tensors

ROWS, COLUMNS, LAYERS = 4096, 8192, 2  # two bf16 tensors of 64 MiB a layer
GROWTH = """
import contextlib, io, re, sys
from pathlib import Path
from pipeline.artifacts.fold.merge import merge
folder = Path(sys.argv[1])
order = ["dora", "multiplicative", "oft", "hra", "multiplicative", "ia3", "boft"]

def peak():  # in bytes; getrusage would give the peak of the process that started this one where that was higher
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

with contextlib.redirect_stdout(io.StringIO()):
    for size in ("small", "large"):
        before = peak()
        merge(folder / size, [folder / f"{name}_{size}" for name in order], folder / f"out_{size}")
print(peak() - before)
"""
FACTS = {"base_model": "base", "train_logit_scale": 1.0}
OFT = {
    "r": 0,
    "oft_block_size": 32,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 5,
    "peft_version": "0.18.0",
}


def write(folder: Path, family: str, tensors: dict[str, torch.Tensor], **settings: object) -> None:
    folder.mkdir()
    write_family(folder, tensors, family=family, settings=settings, **FACTS)  # type: ignore[arg-type]


def adapters(folder: Path, size: str, layers: int, rows: int, columns: int) -> None:
    adapter_for(folder / f"multiplicative_{size}", layers, rows, columns)
    modules = [f"model.layers.{i}.mlp.down_proj" for i in range(layers)]

    def each(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Half-normal values: a factor of 0 would have no part in the result."""
        return {
            f"{module}.{name}": torch.randn(shape).abs() * 0.1 for module in modules for name, shape in shapes.items()
        }

    settings = {"r": 8, "lora_alpha": 8, "use_dora": True}
    write(folder / f"dora_{size}", "dora", each(A=(8, columns), B=(rows, 8), lora_magnitude_vector=(rows,)), **settings)
    write(folder / f"oft_{size}", "oft", each(oft_R=(columns // 32, 496)), **OFT)
    write(folder / f"boft_{size}", "boft", each(boft_R=(1, columns // 8, 8, 8), boft_s=(rows, 1)))
    write(folder / f"hra_{size}", "hra", each(hra_u=(columns, 8)), r=8, apply_GS=False)
    write(folder / f"ia3_{size}", "ia3", each(ia3_l=(1, columns)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_tensor_in_full_is_read_where_it_lies(tmp_path: Path) -> None:
    """An embedding of 128 MiB: its mapped file counts once, and nothing of its size is made beside it."""
    for size, rows, tokens in (("small", 64, 64), ("large", 1024, 2**16)):
        big_base(tmp_path / size, 1, rows, 64, 1)
        file = tmp_path / size / "model-00001-of-00001.safetensors"
        name, tensors = "model.embed_tokens.weight", load_file(file)
        save_file({**tensors, "lm_head.weight": torch.zeros(1, rows), name: torch.zeros(tokens, rows).bfloat16()}, file)
        index = dict.fromkeys([*tensors, "lm_head.weight", name], file.name)
        (tmp_path / size / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        full = {name: torch.ones(tokens, rows).bfloat16()}
        pair = random_tensors({"model.layers.0.mlp.down_proj": (rows, 64)}, 8, multiplicative=True)
        save_adapter(tmp_path / f"adapter_{size}", pair, kind="multiplicative_lora", rank=8, alpha=8, full=full, **LORA)
    done = subprocess.run(
        [sys.executable, "-c", ONE_FOLD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * 2 * 1024 * 2**16, f"{int(done.stdout) / 2**20:.0f} MiB more"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_about_one_tensor(tmp_path: Path) -> None:
    """256 MiB in one file of 4 tensors of 64 MiB; the libraries and one small fold are in the figure before.

    What is counted is held: blocks that are free again go back to the system at once, by the allocator's threshold.
    """
    big_base(tmp_path / "small", 1, 64, 96, 1), adapters(tmp_path, "small", 1, 64, 96)
    big_base(tmp_path / "large", LAYERS, ROWS, COLUMNS, 1), adapters(tmp_path, "large", LAYERS, ROWS, COLUMNS)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(2**18)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    print(f"{int(done.stdout) / 2**20:.0f} MiB more")
    assert int(done.stdout) < 2 * ROWS * COLUMNS, f"{int(done.stdout) / 2**20:.0f} MiB more"
