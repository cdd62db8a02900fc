"""Writes configs/recipes/ and docs/recipes.md: what new_config.py makes of machines, models and kinds of data.

    python -m docs.recipes              writes them
    python -m docs.recipes --only 7b    of this model alone, the files; the page needs all
    python -m docs.recipes --check      exit code 1, naming the files that are not what would be written

Takes models' published dimensions, as transformers' configuration classes have them, without weights; gives a file for each cell
that the planner finds room for, and the page, which has all cells.
"""

import argparse
import functools
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import transformers

from pipeline.console import UserError, duration
from pipeline.recipes.choose import MICRO_BATCHES, Chosen, Kind, Wish, choose
from pipeline.recipes.write import as_toml

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "configs" / "recipes", ROOT / "docs" / "recipes.md"
GIB = 2**30
MACHINES = ("1x24", "2x24", "4x24", "2x48", "1x80", "8x80")
KINDS: tuple[Kind, ...] = get_args(Kind)
DATA: dict[Kind, str] = {"books": "books/*.txt", "chat": "conversations.jsonl", "preference": "pairs.jsonl"}


class Model(NamedTuple):
    """`label`: as recipes call it. `name`: on the Hub. `weights`: how many, in billions, as published.

    `dimensions`: those of the published config.json of `name` that differ from the class's, of which none ties its head.
    """

    label: str
    name: str
    weights: float
    of: type[Any]
    dimensions: dict[str, Any]


_MISTRAL = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None}
MODELS = (
    Model(
        "7b",
        "mistralai/Mistral-7B-Instruct-v0.3",
        7.25,
        transformers.MistralConfig,
        {
            **_MISTRAL,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "vocab_size": 32768,
            "max_position_embeddings": 32768,
        },
    ),
    Model(
        "12b",
        "mistralai/Mistral-Nemo-Instruct-2407",
        12.2,
        transformers.MistralConfig,
        {
            **_MISTRAL,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "vocab_size": 131072,
            "max_position_embeddings": 131072,
        },
    ),
    Model(
        "24b",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        23.6,
        transformers.MistralConfig,
        {
            **_MISTRAL,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "vocab_size": 131072,
            "max_position_embeddings": 32768,
        },
    ),
    Model(
        "32b",
        "Qwen/Qwen3-32B",
        32.8,
        transformers.Qwen3Config,
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
    ),
    Model(
        "70b",
        "meta-llama/Llama-3.3-70B-Instruct",
        70.6,
        transformers.LlamaConfig,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    Model(
        "30b-a3b",
        "Qwen/Qwen3-30B-A3B",
        30.5,
        transformers.Qwen3MoeConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
    ),
    Model(
        "106b-a12b",
        "zai-org/GLM-4.5-Air",
        106,  # without num_nextn_predict_layers = 1, a further layer that transformers leaves out
        transformers.Glm4MoeConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "vocab_size": 151552,
            "max_position_embeddings": 131072,
        },
    ),
)

INTRODUCTION = f"""\
# Recipes by machine and model

Generated by `python -m docs.recipes`, by the functions of `new_config.py`. Each row is a file of configs/recipes/. Set its
`dataset_path` and `output_dir`, and `model` to your copy of the model (or leave its name on the Hub), and look at it:

    python train.py --config recipes/2x24/12b-books.toml --check
    python train.py --config recipes/2x24/12b-books.toml --plan --devices 2x24GiB

**These are plans.** No GPU has run them. Memory is counted from the code; times take published figures of the GPU that has
this memory, times what is usually reached of them ([performance.md](performance.md)). All train a multiplicative LoRA on
down_proj (of a mixture of experts, on what its experts write), of rank 64 for books and 16 for conversations and preferences,
in micro-batches of one row or pair, {MICRO_BATCHES} of them a step and replica. What other models, GPUs and lengths come to,
`new_config.py` says.

The first choice is 16-bit weights, then 4-bit ones, on as few GPUs as hold them (the others are replicas), without host memory
before with 64 GiB of it; rows are shortened last. GiB a GPU: of the fullest, of what a run can have of it.
"""
HEAD = "| machine | data | weights | stages × replicas | context | GAS | host GiB | GiB a GPU | a step | tokens/s |"


