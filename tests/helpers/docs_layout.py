"""A fresh checkout laid out as the commands of the documents assume, and those commands.

What they name is there, small: a word in capitals is a folder of that name with a tiny model, adapter or run in it.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from pipeline.artifacts.fold.merge import merge
from tests.helpers.artifacts import multiplicative
from tests.helpers.builders import BOOKS, only_run, save_model, train, write_config
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST_WORDS = (
    *(
        "python",
        "deepspeed",
        "torchrun",
        "make",
        "git",
        "source",
        "tensorboard",
        "hf",
        "export",
        "pip",
        "docker",
        "srun",
    ),
    *("sbatch", "vllm", "llama-server"),
)
BLOCK = re.compile(rf"(?m)^    ((?:{'|'.join(FIRST_WORDS)}) [^\n]*)$")
SCRIPT = re.compile(r"(?m)^(srun [^\n]*)$")  # the command of a batch file
SPAN = re.compile(r"`((?:python|deepspeed) \w+\.py [^`]*)`")
MODELS = ("BASE", "OWNER/NAME", "mistralai/Mistral-Nemo-Instruct-2407")
HIDDEN, LAYERS = 32, 4
# The founding run with the paths set, as README.md says, and small enough for two processes on a CPU.
SETTINGS = {
    "model": "'BASE'",
    "output_dir": "'OUTPUT_DIR'",
    "dataset_path": "'books/*.txt'",
    "layers_to_transform": "'0:2'",
    "lora_rank": "4",
    "batch_size_tokens": "128",
    "sequence_len": "128",
    "gradient_accumulation_steps": "2",
    "eval_steps": "2",
    "save_steps": "2",
    "epochs": "1\nmax_steps = 4",
}


class Command(NamedTuple):
    """`line`: as it stands on `page`, without a comment."""

    page: str
    line: str


def commands() -> list[Command]:
    """Those that stand in blocks, and complete ones of our scripts' in a line of text; each once a page, in its order."""
    found: dict[Command, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        every = [match for pattern in (BLOCK, SPAN, SCRIPT) for match in pattern.finditer(text)]
        for match in sorted(every, key=lambda match: match.start()):
            if "…" not in match[1]:
                found[Command(page.name, re.sub(r"\s+# .*", "", match[1]).strip())] = None
    return list(found)


def lay_out(tree: Path) -> None:
    """A copy of the checkout, with everything in it that a command names."""
    left_out = shutil.ignore_patterns(".venv*", ".git", "runs", ".*_cache", ".hypothesis", "shared")
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / ".venv").symlink_to(sys.prefix)
    for name in MODELS:
        save_model(tree / name, "llama", LAYERS, max_position_embeddings=8192)
        (tree / name / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    modules = {f"model.layers.{layer}.mlp.down_proj": (HIDDEN, 2 * HIDDEN) for layer in range(LAYERS)}
    for seed, name in enumerate(("ADAPTER", "OTHER", "A", "B")):
        multiplicative(tree / name, modules, seed=seed, base_model="BASE")
    save_file({"v": torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))}, tree / "v.safetensors")
    _texts(tree)
    _configs(tree)
    _runs(tree)


def _texts(tree: Path) -> None:
    (tree / "books").mkdir()
    for book in sorted(BOOKS.glob("*.md")):
        (tree / "books" / f"{book.stem}.txt").write_text(book.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    shutil.copy(tree / "books/the_salt_ledger.txt", tree / "book.txt")
    (tree / "prompts.txt").write_text("The salt was\nThe lock\n")


def _configs(tree: Path) -> None:
    """config_creative_writer.toml and its like; EVAL.toml and its data, as docs/evaluation.md has them."""
    text = (ROOT / "configs/config_creative_writer.toml").read_text(encoding="utf-8")
    for key, value in SETTINGS.items():
        text, times = re.subn(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert times == 1, key
    for name in ("config_creative_writer.toml", "YOURS.toml", "my_run.toml"):
        (tree / name).write_text(text, encoding="utf-8")
    _preference(tree, text)
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"(?m)^`(\S+)`(?: has .*)?:\n\n```\w+\n((?:.*\n)*?)```", page):
        (tree / name).write_text(content, encoding="utf-8")


def _preference(tree: Path, founding: str) -> None:
    """run.toml: docs/preference.md's table and data set in the place of the founding run's data."""
    page = (ROOT / "docs/preference.md").read_text(encoding="utf-8")
    table = page.split("```toml\n")[1].split("```")[0].replace("eval_size = 200", "eval_size = 4")
    keys, tables = founding[: founding.index("[optimizer]")], founding[founding.index("[optimizer]") :]
    once = re.sub(r"(?m)^(dataset_combination_mode|batch_size_tokens|group_by_length) = .*\n", "", keys)
    optimizer = tables[: tables.index("[[datasets]]")]
    (tree / "run.toml").write_text(f"{once}\n{table}\n{optimizer}", encoding="utf-8")
    (tree / "pairs").mkdir()
    pairs = [{"prompt": f"lock {n}:", "chosen": " a gate", "rejected": " a boat"} for n in range(24)]
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    (tree / "pairs/all.jsonl").write_text(lines, encoding="utf-8")


def _runs(tree: Path) -> None:
    """What `make train` leaves, RUN and OTHER_RUN."""
    made = tree / "runs/quickstart"
    data = {"name": "book", "dataset_type": "textfile", "dataset_path": str(tree / "book.txt"), "sequence_len": 64}
    for name, rate in (("RUN", 1e-2), ("OTHER_RUN", 2e-2)):
        config = write_config(
            tree / f"{name}.toml",
            model=str(tree / "BASE"),
            output_dir=str(made / name),
            pipeline_stages=1,
            max_steps=3,
            eval_steps=2,
            optimizer={"type": "adamw_kahan", "lr": rate},
            datasets=[{**data, "eval_size": 4}],
        )
        train(1, "--config", str(config))
        shutil.move(only_run(made / name), tree / name)
    (made / "RUN").rename(made / "adapter_runs")
    shutil.copytree(tree / "RUN", made / "adapter_runs/20261129_10-00-00")
    merge(tree / "BASE", [tree / "ADAPTER"], made / "merged")
