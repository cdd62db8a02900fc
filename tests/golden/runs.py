"""The golden runs: small real runs that together touch everything, and how one is carried out and digested.

A run is `train.py` itself on a tiny fp32 model, then the fold. Its digest: loss, gradient norm and learning rate of every
step, the evaluation losses, and of the folded weights what changed. Models are drawn by NumPy's legacy generator, whose
numbers do not change with a version. Nothing here draws random numbers that depend on the machine (no dropout).
"""

import contextlib
import hashlib
import json
import os
import re
import runpy
import sys
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.helpers import builders

HERE = Path(__file__).resolve().parent
STEPS = 6
COHERE = {"kind": "cohere", "logit_scale": 1.0}
LLAMA, GRANITE, GEMMA2 = {"kind": "llama"}, {"kind": "granite"}, {"kind": "gemma2"}
BOOK, OTHER = (str(builders.BOOKS / f"{name}.md") for name in ("the_salt_ledger", "nine_stops_to_harrow_lane"))


@dataclass(frozen=True)
class Run:
    """One run. `says`: patterns of what the console must say, so that the run does touch what it is there for.

    `free_kib`: as on a machine with so little memory, where 'auto' must recompute. `again_from`: it is resumed from the
    checkpoint of this step, and must be equal to the bit. `slow`: left out of `make test`. `rounding`: of bf16, as a
    multiple of the bounds for fp32.
    """

    name: str
    base: dict[str, Any]
    keys: dict[str, Any]
    stages: int = 1
    says: tuple[str, ...] = ()
    free_kib: int | None = None
    again_from: int | None = None
    slow: bool = False
    rounding: float = 1.0


def data(path: str, length: int, name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "dataset_type": "textfile",
        "dataset_path": path,
        "sequence_len": length,
        "eval_size": 4,
        **more,
    }


MULTIPLICATIVE = {
    "lr_scheduler": "cosine",
    "warmup_steps": 2,
    "train_logit_scale": 1.1,
    "gradient_clipping": 0.05,
    "eval_steps": 2,
    "eval_before_first_step": True,
    "layers_to_transform": "0:2",
}
INTERLEAVED = {
    "datasets": [data(BOOK, 64, "book", sample_weight=2), data(OTHER, 96, "other")],
    "dataset_combination_mode": "interleave",
    "dataset_interleave_stopping_strategy": "all_exhausted",
    "batch_size_tokens": 200,
    "group_by_length": True,
    "composite_weight_decay": 0.1,
    "eval_after_last_step": True,
}
RUNS = {
    run.name: run
    for run in (
        Run("multiplicative_1_stage", COHERE, MULTIPLICATIVE, slow=True, says=("layers 0 to 2",)),
        Run("multiplicative_2_stages", COHERE, MULTIPLICATIVE, stages=2, says=("stage 1: layers",)),
        Run("multiplicative_3_stages", COHERE, MULTIPLICATIVE, stages=3, slow=True, says=("stage 2: layers",)),
        Run(
            "kernels_auto",
            COHERE,
            {"kernels": "all", "activation_checkpointing": "auto", "datasets": [data(BOOK, 256, "book")]},
            free_kib=2900,
            slow=True,
            says=(
                "norm in 5 modules",
                "rope in 4",
                "multiplicative in 3",
                "parallel_block in 3",
                r"layers? .*(?<!nothing) recomputed",
            ),
        ),
        Run(
            "bfloat16",
            COHERE,
            {
                **MULTIPLICATIVE,
                "model_weight_dtype": "bfloat16",
                "lora_weight_dtype": "bfloat16",
                "kernels": "all",
                "activation_checkpointing": True,
            },
            slow=True,
            says=("= 2, bfloat16",),
            rounding=2.0**8,
        ),
        Run(
            "lora_dora",
            LLAMA,
            {
                "adapter_type": "lora",
                "use_dora": True,
                "use_rslora": True,
                "target_modules": "all-linear",
                "activation_checkpointing": True,
                "max_steps": 4,
                "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.01, "loraplus_lr_ratio": 4},
            },
            says=("LoRA", "DoRA"),
        ),
        Run(
            "nf4",
            LLAMA,
            {"quantization": {"bnb": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}}},
            slow=True,
            says=("28 linear layers in",),
        ),
        Run(
            "trained_embeddings",
            COHERE,
            {"trainable_modules": ["embed_tokens", "norm"], "eval_after_last_step": True},
            stages=2,
            slow=True,
            says=("and in full",),
        ),
        Run("interleaved", GRANITE, INTERLEAVED, slow=True, says=("data:     other",)),
        Run(
            "resumed",
            LLAMA,
            {"neftune_noise_alpha": 5, "save_steps": 3, "checkpoint_on_save": True, "eval_steps": 3},
            again_from=3,
            slow=True,
            says=("resumed:  after step 3",),
        ),
        Run(
            "full_fine_tune",
            GEMMA2,
            {
                "full_fine_tune": True,
                "layers_to_transform": None,
                "target_modules": None,
                "lora_rank": None,
                "lora_alpha": None,
                "optimizer": {"type": "adamw", "lr": 1e-3, "eps": 1e-3},
            },
            says=("the model's own weights",),
        ),
    )
}


