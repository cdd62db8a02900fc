"""Takes a store of chunks (data/store.py); gives the same chunks with their documents kept apart.

Positions begin again where a document begins within a chunk, by which transformers lets it see nothing of those before it
(model/trial/packing_check.py makes sure of that); its first token is no target. What goes on from the chunk before begins with
the chunk, as ever; a document right behind BOS has it as its own.
"""

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import ChunkStore


class ApartChunks(ChunkStore):
    """The chunks in a folder, as `ChunkStore`, whose documents do not see each other."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        body = self.sequence_len - (self.bos is not None)
        within = self._starts[(self._starts % body != 0) & (self._starts < len(self) * body)]
        self.targets: NDArray[np.int64] = self.targets - np.bincount(within // body, minlength=len(self))
        edges = np.union1d(np.append(self._starts, 0), np.arange(len(self) + 1) * body)
        edges = edges[edges <= len(self) * body]
        bos = (edges[:-1] % body == 0) & (self.bos is not None)
        firsts = np.searchsorted(edges, np.arange(len(self)) * body)
        self.reaches = np.maximum.reduceat(np.diff(edges) + bos, firsts)
        self.content_hash = hashlib.sha256(f"documents apart {self.content_hash}".encode()).hexdigest()

    def spans(self, chunk: int) -> list[tuple[int, int]]:
        """All but the first place of the chunk, and of each document in it, is trained."""
        edges = [*self.restarts(chunk), self.sequence_len]
        runs = [(start + 1, end) for start, end in pairwise(edges)]
        return [(start, end) for start, end in runs if start < end]

    def restarts(self, chunk: int) -> list[int]:
        """Where the chunk, and where a document within it, begins."""
        return [0, *(document.start for document in self.documents(chunk)[1:])]

    def facts(self) -> dict[str, Any]:
        """As those of any chunks, and that documents are kept apart."""
        return super().facts() | {"document_mask": True}
