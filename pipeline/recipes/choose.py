"""Which configuration fits: candidates from the best to the most frugal, each planned, until one does.

Takes a model's folder, data and GPUs; gives the configuration's keys and the plan that they were chosen by. The order: 16-bit
weights before 4-bit ones, few stages (what is left are replicas) before many, no host memory before some, long rows before
short ones. Nothing is read of the model but its configuration.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.config.loading import validate
from pipeline.console import UserError, gib
from pipeline.model.memory.levels import RecomputeLevel
from pipeline.planning import devices, table
from pipeline.planning.quantities import ModelCost, Plan, Shape
from pipeline.planning.solve import solve
from pipeline.training.start import plan as planned
from pipeline.training.start.resolve import resolve

Kind = Literal["books", "chat", "preference"]
GIB = 2**30
HOST_GIB = 64.0  # of pinned memory, where a plan without any does not fit
SHORTEST = 1024
MICRO_BATCHES = 16  # an optimizer step
# By kind: the rows' length at most, rank, learning rate.
SIZES: dict[Kind, tuple[int, int, float]] = {
    "books": (8192, 64, 5e-6),
    "chat": (4096, 16, 2e-5),
    "preference": (2048, 16, 2e-5),
}


@dataclass(frozen=True)
class Wish:
    """`model`: a folder. `name`: what the configuration calls it. `gpus`: as for --devices. `sequence_len`: None: the kind's."""

    model: Path
    name: str
    kind: Kind
    data: str
    gpus: str
    output_dir: str
    sequence_len: int | None = None


class Candidate(NamedTuple):
    """What is varied."""

    four_bits: bool
    stages: int
    host_gib: float
    sequence_len: int


class Chosen(NamedTuple):
    """The keys of a configuration, the plan in words, why these were chosen; what they were made of, and the plan itself, of one
    of the `replicas`."""

    raw: dict[str, Any]
    plan: str
    reasons: list[str]
    candidate: Candidate
    found: Plan
    replicas: int


def choose(wish: Wish) -> Chosen:
    """The first candidate that fits. UserError where none does."""
    gpus = devices.parse(wish.gpus)
    room = sum(gpu.usable_bytes for gpu in gpus)
    refused: list[str] = []
    for candidate in candidates(wish, len(gpus)):
        # By the count for the longest rows, which is there already: of what cannot fit at any length no other is made.
        if held_bytes(counted(wish.model, wish.kind, candidate.four_bits, lengths(wish)[0])) > room:
            refused.append(f"{in_words(candidate)} (its weights alone are more than all GPUs have)")
            continue
        cost = counted(wish.model, wish.kind, candidate.four_bits, candidate.sequence_len)
        if candidate.stages > len(cost.layers):
            continue
        tokens = rows(wish.kind) * candidate.sequence_len
        shape, there = Shape(tokens, MICRO_BATCHES, candidate.stages), gpus[: candidate.stages]
        rates, usable = devices.published_rates(there), [gpu.usable_bytes for gpu in there]
        host_bytes = int(candidate.host_gib * GIB) * candidate.stages // len(gpus)  # a replica's part
        found = solve(cost, usable, rates, shape, host_bytes)
        if found.fits:
            names = [gpu.name for gpu in there]
            text = table.describe(found, cost, shape, rates, device_names=names, total_steps=None)
            replicas = len(gpus) // candidate.stages
            return Chosen(
                keys(wish, candidate), text, reasons(candidate, replicas, refused), candidate, found, replicas
            )
        lacking = max(-stage.headroom_bytes for stage in found.stages)
        refused.append(f"{in_words(candidate)} ({gib(max(0, lacking))} too much on a GPU)")
    raise UserError(
        f"--gpus '{wish.gpus}': no configuration of {wish.name} fits. The most frugal that was tried: {refused[-1]}. Use more "
        "GPUs, larger ones, or a smaller model"
    )


def candidates(wish: Wish, gpus: int) -> Iterator[Candidate]:
    """In the order in which they are preferred."""
    for sequence_len in lengths(wish):
        for four_bits in (False, True):
            for host_gib in (0.0, HOST_GIB):
                for stages in range(1, gpus + 1):
                    if gpus % stages == 0:
                        yield Candidate(four_bits, stages, host_gib, sequence_len)


