"""The commands of README.md and docs/: each is one that its script's parser takes, and those of our scripts run as they stand.

Placeholders (BASE, ADAPTER, RUN, …) stand for a small model and what two small trainings made of it.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from pipeline.training.start import arguments
from tests.helpers.builders import BOOKS, ROOT, environment, launch, save_model, write_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# A launcher's own options, which its tests read (tests/house/test_clusters.py), end where the script begins.
LINE = re.compile(r"(?m)^    ((?:python|deepspeed|torchrun)\b[^\n#]*?\b(\w+)\.py\b[^\n#]*)")
MODULE = re.compile(r"(?m)^    python -m ([\w.]+)")
LENGTH = 64


class Command(NamedTuple):
    """`words`: what follows the script."""

    page: str
    script: str
    launched: bool
    words: tuple[str, ...]


def commands() -> list[Command]:
    """All of our scripts', each once."""
    found: dict[Command, None] = {}
    for page in PAGES:
        for line, script in LINE.findall(page.read_text(encoding="utf-8")):
            if script in SCRIPTS:
                words = shlex.split(line)
                begins = words.index(f"{script}.py")
                found[Command(page.name, script, not line.startswith("python"), tuple(words[begins + 1 :]))] = None
    return list(found)


COMMANDS = commands()
# Not run here: models and services that are not there, and what other tests run as it stands.
ELSEWHERE = {
    ("evaluation.md", "--tasks"): "tests/evaluation/test_harness.py",
    ("clusters.md", "--config"): "tests/training/run/test_nodes.py",
    ("recipes.md", "--check"): "the model itself is needed",
    ("recipes.md", "--plan"): "tests/recipes/test_shipped.py",
    ("plans.md", "--plan"): "README.md has the same",
}


def test_there_are_commands_of_every_script_that_a_user_starts() -> None:
    assert {command.script for command in COMMANDS} >= set(SCRIPTS) - {"quickstart", "demo", "doctor"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page} {c.script} {' '.join(c.words)}")
def test_the_script_takes_the_command(command: Command) -> None:
    module = arguments if command.script == "train" else importlib.import_module(command.script)
    words = [word for word in command.words if word != "…"]
    module.parser().parse_args(words)  # SystemExit with what it does not know


def test_modules_and_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for module in MODULE.findall(text):
            assert (ROOT / f"{module.replace('.', '/')}.py").exists(), (page.name, module)
        for target in re.findall(r"(?m)^    make (\S+)", text):
            assert re.search(rf"(?m)^{target}:", makefile), (page.name, target)


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"quickstart", "demo"}))
def test_help_has_examples(script: str) -> None:
    module = arguments if script == "train" else importlib.import_module(script)
    said = module.parser().format_help()
    (example, *_) = re.findall(rf"(?m)(?:^|examples?: +)(?:\s*)((?:python|deepspeed|torchrun).*{script}\.py.*)$", said)
    assert example
    if script == "train":
        assert "deepspeed --num_gpus 2 train.py" in said
        assert "torchrun --nproc_per_node 2 train.py" in said


def test_options_complete_in_a_shell(tmp_path: Path) -> None:
    """As bash asks for it, by argcomplete's protocol."""
    typed = "train.py --resume"
    asking = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "IFS": "\n", "COMP_TYPE": "9"}
    asking |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "said")}
    subprocess.run([sys.executable, "train.py"], cwd=ROOT, env=environment(**asking), check=True, timeout=60)
    assert (tmp_path / "said").read_text().split() == ["--resume_from_checkpoint"]
    assert all(
        "PYTHON_ARGCOMPLETE_OK" in (ROOT / f"{script}.py").read_text()
        for script in set(SCRIPTS) - {"quickstart", "demo"}
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By placeholder, what stands for it."""
    root = tmp_path_factory.mktemp("commands")
    save_model(root / "base", "llama", layers=2)
    (root / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    common = {"model": str(root / "base"), "layers_to_transform": "0:0", "max_steps": 2}
    runs = {}
    for name, rate in (("one", 1e-2), ("other", 2e-2)):
        optimizer = {"type": "adamw_kahan", "lr": rate}
        toml = write_config(root / f"{name}.toml", **common, optimizer=optimizer, output_dir=str(root / name))
        launch(2, ROOT / "train.py", "--config", str(toml))
        (runs[name],) = (path for path in (root / name).iterdir() if (path / "run.json").exists())
    rows = [{"prompt": f"{n}:", "completion": f" {n + 1}"} for n in range(6)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"name": "a", "role": "in-sample", "dataset_type": "completion", "dataset_path": str(root / "rows.jsonl")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**dataset, "sequence_len": 64}.items()]
    evaluation = [f"model = {json.dumps(str(root / 'base'))}", f"output_dir = {json.dumps(str(root / 'evaluated'))}"]
    (root / "eval.toml").write_text("\n".join([*evaluation, "[[datasets]]", *lines]))
    torch.manual_seed(0)
    save_file({"v": torch.randn(1, 32)}, root / "v.safetensors")
    (root / "book.txt").write_text((BOOKS / "the_salt_ledger.md").read_text()[:2000])
    (root / "prompts.txt").write_text("The salt was\n")
    adapter = str(runs["one"] / "step2")
    return {
        "BASE": str(root / "base"),
        "OWNER/NAME": str(root / "base"),
        "runs/quickstart/merged": str(root / "base"),
        "ADAPTER": adapter,
        "A": adapter,
        "B": str(runs["other"] / "step2"),
        "OTHER": str(runs["other"] / "step2"),
        "EVAL.toml": str(root / "eval.toml"),
        "v.safetensors": str(root / "v.safetensors"),
        "book.txt": str(root / "book.txt"),
        "prompts.txt": str(root / "prompts.txt"),
        "config_creative_writer.toml": str(root / "one.toml"),
        "books/*.txt": str(root / "book.txt"),
        "my_run.toml": str(root / "one.toml"),
        "YOURS.toml": str(root / "one.toml"),
        "RUN": str(runs["one"]),
        "RUN 2": str(runs["other"]),
    }


def to_run() -> list[Command]:
    return [c for c in COMMANDS if not any(c.page == page and option in c.words for page, option in ELSEWHERE)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", to_run(), ids=lambda c: f"{c.page} {c.script} {' '.join(c.words)}")
def test_the_command_runs(command: Command, places: dict[str, str], tmp_path: Path) -> None:
    """In an empty folder; outputs are new files and folders there."""
    words, seen = [], 0
    for word in command.words:
        seen += word == "RUN"
        words.append(places.get("RUN 2" if seen == 2 and word == "RUN" else word, word))
    if command.script == "generate":
        words += [] if "--max-new-tokens" in words else ["--max-new-tokens", "6"]
    if command.script == "new_config":
        words += ["--sequence-len", str(LENGTH)]
    if command.launched:
        launch(2, ROOT / f"{command.script}.py", *words)
        return
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{command.script}.py"), *words],
        cwd=tmp_path,
        env=environment(),
        input="Who?\n\n",
        capture_output=True,
        text=True,
    )
    typed = command.script == "generate" and not {"--prompt", "--prompts"} & set(words)
    assert done.returncode == 0 or (typed and "terminal" in done.stderr), done.stdout + done.stderr
