"""Builders for the tests of the data path: text, tokenizers trained on it, stores of chunks on disk, peak memory."""

import json
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data import chunks
from pipeline.data.selection import Streams
from pipeline.data.store import ChunkStore, ChunkWriter, Marks
from tests.helpers.paths import ROOT

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MARKS = Marks(bos=1, eos=2, unknown=0, others=(3,))
KINDS = ("gpt2", "llama3", "sentencepiece", "sentencepiece_first", "llama2", "gemma", "unigram", "wordpiece")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def prose(words: int, seed: int = 0) -> str:
    """Text of `words` made-up words in sentences, paragraphs and chapters, with dialogue, numbers and a few accents."""
    draw = random.Random(seed)
    syllables = ["ka", "ro", "thé", "lin", "mo", "sta", "ber", "ü", "ing", "qua", "s", "dre", "el", "fo", "ny", "ast"]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    parts: list[str] = []
    while len(parts) < words:
        sentence = draw.choices(lexicon, k=draw.randint(3, 14))
        sentence[0] = sentence[0].capitalize()
        if draw.random() < 0.2:
            sentence[0], sentence[-1] = f"“{sentence[0]}", f"{sentence[-1]},” {draw.choice(lexicon)}"
        if draw.random() < 0.1:
            sentence.append(str(draw.randint(0, 99999)))
        end = draw.choice([". "] * 6 + ["!\n", "? ", ".\n\n", "…\n\n# Chapter\n\n"])
        parts += [*sentence[:-1], sentence[-1] + end]
    return " ".join(parts).replace("  ", " ").replace("\n ", "\n")


@cache
def tokenizer(kind: str = "gpt2", bos: bool = True, eos: bool = True) -> Any:
    """A transformers tokenizer of the given family, trained on `prose`."""
    backend = _untrained(kind)
    if isinstance(backend.model, models.Unigram):
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    elif isinstance(backend.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind in ("gpt2", "llama3") else []
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    # In lines: without a pre-tokenizer that splits, a whole book would be one word to the trainer.
    backend.train_from_iterator(prose(20_000, seed=7).splitlines(keepends=True), trainer)
    names = {"unk_token": "<unk>", "pad_token": "<pad>"}
    if bos:
        names["bos_token"] = "<s>"
    if eos:
        names["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _untrained(kind: str) -> Tokenizer:
    """The pipeline of a family of tokenizers: normalizer, pre-tokenizer, model, decoder."""
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace()
        return backend
    if kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        scheme = "first" if kind == "sentencepiece_first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.ByteLevel() if kind in ("gpt2", "llama3") else decoders.Metaspace()
    return backend


def store(folder: Path, sequence_len: int, n_chunks: int, name: str = "books", document_len: int = 37) -> ChunkStore:
    """A store of `n_chunks` chunks: ids 10, 11, 12, … in documents 0.txt, 1.txt, … of `document_len` ids before EOS."""
    writer = ChunkWriter(folder, name, "all", sequence_len, MARKS)
    left, number, first = n_chunks * (sequence_len - 1), 0, 10
    while left > 0:
        size = max(1, min(document_len, left - 1))
        writer.add(f"{number}.txt", np.arange(first, first + size, dtype=np.int32), True)
        left, number, first = left - size - 1, number + 1, first + size
    assert writer.close().chunks == n_chunks
    return ChunkStore(folder)


_WORDS = [word + " " for word in prose(300, seed=1).split(" ")]
_ODD = [
    "\n",
    "\n\n",
    "  ",
    " " * 9,
    "\t",
    "\r\n",
    " \n",
    "\n  ",
    "12345",
    "1" * 30,
    " " * 30,
    "\n" * 30,
    "a" * 30,
    "…",
    "—",
    "</s>",
    "<s>",
    "日本語",
    "。",
    "🙂",
    "e\u0301",
    "’s",
    "...",
    "ka" * 20,
    "▁",
    "\u00a0",
    "_",
]
# Text that tries a tokenizer: words, runs of blanks, digits and letters, special tokens spelled out, several scripts.
WILD = st.lists(st.one_of(st.sampled_from(_WORDS), st.sampled_from(_ODD)), max_size=250).map("".join)


def whole(kind: str, text: str, **special: bool) -> list[int]:
    """The ids of a text by transformers' own call."""
    ids: list[int] = tokenizer(kind, **special)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def build(folder: Path, **changes: Any) -> Streams[ChunkStore]:
    """`chunks.build` of all text files of a folder."""
    given = {"name": "books", "dataset_type": "textfile", "dataset_path": str(folder / "*.txt"), "sequence_len": 32}
    return chunks.build(**({**given, "tokenizer": tokenizer(), "cache_dir": folder / "cache"} | changes))


def shelve(folder: Path, *texts: str) -> Path:
    """The texts as files 0.txt, 1.txt, … of an emptied folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


MEASURE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.data import chunks
from tests.helpers.data import prose, tokenizer
# Not getrusage's ru_maxrss, which begins at what the process that started this one had.
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
used, folder = tokenizer(), Path({folder!r})
settings = dict(name="books", dataset_type={kind!r}, sequence_len=8192, tokenizer=used, cache_dir=folder / "cache")
(folder / "small.txt").write_text(prose(40_000))
chunks.build(**settings | dict(dataset_type="textfile", dataset_path=str(folder / "small.txt")))
before = peak()
store = chunks.build(**settings, dataset_path=str(folder / {file!r})).train
print(json.dumps([before, peak(), store.report.text_tokens]))
"""


def measure(folder: Path, file: str, megabytes: int) -> tuple[float, float]:
    """(MiB at the peak after 0.3 MB of text, MiB at the peak after `megabytes` of it in one document)."""
    text = prose(100_000, seed=3) + "🙂"  # four bytes a character in memory for the whole text, if it were held
    with open(folder / file, "w", encoding="utf-8") as out:
        out.write('{"text": "' if file.endswith("jsonl") else "")
        for _ in range(megabytes * 10**6 // len(text.encode())):
            out.write(json.dumps(text, ensure_ascii=False)[1:-1] if file.endswith("jsonl") else text)
        out.write('"}' if file.endswith("jsonl") else "")
    kind = "doclist" if file.endswith("jsonl") else "textfile"
    code = MEASURE.format(root=str(ROOT), folder=str(folder), kind=kind, file=file)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500)
    before, after, tokens = json.loads(done.stdout)
    assert tokens > megabytes * 10**5
    return before, after
