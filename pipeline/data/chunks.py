"""Takes a dataset's files and the tokenizer; gives its chunks, from the cache (cache.py) if these very files were cut before."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError, gib, progress
from pipeline.data import cache
from pipeline.data.reading import documents
from pipeline.data.reading.documents import Document
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.sources import Source, find
from pipeline.data.selection import SEED, Streams, held_out_count
from pipeline.data.store import BATCH_TOKENS, ChunkStore, ChunkWriter, Marks
from pipeline.data.tokenizer import fingerprint, tokens

FORMAT = 2  # goes into the key: raise it when the same input would give other chunks
EVAL_SPLITS = ("chunk", "document")


def build(
    *,
    name: str,
    dataset_type: str,
    dataset_path: str,
    sequence_len: int,
    tokenizer: Any,
    cache_dir: Path,
    eval_size: float | int = 0,
    eval_split: str = "chunk",
    join_lines: bool = False,
    field_text: str = "text",
    kind: type[ChunkStore] = ChunkStore,
) -> Streams[ChunkStore]:
    """The chunks of a dataset, tokenised now or found in `cache_dir`. One process at a time builds, the others wait.

    With `eval_split = 'document'` and an `eval_size` (a part of the documents, rounded up, or their number), whole
    documents drawn by a fixed seed are held out as a stream of their own. `join_lines`: join the line breaks that wrap
    paragraphs (line_breaks.py). `field_text`: of rows, what holds the text. `kind`: as what the chunks are opened. UserError: no
    files, unreadable text, a
    tokenizer without EOS, too little text for one chunk, nothing left on one side of the split.
    """
    if eval_split not in EVAL_SPLITS:
        raise UserError(f"dataset '{name}': eval_split = '{eval_split}' is not known; use {' or '.join(EVAL_SPLITS)}")
    marks = special_ids(tokenizer, name)
    if sequence_len < 2 + (marks.bos is not None):
        raise UserError(f"dataset '{name}': sequence_len = {sequence_len} leaves nothing to predict; use 3 or more")
    sources = find(dataset_type, dataset_path)
    held_out = eval_size if eval_split == "document" else 0
    settings = [*marks, sequence_len, held_out, join_lines, field_text]
    path = cache.folder(cache_dir, name, sources, [FORMAT, BATCH_TOKENS, fingerprint(tokenizer), settings])
    with cache.alone(path):
        if not path.exists():
            _write(path, name, sources, sequence_len, tokenizer, marks, held_out, join_lines, field_text)
    return load(path, kind)


def load(path: Path, kind: type[ChunkStore] = ChunkStore) -> Streams[ChunkStore]:
    """The streams that `build` left at `path`. UserError if they are not there or not whole."""
    if (path / "all").exists():
        return Streams(kind(path / "all"))
    return Streams(kind(path / "train"), kind(path / "eval"))


def special_ids(tokenizer: Any, name: str) -> Marks:
    """The ids that mark the stream. UserError if the tokenizer has no EOS, since nothing would then end a document."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"dataset '{name}': the tokenizer has no EOS token, which closes each document: set \"eos_token\" in the "
            f"model's tokenizer_config.json"
        )
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = None if tokenizer.unk_token_id in named else tokenizer.unk_token_id
    return Marks(tokenizer.bos_token_id, tokenizer.eos_token_id, unknown, tuple(sorted(tokenizer.all_special_ids)))


def _write(
    path: Path,
    name: str,
    sources: list[Source],
    sequence_len: int,
    tokenizer: Any,
    marks: Marks,
    held_out: float | int,
    join_lines: bool,
    field_text: str,
) -> None:
    """Tokenise and cut into `path`, which appears when it is whole."""
    total = documents.text_bytes(sources, field_text)
    needed = f"about {gib(4 / 3 * total)}"  # 4 bytes a token, of which few have less than 3 bytes of text
    with cache.whole(path, needed) as staging, ExitStack() as clearing:
        names = ("train", "eval") if held_out else ("all",)
        writers = [ChunkWriter(staging / stream, name, stream, sequence_len, marks) for stream in names]
        for writer in writers:
            clearing.callback(writer.let_go)
        is_held_out = _draw_documents(name, sources, held_out, field_text)
        findings = Findings()
        read = documents.read_sources(sources, join_lines=join_lines, findings=findings, field=field_text)
        with progress(f"tokenising {name}", total) as advance:
            number = 0
            for document, ids, last in tokens(tokenizer, _counted(read, total, advance)):
                writers[int(is_held_out[number]) if held_out else 0].add(document, ids, last)
                number += last
        for writer in writers:
            writer.close(findings)


def _draw_documents(name: str, sources: list[Source], held_out: float | int, field: str) -> NDArray[np.bool_]:
    """Which documents, by number, are held out: drawn with the fixed seed of all splits."""
    if not held_out:
        return np.zeros(0, bool)
    total = sum(1 for _ in documents.read_sources(sources, field=field))
    count = held_out_count(held_out, total, f"dataset '{name}'", "documents")
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(SEED).permutation(total)[:count]] = True
    return drawn


def _counted(read: Iterator[Document], total: int, advance: Callable[[int], None]) -> Iterator[Document]:
    """The same documents; advances the bar by the bytes of text read, up to `total`, and to its end after the last."""
    done = 0

    def pieces(document: Document) -> Iterator[str]:
        nonlocal done
        for piece in document.pieces():
            step = min(len(piece.encode("utf-8")), total - done)
            done += step
            advance(step)
            yield piece

    for document in read:
        yield Document(document.name, partial(pieces, document))
    advance(total - done)