class Cell(NamedTuple):
    """A recipe, or why there is none."""

    machine: str
    model: Model
    kind: Kind
    chosen: Chosen | None
    why_not: str

    @property
    def file(self) -> Path:
        return FOLDER / self.machine / f"{self.model.label}-{self.kind}.toml"

    @property
    def text(self) -> str:
        """Of the file."""
        assert self.chosen is not None
        heading = f"{self.model.name} on {self.machine}GiB, trained on {self.kind}"
        gpus = f"{self.machine}GiB"
        words = ["--model", self.model.name, "--kind", self.kind, "--data", DATA[self.kind], "--gpus", gpus]
        return as_toml(self.chosen, heading, shlex.join(["python", "new_config.py", *words]), "../../schema.json")


@functools.cache
def _folders() -> tempfile.TemporaryDirectory[str]:
    """Of the models' folders; it goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="recipes-")


@functools.cache
def folder_of(label: str) -> Path:
    """A folder with a model's config.json, one for the whole process: what is counted of it is remembered by its path."""
    (model,) = (model for model in MODELS if model.label == label)
    folder = Path(_folders().name) / label
    model.of(**model.dimensions).save_pretrained(folder)
    return folder


def cell(machine: str, model: Model, kind: Kind) -> Cell:
    """Plan one."""
    wish = Wish(folder_of(model.label), model.name, kind, DATA[kind], f"{machine}GiB", "runs")
    try:
        return Cell(machine, model, kind, choose(wish), "")
    except UserError as error:
        return Cell(machine, model, kind, None, str(error))


def cells(model: Model) -> list[Cell]:
    """All of a model."""
    return [cell(machine, model, kind) for machine in MACHINES for kind in KINDS]


def page(every: list[list[Cell]]) -> str:
    """docs/recipes.md. `every`: the cells of each model."""
    return "\n".join([INTRODUCTION, *(_section(of_model) for of_model in every)])


def _section(of_model: list[Cell]) -> str:
    model = of_model[0].model
    lines = [f"## {model.label.upper()}: {model.name}\n", HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]
    return "\n".join([*lines, *map(_row, of_model)]) + "\n"


def _row(one: Cell) -> str:
    if (chosen := one.chosen) is None:
        return f"| {one.machine} | {one.kind} | does not fit | | | | | {_lacking(one)} | | |"
    found, made = chosen.found, chosen.candidate
    fullest = max(found.stages, key=lambda stage: stage.total_bytes / stage.device_bytes)
    cells = (
        one.machine,
        f"[{one.kind}](../{one.file.relative_to(ROOT)})",
        "4 bits" if made.four_bits else "16 bits",
        f"{made.stages} × {chosen.replicas}",
        f"{made.sequence_len:,}",
        str(MICRO_BATCHES),
        f"{made.host_gib:g}" if made.host_gib else "–",
        f"{fullest.total_bytes / GIB:.1f} of {fullest.device_bytes / GIB:.1f}",
        duration(found.step_s),
        f"{found.tokens_per_s * chosen.replicas:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


def _lacking(one: Cell) -> str:
    """What the most frugal that was tried lacks, as choose() says it in brackets."""
    return one.why_not.rpartition("(")[2].partition(")")[0]


def stale(every: list[list[Cell]], *, with_page: bool) -> Iterator[tuple[Path, str | None]]:
    """The files that are not what they should be, with what they should be; None for one that should not be."""
    planned = [one for of_model in every for one in of_model]
    wanted = {one.file: one.text for one in planned if one.chosen is not None}
    if with_page:
        wanted[PAGE] = page(every)
    for file, text in wanted.items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            yield file, text
    for one in planned:
        if one.chosen is None and one.file.exists():
            yield one.file, None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=[model.label for model in MODELS])
    asked = parser.parse_args()
    every = [cells(model) for model in MODELS if asked.only in (None, model.label)]
    found = list(stale(every, with_page=asked.only is None))
    for file, text in found:
        print(f"{file.relative_to(ROOT)}: {'stale' if asked.check else 'removed' if text is None else 'written'}")
        if asked.check:
            continue
        if text is None:
            file.unlink()
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return 1 if asked.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
