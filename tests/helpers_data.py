"""Builders for the tests of the data path: text, tokenizers trained on it, and stores of chunks written to disk."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.data.store import ChunkStore, ChunkWriter, Marks

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


def store(folder: Path, sequence_len: int, chunks: int, name: str = "books", document_len: int = 37) -> ChunkStore:
    """A store of `chunks` chunks: ids 10, 11, 12, … in documents 0.txt, 1.txt, … of `document_len` ids before EOS."""
    writer = ChunkWriter(folder, name, "all", sequence_len, MARKS)
    left, number, first = chunks * (sequence_len - 1), 0, 10
    while left > 0:
        size = max(1, min(document_len, left - 1))
        writer.add(f"{number}.txt", np.arange(first, first + size, dtype=np.int32), True)
        left, number, first = left - size - 1, number + 1, first + size
    assert writer.close().chunks == chunks
    return ChunkStore(folder)
