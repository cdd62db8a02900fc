"""Takes a dataset's files and the tokenizer; gives its chunks, from the cache if these very files were cut before.

The cache is keyed by the content of the files, the tokenizer and the settings. It is built by one process, the others
wait; a store appears under its name when it is whole, or not at all.
"""

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError, gib, progress, rank
from pipeline.data.reading import documents
from pipeline.data.reading.documents import Document
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.sources import Source, find
from pipeline.data.selection import SEED, Streams, held_out_count
from pipeline.data.store import BATCH_TOKENS, ChunkStore, ChunkWriter, Marks
from pipeline.data.tokenizer import fingerprint, tokens
from pipeline.files import explain_out_of_space, rename
from pipeline.foreign import printable

FORMAT = 2  # goes into the key: raise it when the same input would give other chunks
LET_FIRST_RANK_S = 5.0
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
) -> Streams[ChunkStore]:
    """The chunks of a dataset, tokenised now or found in `cache_dir`. One process at a time builds, the others wait.

    With `eval_split = 'document'` and an `eval_size` (a part of the documents, rounded up, or their number), whole
    documents drawn by a fixed seed are held out as a stream of their own. `join_lines`: join the line breaks that wrap
    paragraphs (line_breaks.py). UserError: no files, unreadable text, a tokenizer without EOS, too little text for one
    chunk, nothing left on one side of the split.
    """
    if eval_split not in EVAL_SPLITS:
        raise UserError(f"dataset '{name}': eval_split = '{eval_split}' is not known; use {' or '.join(EVAL_SPLITS)}")
    marks = special_ids(tokenizer, name)
    if sequence_len < 2 + (marks.bos is not None):
        raise UserError(f"dataset '{name}': sequence_len = {sequence_len} leaves nothing to predict; use 3 or more")
    sources = find(dataset_type, dataset_path)
    held_out = eval_size if eval_split == "document" else 0
    key = _key(name, sources, fingerprint(tokenizer), [*marks, sequence_len, held_out, join_lines])
    path = cache_dir / f"{_folder_name(name)}-{key}"
    with explain_out_of_space(path):
        cache_dir.mkdir(parents=True, exist_ok=True)
    with explain_out_of_space(path), _alone(cache_dir, path):
        if not path.exists():
            _write(path, name, sources, sequence_len, tokenizer, marks, held_out, join_lines)
    return load(path)


def load(path: Path) -> Streams[ChunkStore]:
    """The streams that `build` left at `path`. UserError if they are not there or not whole."""
    if (path / "all").exists():
        return Streams(ChunkStore(path / "all"))
    return Streams(ChunkStore(path / "train"), ChunkStore(path / "eval"))


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


def _key(name: str, sources: list[Source], tokenizer: str, settings: list[Any]) -> str:
    """Names the content: 20 hex digits of the SHA-256 of all that decides the chunks and their documents' names."""
    total = sum(path.stat().st_size for path, _ in sources)
    files = []
    with progress(f"checking {name}", total) if total > 2**30 else nullcontext(lambda n: None) as advance:
        for path, file_name in sources:
            try:
                with open(path, "rb") as file:
                    files.append((file_name, hashlib.file_digest(file, "sha256").hexdigest()))
                    advance(file.tell())
            except OSError as error:
                raise UserError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    content = [FORMAT, name, files, tokenizer, settings, BATCH_TOKENS]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _write(
    path: Path,
    name: str,
    sources: list[Source],
    sequence_len: int,
    tokenizer: Any,
    marks: Marks,
    held_out: float | int,
    join_lines: bool,
) -> None:
    """Tokenise and cut into `path`, which appears when it is whole."""
    staging = path.with_name(f".staging-{path.name}")
    shutil.rmtree(staging, ignore_errors=True)  # a killed process's; no other can be at work here now
    total = documents.text_bytes(sources)
    needed = f"about {gib(4 / 3 * total)}"  # 4 bytes a token, of which few have less than 3 bytes of text
    with explain_out_of_space(path, needed), ExitStack() as clearing:
        clearing.callback(shutil.rmtree, staging, ignore_errors=True)
        names = ("train", "eval") if held_out else ("all",)
        writers = [ChunkWriter(staging / stream, name, stream, sequence_len, marks) for stream in names]
        for writer in writers:
            clearing.callback(writer.let_go)
        is_held_out = _draw_documents(name, sources, held_out)
        findings = Findings()
        read = documents.read_sources(sources, join_lines=join_lines, findings=findings)
        with progress(f"tokenising {name}", total) as advance:
            number = 0
            for document, ids, last in tokens(tokenizer, _counted(read, total, advance)):
                writers[int(is_held_out[number]) if held_out else 0].add(document, ids, last)
                number += last
        for writer in writers:
            writer.close(findings)
        rename(staging, path)


def _draw_documents(name: str, sources: list[Source], held_out: float | int) -> NDArray[np.bool_]:
    """Which documents, by number, are held out: drawn with the fixed seed of all splits."""
    if not held_out:
        return np.zeros(0, bool)
    total = sum(1 for _ in documents.read_sources(sources))
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


@contextmanager
def _alone(cache_dir: Path, path: Path) -> Iterator[None]:
    """Hold the cache's lock; the system frees it when a process dies, however it dies.

    Where `path` has to be built, other ranks give the first some seconds to begin: it is the one that shows progress.
    """
    with open(cache_dir / ".lock", "a") as file:
        patience = time.monotonic() + (LET_FIRST_RANK_S if rank() else 0)
        while time.monotonic() < patience and not path.exists() and not _is_held(file):
            time.sleep(0.02)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64] or "dataset"