def held_bytes(cost: ModelCost) -> int:
    """Weights and what is trained, of the whole model, which a pipeline holds whatever it keeps besides."""
    head = 0 if cost.tied else cost.head.weight_bytes
    return head + cost.embedding_bytes + sum(layer.weight_bytes + layer.trained_bytes for layer in cost.layers)


def counted(model: Path, kind: Kind, four_bits: bool, sequence_len: int) -> ModelCost:
    """What the model costs in micro-batches of one row, or pair, of so many tokens; whatever the GPUs."""
    return _counting(model, kind, four_bits)(rows(kind) * sequence_len)


@cache
def _counting(model: Path, kind: Kind, four_bits: bool) -> Callable[[int], ModelCost]:
    """The cost for micro-batches of so many tokens, each counted once. The model is looked at once for all of them."""
    wish = Wish(model, str(model), kind, "-", "-", "-")
    raw = keys(wish, Candidate(four_bits, 1, 0.0, SIZES[kind][0]))
    return planned.costs(resolve(validate(raw, "the configuration that is made")), RecomputeLevel, on_gpu=True)


def rows(kind: Kind) -> int:
    """Of a micro-batch: one, or a pair of answers."""
    return 2 if kind == "preference" else 1


def lengths(wish: Wish) -> list[int]:
    """Of rows, the longest first."""
    if wish.sequence_len is not None:
        return [wish.sequence_len]
    longest = SIZES[wish.kind][0]
    return [longest >> halvings for halvings in range(4) if longest >> halvings >= SHORTEST]


def in_words(candidate: Candidate) -> str:
    """'4-bit weights, 2 stages, 64 GiB of host memory, rows of 8192 tokens'."""
    bits = "4-bit weights" if candidate.four_bits else "bf16 weights"
    stages = f"{candidate.stages} stage{'s' if candidate.stages > 1 else ''}"
    host = f", {candidate.host_gib:g} GiB of host memory" if candidate.host_gib else ""
    return f"{bits}, {stages}{host}, rows of {candidate.sequence_len} tokens"


def reasons(candidate: Candidate, replicas: int, refused: list[str]) -> list[str]:
    """Why this, in lines."""
    lines = [f"Chosen by the planner: {in_words(candidate)}."]
    if replicas > 1:
        lines.append(f"{replicas} replicas of it share each step.")
    lines += [f"Did not fit: {one}." for one in refused[-2:]]
    return lines


def keys(wish: Wish, candidate: Candidate) -> dict[str, Any]:
    """The configuration."""
    _, rank, rate = SIZES[wish.kind]
    raw: dict[str, Any] = {
        "model": wish.name,
        "output_dir": wish.output_dir,
        "adapter_type": "multiplicative_lora",
        "lora_rank": rank,
        "lora_alpha": rank,
        "target_modules": ["down_proj"],
        "epochs": 1,
        "lr_scheduler": "constant" if wish.kind == "books" else "cosine",
        "warmup_steps": 100 if wish.kind == "books" else 10,
        "micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "pipeline_stages": candidate.stages,
        "activation_checkpointing": "auto",
        "model_weight_dtype": "bfloat16",
        "lora_weight_dtype": "bfloat16",
        "eval_steps": 100,
        "eval_before_first_step": True,
        "eval_after_last_step": True,
        "save_steps": 100,
        "keep_states": 3,
        "checkpoint_every_n_minutes": 60,
        "optimizer": {"type": "adamw_kahan", "lr": rate, "beta2": 0.99, "weight_decay": 0.01},
        "datasets": [_dataset(wish, candidate.sequence_len)],
    }
    if candidate.host_gib:
        raw["host_memory_gib"] = candidate.host_gib
    if candidate.four_bits:
        raw["quantization"] = {"bnb": {"load_in_4bit": True}}
    if wish.kind == "preference":
        raw["objective"] = {"type": "preference", "loss_type": "sigmoid", "beta": 0.1}
    return raw


def _dataset(wish: Wish, sequence_len: int) -> dict[str, Any]:
    types = {"books": "textfile", "chat": "chat", "preference": "preference"}
    dataset: dict[str, Any] = {
        "name": wish.kind,
        "dataset_type": types[wish.kind],
        "dataset_path": wish.data,
        "sequence_len": sequence_len,
        "eval_size": 0.01,
    }
    if wish.kind == "chat":
        dataset["packing"] = "best_fit"
    return dataset
