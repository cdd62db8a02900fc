"""Quantised loading of a base of a gibibyte: the host never holds the 16-bit model, only what is on its way.

What is resident is read from Linux's /proc: RssAnon, the process's own memory, every half millisecond, and VmHWM, the
kernel's high-water mark, in which the pages of the mapped file that is being read count as well.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from pipeline.model.quantized import Scheme
from tests.helpers import builders
from tests.helpers.quantization import NF4, build, save_model

MIB = 2**20
LAYERS, SHARDS = 42, 7
SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "head_dim": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LARGEST = SIZE["hidden_size"] * SIZE["intermediate_size"]  # weights of one tensor
# Bytes a weight of the largest tensor, on its way. 4 bits: bitsandbytes' own steps on the CPU have it in fp32 four times over
# and in int32 once, in bf16 and fp32 before. 8 bits: in bf16, in float16, three times in fp32, and in int8.
ON_ITS_WAY = {4: 24, 8: 17}
INTERPRETER = 16 * MIB

MEASURE = """
import re, sys, threading, time, torch
from pathlib import Path
from pipeline.model import quantized as packed, quantized_bnb as quantization, weights
from pipeline.model.stage import Stage, empty_model, read_model_config

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

def load(folder, bits):
    meta_model = empty_model(read_model_config(folder), torch.bfloat16, None)
    packed.put_placeholders(meta_model, packed.Scheme(bits, "nf4", True, torch.bfloat16, 6.0, ()))
    stage = Stage(meta_model, 0, len(meta_model.base_model.layers))
    plain = sum(p.numel() * p.element_size() for p in stage.parameters())
    own = plain - packed.saved_bytes(stage)
    quantization.put_in(stage)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, peak, done = (status("RssAnon"), status("VmRSS")), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, status("RssAnon"))
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    weights.load(stage, folder, torch.bfloat16, torch.device("cpu"))
    done.set()
    thread.join()
    return plain, own, peak - before[0], status("RssAnon") - before[0], status("VmHWM") - before[1]

small, large, bits = sys.argv[1:]
load(small, int(bits))  # libraries
print("found", *load(large, int(bits)), flush=True)
"""


def save(folder: Path, layers: int, shards: int) -> None:
    """A Llama of normal numbers in bf16, tensor by tensor, in `shards` files."""
    config = builders.model_config("llama", layers=layers, **SIZE)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    weight_map: dict[str, str] = {}
    names, generator = list(shapes), torch.Generator().manual_seed(0)
    for shard in range(shards):
        file, part = f"model-{shard + 1:05}-of-{shards:05}.safetensors", math.ceil(len(names) / shards)
        tensors = {
            name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16()
            for name in names[shard * part : (shard + 1) * part]
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


EXPERTS, EXPERT_SIZE = 8, 2048
ONE_EXPERT = SIZE["hidden_size"] * EXPERT_SIZE


def save_mixture(folder: Path, layers: int) -> None:
    """A Mixtral of normal numbers in bf16, its experts stored one by one, a file a layer."""
    size = {**SIZE, "intermediate_size": EXPERT_SIZE}
    config = builders.model_config("mixtral", layers=layers, num_local_experts=EXPERTS, **size)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        own = files.setdefault(
            f"layer{name.split('.')[2]}.safetensors" if ".layers." in name else "rest.safetensors", {}
        )
        stored, experts, leaf = name.replace(".mlp.", ".block_sparse_moe.").partition(".experts.")
        if not experts:
            own[stored] = shape
        for expert in range(EXPERTS if experts else 0):
            for matrix in ("w1", "w3") if leaf == "gate_up_proj" else ("w2",):
                rows = shape[1] // 2 if leaf == "gate_up_proj" else shape[1]
                own[f"{stored}.experts.{expert}.{matrix}.weight"] = (rows, shape[2])
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for file, tensors in files.items():
        made = {n: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for n, shape in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gibibyte")
    save(folder / "small", 1, 1)
    save(folder / "large", LAYERS, SHARDS)
    save_mixture(folder / "small_mixture", 1)
    save_mixture(folder / "mixture", 10)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
@pytest.mark.parametrize("scheme", [NF4, NF4._replace(bits=8)], ids=["nf4", "8 bits"])
def test_the_file_is_let_go(tmp_path: Path, scheme: Scheme) -> None:
    """A norm that stays as a view of the mapped file would keep all of it resident."""
    folder = save_model(tmp_path / "llama", "llama")
    stage = build(folder, scheme, 0, 4)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert {parameter.dtype for parameter in stage.parameters()} > {torch.float32}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("small", "large", "largest"),
    [("small", "large", LARGEST), ("small_mixture", "mixture", 2 * ONE_EXPERT)],
    ids=["dense", "experts one by one"],
)
def test_a_gibibyte_is_quantised_as_it_is_read(bases: Path, small: str, large: str, largest: int, bits: int) -> None:
    """Each block of memory is mapped by itself, so that what is resident is what is alive, without the gaps of glibc's heap."""
    command = [sys.executable, "-c", MEASURE, str(bases / small), str(bases / large), str(bits)]
    environment = builders.environment(PYTHONPATH=str(builders.ROOT), MALLOC_MMAP_THRESHOLD_=str(64 * 1024))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("found"))
    plain, own, peak, after, highest = map(int, line.split()[1:])
    print(
        "MiB:",
        *(
            f"{name} {n / MIB:.0f}"
            for name, n in zip(
                ("in 16 bits", "packed", "peak", "afterwards", "high-water mark with mapped files"),
                (plain, own, peak, after, highest),
                strict=True,
            )
        ),
    )
    assert plain > 10**9
    assert own < plain * (0.28 if bits == 4 else 0.52)
    assert own * 0.95 <= after <= own + INTERPRETER
    assert peak <= own + ON_ITS_WAY[bits] * largest + INTERPRETER
    # Only one file is mapped at a time.
    shard = max(path.stat().st_size for path in (bases / large).glob("*.safetensors"))
    assert highest <= own + ON_ITS_WAY[bits] * largest + INTERPRETER + shard