def record(run: Run, folder: Path) -> dict[str, Any]:
    """Carry `run` out in `folder`; its digest. RuntimeError, with what was printed, where it does not do what it should."""
    log = folder / "log.txt"
    try:
        # A line at a time: what a fork finds in the buffer it would write once more.
        with log.open("a", buffering=1) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            result = carry_out(run, folder, log)
        if missing := [pattern for pattern in run.says if not re.search(pattern, log.read_text())]:
            raise RuntimeError(f"it did not say {missing}")
    except Exception as error:
        raise RuntimeError(f"{run.name}: {error}\n{log.read_text()}") from error
    return result


def carry_out(run: Run, folder: Path, log: Path) -> dict[str, Any]:
    """Train, fold, digest; and resume, where the run is to be resumed."""
    base = make_base(folder / "base", run.base)
    keys = {
        "model": str(base),
        "output_dir": str(folder / "runs"),
        "pipeline_stages": run.stages,
        "kernels": "none",
        "max_steps": STEPS,
        "optimizer": {"type": "adamw_kahan", "lr": 1e-2, "eps": 1e-3, "weight_decay": 0.01},
        "datasets": [data(BOOK, 64, "book")],
        **run.keys,
    }
    config = builders.write_config(folder / "run.toml", **keys)
    train(run, log, "--config", str(config))
    run_dir = builders.only_run(folder / "runs")
    result = digest(run, base, run_dir, folder / "folded")
    if run.again_from:
        checkpoint = run_dir / f"global_step{run.again_from}"
        train(run, log, "--config", str(config), "--resume_from_checkpoint", str(checkpoint))
        if (again := digest(run, base, run_dir, folder / "folded again")) != result:
            raise RuntimeError(f"resumed it is not what it was: {again} for {result}")
    return result


def make_base(folder: Path, changes: dict[str, Any]) -> Path:
    """A model of 4 layers whose weights depend on their names alone, with a tokenizer."""
    from transformers import AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(builders.model_config(**{**shape, **changes})).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = normal(name, parameter.numel()).reshape(parameter.shape)
            scaled = values * 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else values * 0.1
            parameter.copy_(torch.from_numpy(scaled + ("norm" in name)))
    model.save_pretrained(folder)
    builders.save_tokenizer(folder)
    return folder


def normal(name: str, count: int) -> np.ndarray:
    """Standard normal fp64 numbers [count], by a name."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(count)


def train(run: Run, log: Path, *arguments: str) -> None:
    """`deepspeed --num_gpus N train.py …`; one stage is `train.py` in a fork of this process, which has its imports."""
    if run.stages > 1:
        print(builders.train(run.stages, *arguments, timeout=600))
        return
    import_everything()
    if (pid := os.fork()) == 0:
        become_train(log, arguments, run.free_kib)
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"exit code {code}")


def import_everything() -> None:
    """What takes train.py seconds, once. None of it starts a thread that a fork would lack."""
    from pipeline.training.engine import selftest  # noqa: F401

    torch.set_num_threads(1)


def become_train(log: Path, arguments: tuple[str, ...], free_kib: int | None) -> None:
    """This process is `train.py` from here on, and does not return."""
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        if free_kib is not None:
            import psutil

            there = psutil.virtual_memory()._replace(available=free_kib * 1024)
            psutil.virtual_memory = lambda: there
        sys.argv = ["train.py", *arguments]
        runpy.run_path(str(builders.ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def digest(run: Run, base: Path, run_dir: Path, folded: Path) -> dict[str, Any]:
    """What was logged, and what became of the weights (of an adapter, by the fold)."""
    from pipeline.artifacts.fold.merge import merge

    full = run.keys.get("full_fine_tune", False)
    last = run_dir / f"step{run.keys.get('max_steps', STEPS)}"
    if not full:
        merge(base, last, folded)
    lines = builders.metrics(run_dir)
    tags = {"loss": "train/loss", "norm": "train/grad_norm", "lr": "train/lr"}
    return {
        "steps": [{name: line[tag] for name, tag in tags.items()} for line in lines if "train/loss" in line],
        "evaluations": [
            {"after": line["step"]} | {tag: value for tag, value in line.items() if re.fullmatch("eval/.*/loss", tag)}
            for line in lines
            if any(tag.startswith("eval/") for tag in line)
        ],
        "weights": changed(base, last if full else folded),
    }


def changed(base: Path, folder: Path) -> dict[str, Any]:
    """Of each tensor of the model in `folder` that is not the base's: its norm, its change's norm, and the change along
    a fixed random direction, in fp64. `sha256` is of all tensors."""
    before, after, whole = read(base), read(folder), hashlib.sha256()
    tensors = {}
    for name in sorted(after):
        value = after[name].contiguous().numpy()
        whole.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
        old = before.get(name, before["model.embed_tokens.weight"]).numpy()  # a head may have been the embedding
        change = value.astype(np.float64) - old
        if change.any():
            along = float(change.ravel() @ normal(name, change.size))
            tensors[name] = {
                "norm": float(np.linalg.norm(value.astype(np.float64))),
                "change": float(np.linalg.norm(change)),
                "along": along,
            }
    return {"sha256": whole.hexdigest(), "unchanged": len(after) - len(tensors), "changed": tensors}


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def golden(name: str) -> dict[str, Any] | None:
    """What is committed of a run; None if nothing is."""
    file = HERE / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None
