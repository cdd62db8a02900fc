"""Takes a dataset's files and the tokenizer; gives its chunks, from the cache (cache.py) if these very files were cut before."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import UserError, gib, progress
from pipeline.data.preparing import cache, workers
from pipeline.data.preparing.journal import Journal
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
    processes: int | None = None,
    kind: type[ChunkStore] = ChunkStore,
) -> Streams[ChunkStore]:
    """The chunks of a dataset, tokenised now or found in `cache_dir`. One process at a time builds, the others wait.

    A preparation that was killed goes on where it was. `processes`: how many tokenise; None is one a core for large files.

    With `eval_split = 'document'` and an `eval_size` (a part of the documents, rounded up, or their number), whole
    documents drawn by a fixed seed are held out as a stream of their own. `join_lines`: join the line breaks that wrap
    paragraphs (line_breaks.py). `field_text`: of rows, what holds the text. `kind`: as what the chunks are opened. UserError: no
    files, unreadable text, a tokenizer without EOS, too little text for one chunk, nothing left on one side of the split.
    """
    if eval_split not in EVAL_SPLITS:
        raise UserError(f"dataset '{name}': eval_split = '{eval_split}' is not known; use {' or '.join(EVAL_SPLITS)}")
    marks = checked_marks(tokenizer, name, sequence_len)
    sources = find(dataset_type, dataset_path)
    held_out = eval_size if eval_split == "document" else 0
    settings = [*marks, sequence_len, held_out, join_lines, field_text]
    path = cache.folder(cache_dir, name, sources, [FORMAT, BATCH_TOKENS, fingerprint(tokenizer), settings])
    with cache.alone(path):
        if not path.exists():
            text = _Text(sources, join_lines, field_text)
            _write(path, name, text, sequence_len, tokenizer, marks, held_out, processes)
    return load(path, kind)


def load(path: Path, kind: type[ChunkStore] = ChunkStore) -> Streams[ChunkStore]:
    """The streams that `build` left at `path`. UserError if they are not there or not whole."""
    if (path / "all").exists():
        return Streams(kind(path / "all"))
    return Streams(kind(path / "train"), kind(path / "eval"))


def checked_marks(tokenizer: Any, name: str, sequence_len: int) -> Marks:
    """The ids that mark the stream. UserError as for `special_ids`, and where chunks of this length have nothing to predict."""
    marks = special_ids(tokenizer, name)
    if sequence_len < 2 + (marks.bos is not None):
        raise UserError(f"dataset '{name}': sequence_len = {sequence_len} leaves nothing to predict; use 3 or more")
    return marks


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


@dataclass(frozen=True)
class _Text:
    """The text of a dataset: its files, and how they are read."""

    sources: list[Source]
    join_lines: bool
    field: str

    def read(self, findings: Findings, first: int = 0) -> Iterator[Document]:
        """The documents of the files from number `first` on."""
        yield from documents.read_sources(
            self.sources[first:], join_lines=self.join_lines, findings=findings, field=self.field
        )


def _write(
    path: Path,
    name: str,
    text: _Text,
    sequence_len: int,
    tokenizer: Any,
    marks: Marks,
    held_out: float | int,
    processes: int | None,
) -> None:
    """Tokenise and cut into `path`, which appears when it is whole."""
    total = documents.text_bytes(text.sources, text.field)
    needed = f"about {gib(8 / 3 * total)}"  # twice 4 bytes a token, of which few have less than 3 bytes of text
    journal = Journal(path)
    with cache.whole(path, needed) as staging, ExitStack() as clearing:
        names = ("train", "eval") if held_out else ("all",)
        writers = [ChunkWriter(staging / stream, name, stream, sequence_len, marks) for stream in names]
        clearing.callback(journal.let_go)
        for writer in writers:
            clearing.callback(writer.let_go)
        is_held_out = _draw_documents(name, text, held_out)
        findings, number = Findings(), 0
        with progress(f"tokenising {name}", total) as advance:
            advance_by = _Advance(total, advance)
            ids_of = _ids(text, tokenizer, journal, findings, advance_by, workers.processes_for(total, processes))
            for document, ids, last in ids_of:
                writers[int(is_held_out[number]) if held_out else 0].add(document, ids, last)
                number += last
            advance_by(total)
        for writer in writers:
            writer.close(findings).check()
    journal.clear()


def write(
    staging: Path, name: str, documents: Iterator[Document], sequence_len: int, tokenizer: Any, findings: Findings
) -> None:
    """Tokenise and cut these documents into `staging`: chunks that may be none. `findings`: of the text so far."""
    writer = ChunkWriter(staging, name, "all", sequence_len, special_ids(tokenizer, name))
    with ExitStack() as clearing:
        clearing.callback(writer.let_go)
        for document, ids, last in tokens(tokenizer, documents):
            writer.add(document, ids, last)
        writer.close(findings)


def _ids(
    text: _Text, tokenizer: Any, journal: Journal, findings: Findings, advance: Callable[[int], None], processes: int
) -> Iterator[tuple[str, NDArray[np.int32], bool]]:
    """(document's name, ids of its next segment, whether it is its last): what the journal has, then what goes into it.

    What reading the text meets is counted in `findings`, whether it is read now or was before.
    """
    for (document, last, size), ids in journal.kept():
        advance(size)
        yield document, ids, last
    file, done, met = journal.place or (0, 0, asdict(findings))
    findings.__dict__.update(met)
    places: deque[tuple[Any, list[int]]] = deque()  # of each document that is read: where it ends, its bytes
    read = _placed(text, findings, file, done, places)
    for document, ids, last in tokens(tokenizer, read, processes):
        place, size = places[0]
        journal.add((document, last, size[0] if last else 0), ids)
        if last:
            places.popleft()
            advance(size[0])
            journal.reached(place)
        yield document, ids, last


def _placed(
    text: _Text, findings: Findings, file: int, done: int, places: deque[tuple[Any, list[int]]]
) -> Iterator[Document]:
    """The documents from number `done` of file number `file` on; each leaves its place and, once read, its size in `places`.

    A place is a file's number, how many of its documents are done, and the findings before it.
    """

    def pieces(document: Document, size: list[int]) -> Iterator[str]:
        for piece in document.pieces():
            size[0] += len(piece.encode("utf-8"))
            yield piece

    for number in range(file, len(text.sources)):
        before = asdict(findings)
        alone = replace(text, sources=text.sources[number : number + 1])
        for count, document in enumerate(alone.read(findings), 1):
            if (number, count) <= (file, done):
                for _ in document.pieces():  # for its findings
                    pass
                continue
            size = [0]
            places.append(((number, count, before), size))
            yield Document(document.name, partial(pieces, document, size))


def _draw_documents(name: str, text: _Text, held_out: float | int) -> NDArray[np.bool_]:
    """Which documents, by number, are held out: drawn with the fixed seed of all splits."""
    if not held_out:
        return np.zeros(0, bool)
    total = sum(1 for _ in documents.read_sources(text.sources, field=text.field))
    count = held_out_count(held_out, total, f"dataset '{name}'", "documents")
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(SEED).permutation(total)[:count]] = True
    return drawn


class _Advance:
    """Moves a bar of `total` by bytes of text, never beyond its end."""

    def __init__(self, total: int, advance: Callable[[int], None]) -> None:
        self._left, self._advance = total, advance

    def __call__(self, step: int) -> None:
        step = min(step, self._left)
        self._left -= step
        self._advance(step)
