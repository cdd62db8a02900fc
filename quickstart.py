"""`make train`: the main job, whole, on real text over a real two-stage pipeline, on a machine without a GPU.

Takes the three sample books; makes a tokenizer and a small Cohere-architecture base (through the trainer itself), trains
a multiplicative LoRA on a book the base has not read, stops half way by a signal, resumes, folds the adapter, and
compares. Everything is left under runs/quickstart/, with what was measured in summary.json.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent  # of the commands that are shown: .venv/bin, or where an image has its Python
BIN = BIN.relative_to(ROOT) if BIN.is_relative_to(ROOT) else BIN
HERE = Path("runs/quickstart")
BOOKS = ROOT / "datasets/sample_books"
ADAPTER_BOOK = "the_cartographers_of_low_water.md"
HELD_OUT_CHAPTERS = 2
STAGES = 2
VOCABULARY = 1024
ARCHITECTURE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "logit_scale": 0.25,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def main() -> int:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()  # --help, and no options
    os.chdir(ROOT)
    began = time.monotonic()
    if HERE.exists():
        shutil.rmtree(HERE)
    heading("1/6  the books: two for the base, one for the adapter, its last chapters held out")
    divide_books()
    heading("2/6  a tokenizer and a small base model, trained in full over two stages")
    make_random_model()
    train("quickstart_base.toml")
    shutil.copytree(newest(newest(HERE / "base_runs", "2*"), "step*"), HERE / "base")
    heading("3/6  the adapter: training starts, and is stopped half way by a signal")
    stopped_at = train_and_stop("quickstart.toml", after_step=half_of_the_run())
    heading(f"4/6  it goes on from step {stopped_at}")
    train("quickstart.toml", "--resume_from_checkpoint")
    run = newest(HERE / "adapter_runs", "2*")
    adapter = newest(run, "step*")
    heading("5/6  the fold")
    call(sys.executable, "merge_lora.py", "--input", HERE / "base", "--lora", adapter, "--output", HERE / "merged")
    heading("6/6  the merged model, by plain transformers, on the held-out chapters")
    summary = summarise(run, adapter, stopped_at)
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report(summary, time.monotonic() - began)
    return 0


def divide_books() -> None:
    """Two books to books/base, the chapters of the third to books/train and, the last ones, books/held_out."""
    (HERE / "books/base").mkdir(parents=True)
    for book in sorted(BOOKS.glob("*.md")):
        if book.name != ADAPTER_BOOK:
            shutil.copy(book, HERE / "books/base")
    divide_chapters(HERE / "books")


def divide_chapters(into: Path) -> None:
    """The chapters of the adapter's book as files, to `into`/train and, the last ones, `into`/held_out."""
    for folder in ("train", "held_out"):
        (into / folder).mkdir(parents=True)
    chapters = re.split(r"(?m)^(?=## )", (BOOKS / ADAPTER_BOOK).read_text(encoding="utf-8"))[1:]
    for number, chapter in enumerate(chapters, start=1):
        folder = "held_out" if number > len(chapters) - HELD_OUT_CHAPTERS else "train"
        (into / folder / f"chapter_{number:02d}.md").write_text(chapter, encoding="utf-8")
    print(f"{len(chapters)} chapters of {ADAPTER_BOOK}, {HELD_OUT_CHAPTERS} of them held out")


def make_random_model() -> None:
    """A byte-level BPE trained on the base's books, and a Cohere model with random weights, in runs/quickstart/random."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    files = [str(path) for path in sorted((HERE / "books/base").glob("*.md"))]
    bpe.train(files, vocab_size=VOCABULARY, special_tokens=["<PAD>", "<BOS>", "<EOS>"], show_progress=False)
    names = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names).save_pretrained(HERE / "random")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CohereConfig(**ARCHITECTURE), dtype=torch.float32)
    model.save_pretrained(HERE / "random")
    print(f"a tokenizer of {VOCABULARY} tokens; a model of {model.num_parameters():,} random weights")


def train(config: str, *more: str) -> None:
    """`deepspeed --num_gpus 2 train.py --config …` to its end."""
    if (code := start(config, *more).wait()) != 0:
        sys.exit(code)


def train_and_stop(config: str, after_step: int) -> int:
    """Start training, send SIGTERM to one of its processes after a step, and return the step it was saved at."""
    launcher = start(config)
    while launcher.poll() is None and steps_done() < after_step:
        time.sleep(0.05)
    print(f"      … kill -TERM to one of the training processes after step {steps_done()}", flush=True)
    for pid in ranks_of(launcher.pid)[-1:]:
        os.kill(pid, signal.SIGTERM)
    if (code := launcher.wait()) != 75:
        sys.exit(f"expected exit code 75 (stopped, resumable), got {code}")
    return int(newest(newest(HERE / "adapter_runs", "2*"), "global_step*").name.removeprefix("global_step"))


def start(config: str, *more: str) -> subprocess.Popen[bytes]:
    """The user's own command."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    command = [deepspeed, "--quiet", "--num_gpus", str(STAGES), "train.py", "--config", config, *more]
    print("$ deepspeed", *command[2:], flush=True)
    return subprocess.Popen(command, env=environment())


