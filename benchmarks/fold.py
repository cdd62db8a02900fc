"""Fold, export and inspection, as ratios to copying and reading the same bytes, and against PEFT's load, merge and save.

    python -m benchmarks.fold

A base of random bf16 weights in Llama's layout, and adapters on every down_proj, are made in a temporary folder. Each variant
is a process of its own, timed from its start to its end, imports included; its peak of resident memory is the kernel's
high-water mark. All are run in turn, several rounds, and the least time of each counts, so that a busy moment hits all alike.
What is read comes from the system's cache; `hashed copy` ends, like the fold, with its bytes on the disk (fsync), `copy` does
not. Figures are ratios to be read within one run.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import record
from benchmarks.preparing import VOCABULARY, make_tokenizer
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.families import LORA, MULTIPLICATIVE, Kind
from pipeline.formats.safetensors import TensorSpec, tensor_bytes, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
PIECE = 4 * 2**20  # bytes read at a time by the baselines


class Size(NamedTuple):
    """Of the base and of the adapters."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    rank: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the base, by its name in a file of LlamaForCausalLM with tied embeddings."""
        d, wide = self.hidden, self.intermediate
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            found |= {f"{prefix}self_attn.{one}_proj.weight": (d, d) for one in "qkvo"}
            found |= {f"{prefix}mlp.{one}_proj.weight": (wide, d) for one in ("gate", "up")}
            found |= {f"{prefix}mlp.down_proj.weight": (d, wide)}
            found |= {f"{prefix}{one}_layernorm.weight": (d,) for one in ("input", "post_attention")}
        return found | {"model.norm.weight": (d,)}


LARGE = Size(2048, 5632, 9, 32768, 64)  # 1.1 GB
TINY = Size(64, 96, 2, VOCABULARY, 4)


