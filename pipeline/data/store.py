"""Takes a token stream as it comes; gives it back as a memory-mapped store of chunks, each with the documents it holds.

The stream is the documents' ids one after the other, each closed by EOS. A chunk is `sequence_len` ids: BOS (where the
tokenizer has one) and then the next stretch of the stream. What does not fill a last chunk is counted, not stored. So
nothing overlaps, nothing is padded, and text ids + EOS = chunks · (sequence_len − BOS) + tail.

On disk a store is a folder: `chunks.arrow` (int32, fixed-size lists), `documents.arrow` (name, first place in the
stream) and `report.json`. The chunks stay on disk: a run holds no more of them than the pages it touches.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.console import UserError
from pipeline.data.arrow_files import ArrowFile, numbers, opened
from pipeline.data.reading.encodings import Findings
from pipeline.data.row_store import DocumentSpan, RowStore
from pipeline.files import write_json

BATCH_TOKENS = 2**20  # in one Arrow record batch
BATCH_DOCUMENTS = 2**16
_MEND = "delete the folder above it to have it built again"
_COUNTS = ("documents", "empty_documents", "text_tokens", "special_tokens", "unknown_tokens", "eos_tokens", "chunks")
_DOCUMENTS = pa.schema([("name", pa.string()), ("start", pa.int64())])


@dataclass(frozen=True)
class Report:
    """What became of a dataset's text. All `*_tokens` are counts of ids; `stream` is 'all', 'train' or 'eval'."""

    name: str
    stream: str
    sequence_len: int
    bos: int | None
    eos: int
    documents: int
    empty_documents: int
    text_tokens: int
    special_tokens: int  # of these, BOS, EOS and the like that the text itself spells out
    unknown_tokens: int  # of these, what the tokenizer does not know
    eos_tokens: int
    chunks: int
    tail_tokens: int
    largest_id: int  # in the chunks
    sha256: str  # of the chunks
    findings: Findings  # of the whole dataset's text

    def check(self) -> None:
        """UserError if the text does not fill one chunk."""
        if self.chunks:
            return
        of_stream = "" if self.stream == "all" else f" held for '{self.stream}'"
        raise UserError(
            f"dataset '{self.name}': {self.documents:,} documents{of_stream} give {self.tail_tokens:,} tokens, fewer than "
            f"the {self.sequence_len - (self.bos is not None):,} that one chunk of sequence_len = {self.sequence_len:,} "
            f"needs: add text or lower sequence_len"
        )

    def __str__(self) -> str:
        """One line, as an equation."""
        stream = "" if self.stream == "all" else f" ({self.stream})"
        bos = "after BOS" if self.bos is not None else "no BOS, the tokenizer has none"
        line = (
            f"{self.name}{stream}: {self.documents:,} documents, {self.text_tokens:,} tokens + {self.eos_tokens:,} EOS "
            f"= {self.chunks:,} chunks × {self.sequence_len - (self.bos is not None):,} ({bos}) "
            f"+ {self.tail_tokens:,} dropped from the tail"
        )
        if self.empty_documents:
            line += f"; {self.empty_documents:,} empty documents left out"
        if self.special_tokens:
            line += f"; {self.special_tokens:,} special tokens are spelled out in the text"
        if self.unknown_tokens:
            line += f"; {self.unknown_tokens:,} tokens are unknown to the tokenizer"
        return line if self.stream == "eval" else line + str(self.findings)


class Marks(NamedTuple):
    """A tokenizer's special ids: BOS and unknown (None if it has none), EOS, and all the others."""

    bos: int | None
    eos: int
    unknown: int | None
    others: tuple[int, ...]


