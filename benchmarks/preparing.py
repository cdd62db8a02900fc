"""How fast data is prepared:  python -m benchmarks.preparing [--megabytes 10] [--rounds 2] [--processes 2]

The same rows and the same tokenizer, once by ours, once by `datasets.map` with as many processes: conversations through a chat
template, and plain text. Each measurement is a process of its own, ours and the peer's in turn; gives the least seconds from
files to token ids on the disk (without imports), the peak memory of the process and of the largest of its workers, and ours as
a ratio to the peer's, in results/preparing.json. Ours finds the targets of each turn besides, checks and hashes.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY, TURN_WORDS, TURNS = 8192, 70, 4


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the sample books, with ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(words_of_books().split("\n"), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0], pad_token=special[0])
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.save_pretrained(folder)


def words_of_books() -> str:
    """The text of the sample books."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "datasets").rglob("*.md")))


def write_rows(folder: Path, n_bytes: int) -> None:
    """`n_bytes` of conversations, and as many of texts, as JSON lines; each row another stretch of the books."""
    words = words_of_books().split(" ")
    for kind in ("chat", "text"):
        with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as file:
            row = 0
            while file.tell() < n_bytes:
                parts = [
                    " ".join(words[(row * 37 + part * 911) % (len(words) - TURN_WORDS) :][:TURN_WORDS])
                    for part in range(TURNS)
                ]
                roles = ("user", "assistant")
                messages = [{"role": roles[part % 2], "content": f"{row} {text}"} for part, text in enumerate(parts)]
                value: Any = {"messages": messages} if kind == "chat" else {"text": f"{row} " + " ".join(parts)}
                file.write(json.dumps(value, ensure_ascii=False) + "\n")
                row += 1


def ours(folder: Path, kind: str, processes: int) -> int:
    """Tokens of what this project makes of the rows."""
    from pipeline.data import chunks
    from pipeline.data.chat.derive import Rules
    from pipeline.data.rows.build import RowSpec, build
    from pipeline.data.tokenizer import load

    tokenizer, cache = load(str(folder / "tokenizer")), Path(tempfile.mkdtemp(dir=folder))
    path = str(folder / f"{kind}.jsonl")
    begin()
    if kind == "chat":
        spec = RowSpec("rows", "chat", path, Rules(4096))
        return build(spec, tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")], cache, processes).report.tokens
    made = chunks.build(
        name="rows",
        dataset_type="doclist",
        dataset_path=path,
        sequence_len=1024,
        tokenizer=tokenizer,
        cache_dir=cache,
        processes=processes,
    )
    return made.train.report.text_tokens


def peer(folder: Path, kind: str, processes: int) -> int:
    """Tokens of what `datasets.map` makes of the rows."""
    import datasets

    from pipeline.data.tokenizer import load

    tokenizer = load(str(folder / "tokenizer"))
    datasets.disable_progress_bars()

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)}

    def text(rows: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]}

    begin()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / f"{kind}.jsonl"), split="train", cache_dir=tempfile.mkdtemp(dir=folder)
    )
    made = rows.map(
        chat if kind == "chat" else text, batched=kind == "text", num_proc=processes, remove_columns=rows.column_names
    )
    return sum(len(batch) for part in made.data.column("input_ids").chunks for batch in part)


BEGAN = 0.0


def begin() -> None:
    """Imports and the tokenizer are there: the clock runs from here."""
    global BEGAN
    BEGAN = time.monotonic()


def measured(folder: Path, name: str, kind: str, processes: int) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.preparing", "--one", name, kind, str(folder), str(processes)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def one(name: str, kind: str, folder: Path, processes: int) -> None:
    """Print seconds, tokens and peak memory as JSON."""
    tokens = {"ours": ours, "datasets.map": peer}[name](folder, kind, processes)
    seconds = time.monotonic() - BEGAN
    peaks = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": peaks[0], "peak_worker_bytes": peaks[1]}))


def main() -> None:
    """Measure, show and record."""
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument("--megabytes", type=float, default=10, metavar="N", help="of rows of each kind")
    command.add_argument("--rounds", type=int, default=2, metavar="N", help="of each, of which the least counts")
    command.add_argument("--processes", type=int, default=2, metavar="N")
    command.add_argument("--tiny", action="store_true", help="to see that it runs")
    command.add_argument("--out", type=Path, metavar="DIR", help="where to write (default benchmarks/results)")
    command.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    asked = command.parse_args()
    if asked.one:
        one(asked.one[0], asked.one[1], Path(asked.one[2]), int(asked.one[3]))
        return
    megabytes, rounds = (0.2, 1) if asked.tiny else (asked.megabytes, asked.rounds)
    folder, rows = Path(tempfile.mkdtemp()), []
    try:
        make_tokenizer(folder / "tokenizer")
        write_rows(folder, int(megabytes * 1e6))
        for kind in ("chat", "text"):
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "datasets.map": []}
            for _ in range(rounds):
                for name, results in found.items():
                    results.append(measured(folder, name, kind, asked.processes))
            best = {name: min(results, key=lambda result: result["seconds"]) for name, results in found.items()}
            for name, result in best.items():
                ratio = best["datasets.map"]["seconds"] / result["seconds"]
                rows.append({"kind": kind, "variant": name, **result, "speed_to_datasets_map": round(ratio, 3)})
                peaks = ", ".join(f"{result[key] / 2**20:.0f} MiB" for key in ("peak_bytes", "peak_worker_bytes"))
                print(f"{kind:5} {name:13} {result['seconds']:8.2f} s, {result['tokens']:,} tokens", end=", ")
                print(f"{ratio:.2f} × datasets.map, at most {peaks} (its largest worker)", flush=True)
    finally:
        shutil.rmtree(folder)
    settings = {"megabytes": megabytes, "rounds": rounds, "processes": asked.processes}
    print(record.write("preparing", settings, rows, asked.out))


if __name__ == "__main__":
    main()