def make_base(folder: Path, size: Size) -> int:
    """Write the base; the bytes of its weights. One tensor is in memory at a time."""
    folder.mkdir()
    specs = [TensorSpec(name, "BF16", shape) for name, shape in size.shapes.items()]

    def pieces(name: str) -> Iterable[memoryview]:
        shape = size.shapes[name]
        return [tensor_bytes(torch.ones(shape).bfloat16() if len(shape) == 1 else torch.randn(shape).bfloat16() * 0.02)]

    write_safetensors(folder / "model.safetensors", specs, pieces, {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 32,
        "num_key_value_heads": size.hidden // 32,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)
    return sum(spec.n_bytes for spec in specs)


def make_adapter(folder: Path, size: Size, kind: Kind) -> None:
    """An adapter of every down_proj, as strong as a training makes one."""
    d, wide = size.hidden, size.intermediate
    tensors = {}
    for layer in range(size.layers):
        module = f"model.layers.{layer}.mlp.down_proj"
        inputs = d if kind == MULTIPLICATIVE else wide
        tensors[f"{module}.A"] = torch.randn(size.rank, inputs) / inputs**0.5
        tensors[f"{module}.B"] = torch.randn(d, size.rank) * 0.01
    facts: dict[str, Any] = {"dropout": 0.0, "base_model": "base", "train_logit_scale": 1.0, "biased_targets": False}
    save_adapter(folder, tensors, kind=kind, rank=size.rank, alpha=float(size.rank), **facts)


def read(folder: Path) -> None:
    """The weights, read to the end."""
    piece = bytearray(PIECE)
    with (folder / "base" / "model.safetensors").open("rb", buffering=0) as source:
        while source.readinto(piece):
            pass


def copy(folder: Path) -> None:
    """The weights copied as `cp` does."""
    shutil.copyfile(folder / "base" / "model.safetensors", folder / "out")


def hashed_copy(folder: Path) -> None:
    """The weights copied with their SHA-256, one thing after the other, and put on the disk."""
    digest = hashlib.sha256()
    with (folder / "base" / "model.safetensors").open("rb") as source, (folder / "out").open("wb") as target:
        while piece := source.read(PIECE):
            digest.update(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())


def ours(script: str, *arguments: str) -> str:
    """A command of this project, over the base."""
    given = [script, "--input", "base", *arguments]
    return (
        f"import runpy, os; sys.path.insert(0, {str(ROOT)!r}); os.chdir(folder); sys.argv = {given!r}\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
    )


# PEFT's load, merge and save of the additive adapter.
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
PeftModel.from_pretrained(model, str(folder / "peft")).merge_and_unload().save_pretrained(folder / "out")
"""
BASELINES: dict[str, Callable[[Path], None]] = {"read": read, "copy": copy, "hashed copy": hashed_copy}
COMMANDS = {
    "fold, multiplicative": ours("merge_lora.py", "--lora", MULTIPLICATIVE, "--output", "out"),
    "fold, additive": ours("merge_lora.py", "--lora", LORA, "--output", "out"),
    "export": ours("export_lora.py", "--lora", MULTIPLICATIVE, "--format", "peft", "--output", "out"),
    "inspect": ours("inspect_lora.py", MULTIPLICATIVE),
    "PEFT": PEFT,
}
# The last line of a command's output: the kernel's high-water mark of its memory in KiB.
PEAK = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


class Cost(NamedTuple):
    """Of one run: wall time and the processors' time in seconds, and the peak of a process of its own in MiB."""

    seconds: float
    cpu_seconds: float
    peak_mib: float | None


def measured(variant: str, folder: Path, threads: int) -> Cost:
    """What a variant costs. The baselines need no library and run here; a command is a process, with its imports."""
    began, before = time.perf_counter(), os.times()
    peak = None
    if variant in BASELINES:
        BASELINES[variant](folder)
    else:
        code = f"import sys; from pathlib import Path; folder = Path({str(folder)!r})\n{COMMANDS[variant]}\n{PEAK}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{variant} failed:\n{done.stdout}{done.stderr}")
        peak = int(done.stdout.split()[-1]) / 1024
    seconds, after = time.perf_counter() - began, os.times()
    remove(folder / "out")
    return Cost(seconds, sum(after[:4]) - sum(before[:4]), peak)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def compare(folder: Path, names: Iterable[str], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row for each variant: its least time, as a ratio to the hashed copy and to reading, and its greatest peak."""
    found: dict[str, list[Cost]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, costs in found.items():
            costs.append(measured(name, folder, threads))
    least = {name: min(cost.seconds for cost in costs) for name, costs in found.items()}
    return [
        {
            "variant": name,
            "seconds": least[name],
            "all_seconds": [cost.seconds for cost in costs],
            "cpu_seconds": min(cost.cpu_seconds for cost in costs),
            "to_hashed_copy": least[name] / least["hashed copy"],
            "to_read": least[name] / least["read"],
            "peak_mib": max((cost.peak_mib for cost in costs if cost.peak_mib is not None), default=None),
        }
        for name, costs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    for key, value in LARGE._asdict().items():
        parser.add_argument(f"--{key}", type=int, default=value, help=f"of the base or the adapters (default {value})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a product of matrices")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="commands to run; the baselines always do")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    given = parser.parse_args()
    size = TINY if given.tiny else Size(*(getattr(given, key) for key in Size._fields))
    names = [*BASELINES, *(given.only or COMMANDS)]
    with tempfile.TemporaryDirectory(prefix="fold-") as made:
        folder = Path(made)
        torch.manual_seed(0)
        n_bytes = make_base(folder / "base", size)
        make_adapter(folder / MULTIPLICATIVE, size, MULTIPLICATIVE)
        make_adapter(folder / LORA, size, LORA)
        shutil.copytree(folder / LORA, folder / "peft")
        print(f"{n_bytes / 1e9:.2f} GB, rank {size.rank} on {size.layers} down_proj, {given.threads} threads")
        rows = compare(folder, names, 1 if given.tiny else given.rounds, given.threads)
    print(f"{'':22} {'seconds':>8} {'CPU s':>7} {'× hashed copy':>14} {'× read':>8} {'peak MiB':>9}")
    for row in rows:
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        ratios = f"{row['to_hashed_copy']:14.2f} {row['to_read']:8.2f}"
        print(f"{row['variant']:22} {row['seconds']:8.2f} {row['cpu_seconds']:7.2f} {ratios} {peak:>9}")
    settings = {**size._asdict(), "bytes": n_bytes, "threads": given.threads, "rounds": given.rounds}
    print(f"\nwritten: {record.write('fold', settings, rows, given.out)}")


if __name__ == "__main__":
    main()
