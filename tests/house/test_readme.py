"""The README's commands do what it says, in a fresh copy of the tree; what it names exists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.start import make_model
from pipeline.config import loading
from tests.helpers.builders import BOOKS, ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
SUMMARY_KEYS = [
    "stages",
    "steps",
    "resumed_at_step",
    "base_eval_loss",
    "adapter_eval_loss",
    "merged_eval_loss",
    "tokens_per_s",
    "adapter",
    "merged_model",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_make_train_does_the_main_job(tmp_path: Path) -> None:
    """`make train` after its set-up: quickstart.py, in a copy of the tree, so that a user's runs/ stay as they are."""
    makefile = (ROOT / "Makefile").read_text()
    assert "    make train" in README
    assert re.search(r"^train: setup.*\n\t.*python quickstart\.py$", makefile, re.M)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", ".*_cache", ".hypothesis"))
    done = subprocess.run(
        [sys.executable, "quickstart.py"], cwd=tree, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tree / "runs/quickstart/summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS
    assert summary["stages"] == 2
    assert 0 < summary["resumed_at_step"] < summary["steps"]
    # Clearly better on chapters it has not read: a tenth of a nat is a tenth of the perplexity.
    assert summary["adapter_eval_loss"] < summary["base_eval_loss"] - 0.1
    # The fold is in fp32; in training A·h and B·z are bf16 products, each right to 2⁻⁹: what the adapter changes is then
    # right to 2⁻⁸ of itself.
    effect = summary["base_eval_loss"] - summary["adapter_eval_loss"]
    assert abs(summary["merged_eval_loss"] - summary["adapter_eval_loss"]) < effect * 2**-8
    run = (tree / summary["adapter"]).parent
    steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
    assert steps == list(range(1, summary["steps"] + 1))  # none lost and none twice over the stop
    last = summary["steps"]
    for what in ("config.toml", f"step{last}/adapter_model.safetensors", f"global_step{last}/manifest.json"):
        assert (run / what).exists()
    assert len(list(run.glob("step*"))) == 3  # keep_states
    assert not list(tree.glob("runs/quickstart/*/.rendezvous*"))
    assert "perplexity" in done.stdout
    assert "next:" in done.stdout


@pytest.fixture(scope="module")
def command_r(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is Command-R 35B but for its weights' values: --check reads none."""
    folder = tmp_path_factory.mktemp("c4ai-command-r-v01")
    make_model(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ["--check", "--preview 3"])
def test_the_founding_run_is_ready_for_two_48_gib_gpus(tmp_path: Path, command_r: Path, command: str) -> None:
    assert f"python train.py --config config_creative_writer.toml {command}" in README
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "--config",
            "config_creative_writer.toml",
            *command.split(),
            "--set",
            f"model={command_r}",
            "--set",
            f"output_dir={tmp_path}",
            "--set",
            f"datasets.0.dataset_path={BOOKS}/*.md",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "multiplicative_lora on the output of down_proj, layers 0 to 38 (39 of 40: all but the last)" in done.stdout
    assert "rank 64, s = alpha/rank = 64/64 = 1, bfloat16" in done.stdout
    stages = re.findall(r"stage \d: layers (\d+) to (\d+) .*, ([\d.]+) GiB of weights, (\d+)% of the work", done.stdout)
    assert [int(first) for first, *_ in stages] == [0, int(stages[0][1]) + 1]
    assert int(stages[-1][1]) == 39
    # 40 layers of 822 M weights and an embedding of 2097 M on both ends (tied, frozen), bf16: 69.1 GiB in all.
    assert sum(float(size) for *_, size, _ in stages) == pytest.approx(
        40 * 2 * 822.1e6 / 2**30 + 2 * 2 * 2097e6 / 2**30, rel=0.01
    )
    assert all(float(size) < 40 for *_, size, _ in stages)  # of 48, with room for activations
    assert "16 micro-batches (16 accumulated × 1 replica(s)) = " in done.stdout
    if "preview" in command:
        # The sample books are three rows of 8192 tokens, of which one is held out.
        assert len(re.findall(r"(?m)^row \d+: no\.", done.stdout)) == 2
        assert "⟦EOS" in done.stdout


def test_the_first_screen_has_what_a_newcomer_asks() -> None:
    """What it is for, what it eats, costs and has run on; one picture of a report; what to type, to the first answer."""
    screen = README.split("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| \*\*(.+?)\*\* \| (.*) \|$", screen))
    assert list(rows) == ["It eats", "It trains", "It costs", "It has run", "Afterwards"]
    assert "2.5 GB of packages for the CPU, more with CUDA" in rows["It costs"]
    assert "two minutes" in rows["It costs"]
    assert "GPU" in rows["It has run"]
    (picture,) = re.findall(r"!\[.*report.*\]\((\S+)\)", screen)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    typed = re.findall(r"(?m)^    (\S+ \S+)", screen)
    starts = ["git clone", "source .venv/bin/activate", "tensorboard --logdir", "python generate.py", "hf download"]
    assert typed == [*starts, "python generate.py"]
    assert "--chat" in screen


def test_the_founding_run_evaluates_what_it_ends_with() -> None:
    assert loading.load("config_creative_writer.toml").eval_after_last_step


def test_the_user_s_commands_stand_as_they_were_given() -> None:
    assert "    deepspeed train.py --config config_creative_writer.toml\n" in README
    assert "    python merge_lora.py --input BASE --lora ADAPTER --output OUT\n" in README


def test_everything_the_tree_names_exists() -> None:
    block = README.split("## The tree")[1].split("\n## ")[0]
    folder = ROOT
    for line in block.splitlines():
        if match := re.match(r"(\s{4,6})(\S+)(\s{2,}\S|$)", line):
            indent, name = len(match.group(1)), match.group(2)
            if indent == 4:
                folder = ROOT / name if name.endswith("/") else ROOT
                assert (ROOT / name).exists(), name
            else:
                assert (folder / name).exists(), name


def test_links_and_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_outside_the_project_is_named() -> None:
    """No machine's path and no shared folder: the project stands alone."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    forbidden = ("../sha" + "red", "/work" + "/", ".lib" + "rary/")
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json"} or path.name == "Makefile":
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in forbidden), name