def environment() -> dict[str, str]:
    """One thread a process where the machine has no more cores than stages; DeepSpeed told what it would find out."""
    import torch

    threads = max(1, (os.cpu_count() or 1) // STAGES)
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(threads), **accelerator, **os.environ}


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the training processes below the launcher."""
    import psutil

    below = psutil.Process(launcher).children(recursive=True)
    return [p.pid for p in below if "train.py" in " ".join(p.cmdline()) and "launch" not in " ".join(p.cmdline())]


def metrics() -> list[dict]:
    """The metrics of the adapter's run so far."""
    files = sorted((HERE / "adapter_runs").glob("2*/metrics.jsonl"))
    lines = files[-1].read_text().splitlines() if files else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_done() -> int:
    return max((line["step"] for line in metrics()), default=0)


def half_of_the_run() -> int:
    """Half of the adapter's steps, from its configuration and the cut text, without training."""
    from pipeline.config.loading import load
    from pipeline.data import tokenizer
    from pipeline.training.data import specs
    from pipeline.training.data.batches import micro_batches
    from pipeline.training.data.read import read_data

    config = load("quickstart.toml")
    data = read_data(specs.data_of(config), tokenizer.load(config.model))
    return micro_batches(specs.data_of(config), data).steps_per_epoch(0) * (config.epochs or 1) // 2


def merged_loss() -> float:
    """Mean loss of the folded model over the held-out chunks: transformers alone, no pipeline."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.config.loading import load
    from pipeline.data import tokenizer
    from pipeline.training.data import specs
    from pipeline.training.data.read import read_data

    config = load("quickstart.toml")
    rows = read_data(specs.data_of(config), tokenizer.load(config.model)).evaluation["held_out"]
    model = AutoModelForCausalLM.from_pretrained(HERE / "merged").eval()
    total = 0.0
    with torch.no_grad():
        for row in rows.rows:
            ids = torch.tensor(rows.store.ids(int(row))).long().unsqueeze(0)
            total += float(model(input_ids=ids, labels=ids).loss)
    return total / len(rows)


def summarise(run: Path, adapter: Path, stopped_at: int) -> dict:
    lines = metrics()
    losses = [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
    speeds = sorted(line["train/tokens_per_s"] for line in lines if "train/tokens_per_s" in line)
    return {
        "stages": STAGES,
        "steps": steps_done(),
        "resumed_at_step": stopped_at,
        "base_eval_loss": losses[0],
        "adapter_eval_loss": losses[-1],
        "merged_eval_loss": merged_loss(),
        "tokens_per_s": speeds[len(speeds) // 2],
        "adapter": str(adapter),
        "merged_model": str(HERE / "merged"),
    }


def report(summary: dict, seconds: float) -> None:
    print(f"\n{'held-out chapters':34} {'loss':>8} {'perplexity':>11}")
    for name, key in (
        ("base", "base_eval_loss"),
        ("with the adapter, two stages", "adapter_eval_loss"),
        ("merged, plain transformers", "merged_eval_loss"),
    ):
        print(f"{name:34} {summary[key]:8.4f} {2.718281828 ** summary[key]:11.2f}")
    print(
        f"\n{summary['steps']} steps over {summary['stages']} stages, stopped and resumed at step "
        f"{summary['resumed_at_step']}, {summary['tokens_per_s']:,.0f} tokens/s (median), {seconds:.0f} s in all\n"
        f"adapter        {summary['adapter']}\nmerged model   {summary['merged_model']}\n\nnext:\n"
        f"  {BIN}/tensorboard --logdir runs/quickstart/adapter_runs\n"
        f"  {BIN}/python train.py --config quickstart.toml --preview 2\n"
        f"  {BIN}/python train.py --config config_creative_writer.toml --check   # after setting its paths"
    )
    if not summary["adapter_eval_loss"] < summary["base_eval_loss"] - 0.1:
        sys.exit("the adapter's loss is not clearly below the base's")
    if abs(summary["merged_eval_loss"] - summary["adapter_eval_loss"]) > 1e-3:
        sys.exit("the merged model is not the model that was trained")


def newest(folder: Path, pattern: str) -> Path:
    """The last of the folders named by a time or a number."""
    return max(folder.glob(pattern), key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def call(*command: object) -> None:
    print("$", *("python" if part == sys.executable else part for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True)


def heading(text: str) -> None:
    print(f"\n── {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