class ChunkWriter:
    """Writes one stream into `folder`: `add` segments in order, then `close` for the report."""

    def __init__(self, folder: Path, name: str, stream: str, sequence_len: int, marks: Marks) -> None:
        folder.mkdir(parents=True)
        self.folder, self.name, self.stream, self.sequence_len = folder, name, stream, sequence_len
        self.bos, self.eos = marks.bos, marks.eos
        self.unknown = -1 if marks.unknown is None else marks.unknown
        self.special = [id for id in (marks.bos, marks.eos, *marks.others) if id is not None and id != marks.unknown]
        self.body = sequence_len - (marks.bos is not None)
        self.rows = max(1, BATCH_TOKENS // sequence_len)
        self.pending: list[NDArray[np.int32]] = []
        self.pending_tokens = 0
        self.in_document = 0  # ids of the document that is being added
        self.ends_in_eos = False
        self.names: list[str] = []
        self.starts: list[int] = []
        self.counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
        self.largest_id = 0
        self.content = hashlib.sha256()
        schema = pa.schema([("input_ids", pa.list_(pa.int32(), sequence_len))])
        self._chunks = ArrowFile(folder / "chunks.arrow", schema)
        self._documents = ArrowFile(folder / "documents.arrow", _DOCUMENTS)

    def add(self, name: str, ids: NDArray[np.int32], last: bool) -> None:
        """The next segment of document `name`; `last` closes it with EOS, unless the text itself ends in EOS.

        BOS spelled out at the beginning of a document is left out: chunks open with BOS, not documents.
        """
        if not self.in_document and len(ids) and ids[0] == self.bos:
            ids = ids[1:]
        if len(ids):
            if not self.in_document:
                self._open_document(name)
            self.in_document += len(ids)
            self.ends_in_eos = bool(ids[-1] == self.eos)
            self.counts["text_tokens"] += len(ids)
            self._append(ids)
        if last:
            if not self.in_document:
                self.counts["empty_documents"] += 1
            elif not self.ends_in_eos:
                self.counts["eos_tokens"] += 1
                self._append(np.array([self.eos], dtype=np.int32))
            self.in_document = 0

    def close(self, findings: Findings | None = None) -> Report:
        """Write what is left, make the files durable.

        `findings`: what was met in reading the text, for the report.
        """
        tail = self._write_chunks(self.pending_tokens // self.body)
        self._count(self.pending[0])
        self.counts["special_tokens"] -= self.counts["eos_tokens"]  # which the text does not spell out
        self._write_documents()
        self._chunks.close()
        self._documents.close()
        report = Report(
            name=self.name,
            stream=self.stream,
            sequence_len=self.sequence_len,
            bos=self.bos,
            eos=self.eos,
            tail_tokens=tail,
            largest_id=self.largest_id,
            sha256=self.content.hexdigest(),
            findings=findings or Findings(),
            **self.counts,
        )
        sizes = {file.name: file.stat().st_size for file in self.folder.glob("*.arrow")}
        write_json(self.folder / "report.json", {"report": asdict(report), "sizes": sizes}, indent=1)
        return report

    def let_go(self) -> None:
        """Close the files as they are. Of a store that is given up, the room is free once nobody holds them open."""
        for file in (self._chunks, self._documents):
            file.let_go()

    def _open_document(self, name: str) -> None:
        self.starts.append(self.counts["chunks"] * self.body + self.pending_tokens)
        self.names.append(name)
        self.counts["documents"] += 1
        if len(self.names) == BATCH_DOCUMENTS:
            self._write_documents()

    def _append(self, ids: NDArray[np.int32]) -> None:
        self.pending.append(ids)
        self.pending_tokens += len(ids)
        while self.pending_tokens >= self.rows * self.body:
            self._write_chunks(self.rows)

    def _count(self, stream: NDArray[np.int32]) -> None:
        """What there is of special and unknown ids in the stream's next stretch, with the EOS that were added."""
        special = np.isin(stream, self.special) if len(stream) else np.zeros(0, bool)
        self.counts["special_tokens"] += int(special.sum())
        self.counts["unknown_tokens"] += int((stream == self.unknown).sum())

    def _write_chunks(self, count: int) -> int:
        """Write the first `count` chunks of what is pending; gives the number of ids then still pending."""
        stream = np.concatenate(self.pending) if self.pending else np.empty(0, np.int32)
        if count:
            self._count(stream[: count * self.body])
            body = stream[: count * self.body].reshape(count, self.body)
            rows = body if self.bos is None else np.insert(body, 0, self.bos, axis=1)
            rows = np.ascontiguousarray(rows, dtype="<i4")
            self.content.update(rows.tobytes())
            self.largest_id = max(self.largest_id, int(rows.max()))
            values = pa.array(rows.reshape(-1), pa.int32())
            self._chunks.write([pa.FixedSizeListArray.from_arrays(values, self.sequence_len)])
        rest = stream[count * self.body :].copy()
        self.pending, self.pending_tokens = [rest], len(rest)
        self.counts["chunks"] += count
        return len(rest)

    def _write_documents(self) -> None:
        if self.names:
            self._documents.write([pa.array(self.names, pa.string()), pa.array(self.starts, pa.int64())])
            self.names, self.starts = [], []


class ChunkStore:
    """A written store, memory-mapped, as rows (row_store.py): each is one chunk, int32 [T], read-only.

    All rows have `sequence_len` tokens, of which all but the first are targets.
    """

    def __init__(self, folder: Path) -> None:
        """UserError if a file is missing or has not the size it was written with."""
        try:
            content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            sizes = {name: (folder / name).stat().st_size for name in content["sizes"]}
            self.report = Report(**content["report"] | {"findings": Findings(**content["report"]["findings"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: not a whole store of chunks ({error}); {_MEND}") from None
        if sizes != content["sizes"]:
            raise UserError(f"{folder}: files have not the size they were written with; {_MEND}")
        self.name, self.sequence_len = self.report.name, self.report.sequence_len
        self.bos, self.eos, self.content_hash = self.report.bos, self.report.eos, self.report.sha256
        # One number, seen as N: of millions of chunks nothing is held.
        self.lengths: NDArray[np.int64] = np.broadcast_to(np.int64(self.sequence_len), (len(self),))
        self.targets: NDArray[np.int64] = np.broadcast_to(np.int64(self.sequence_len - 1), (len(self),))
        self.groups = self.width = None
        self.reaches = self.lengths
        self._chunks = opened(folder / "chunks.arrow")
        self._rows = max(1, BATCH_TOKENS // self.sequence_len)
        documents = opened(folder / "documents.arrow").read_all()
        self._names = documents["name"]
        self._starts: NDArray[np.int64] = numbers(documents["start"])

    @property
    def slots(self) -> tuple[RowStore, ...]:
        """Each row is by itself."""
        return (self,)

    def __len__(self) -> int:
        return self.report.chunks

    def ids(self, chunk: int) -> NDArray[np.int32]:
        """The chunk's tokens, int32 [sequence_len]; IndexError if there is no such chunk."""
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk} of {len(self)} in '{self.name}'")
        batch, row = divmod(int(chunk), self._rows)
        column = self._chunks.get_batch(batch).column(0)
        ids: NDArray[np.int32] = numbers(column.values)
        return ids[row * self.sequence_len : (row + 1) * self.sequence_len]

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        """All but the first place is trained."""
        return [(1, self.sequence_len)]

    def restarts(self, chunk: int) -> list[int]:
        """Positions run through a chunk."""
        return [0]

    def documents(self, chunk: int) -> list[DocumentSpan]:
        """The documents of chunk `chunk` in order; together they cover it but for its BOS."""
        bos = int(self.report.bos is not None)
        body = self.sequence_len - bos
        begin, end = chunk * body, (chunk + 1) * body
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        after = int(np.searchsorted(self._starts, end, side="left"))
        edges = [max(begin, int(start)) - begin + bos for start in self._starts[first:after]] + [self.sequence_len]
        return [
            DocumentSpan(self._names[document].as_py(), edges[i], edges[i + 1], bool(self._starts[document] < begin))
            for i, document in enumerate(range(first, after))
        ]

    def facts(self) -> dict[str, Any]:
        """For run.json: documents, tokens (without BOS and EOS) and chunks of the whole text."""
        report = self.report
        return {
            "documents": report.documents,
            "tokens": report.text_tokens,
            "chunks": report.chunks,
            "sequence_len": report.sequence_len,
        }
