"""Safetensors as streams: headers read without data, tensors read and written piece by piece.

Takes a file, or the names, dtypes and shapes of a file to be and their bytes in pieces; gives `StoredTensor` entries
that know where their bytes lie, or a file on disk (fsynced) and the SHA-256 of every tensor in it. No more than one
piece is in memory. Format: 8 bytes header length (little-endian), a JSON header, the data without gaps
(https://github.com/huggingface/safetensors#format). dtypes are safetensors' names: `BF16`, `F32`, `I64`, ...
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeGuard

import torch
from safetensors import safe_open

from pipeline.console import UserError
from pipeline.files import in_order, sync_stream
from pipeline.foreign import has_controls, parse_json, printable, read_by_library
from pipeline.formats.dtypes import CODES, FLOATS, ITEM_BITS, TORCH_DTYPES

HEADER_LIMIT = 100_000_000  # bytes; the limit of the reference implementation
MOST_DIMENSIONS, LARGEST = 64, 2**63 - 1  # of torch's tensors; of a size or a place
LONGEST_NAME = 1000  # characters of a tensor's name
PIECE_BYTES = (
    2**20
)  # of a tensor in memory at a time: enough for the speed of a disk, and still in the CPU's cache when hashed
WRITTEN_BYTES = 16 * 2**20  # after so many the disk is told to begin


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `n_bytes` bytes from byte `start` of `file`, counted from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    n_bytes: int

    def matrices(self) -> "Iterator[StoredTensor]":
        """Of a tensor [E, rows, columns], the place of each expert's matrix; any other itself."""
        if len(self.shape) != 3:
            yield self
            return
        n_bytes = self.n_bytes // self.shape[0]
        for expert in range(self.shape[0]):
            yield replace(self, shape=self.shape[1:], start=self.start + expert * n_bytes, n_bytes=n_bytes)


@dataclass(frozen=True)
class Header:
    """A safetensors file without its data. `tensors` are in the order of their bytes."""

    file: Path
    metadata: dict[str, str] | None
    tensors: tuple[StoredTensor, ...]


def read_header(file: Path) -> Header:
    """The header of `file`, checked against the file's size: every byte belongs to exactly one tensor.

    Raises UserError where the file cannot be read, is truncated or damaged, or not safetensors.
    """
    shown = printable(file)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise UserError(f"{shown} is not a whole safetensors file ({size} bytes). Was a download cut short?")
            raw = stream.read(length)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{shown} cannot be read: {reason}.") from None
    entries = parse_json(raw, f"the header of {shown}")
    if not isinstance(entries, dict):
        raise UserError(f"{shown} is not a safetensors file: its header is not a JSON object.")
    metadata = _metadata(shown, entries.pop("__metadata__", None))
    tensors = [_entry(file, name, entry, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.n_bytes))
    _check_layout(shown, tensors, 8 + length, size)
    return Header(file, metadata, tuple(tensors))


def _metadata(shown: str, metadata: object) -> dict[str, str] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{shown}: the header's __metadata__ is not text by name. The file is damaged.")
    return metadata


def _entry(file: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """One tensor of the header. Raises UserError where what is said of it is not what the format asks for."""
    where = f"{printable(file)}: the header's entry '{printable(name)}'"
    if has_controls(name) or len(name) > LONGEST_NAME:
        raise UserError(f"{where} has a name with control characters in it, or a very long one. The file is damaged.")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} is not a dtype, a shape and data_offsets. The file is damaged.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise UserError(f"{where} has the dtype '{printable(dtype, 40)}', which is not known here.")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or math.prod(shape) > LARGEST:
        raise UserError(f"{where} has the shape {printable(shape, 60)}, which no tensor has. The file is damaged.")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(
            f"{where} lies at {printable(offsets, 60)}, which is not a valid byte range. The file is damaged."
        )
    return StoredTensor(name, dtype, tuple(shape), file, data_start + offsets[0], offsets[1] - offsets[0])


def _sizes(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of numbers that count something: whole, not negative, and no true or false."""
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= LARGEST for one in value)


def _check_layout(shown: str, tensors: Sequence[StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.start != position or math.prod(tensor.shape) * ITEM_BITS[tensor.dtype] != tensor.n_bytes * 8:
            raise UserError(f"{shown}: the header places '{printable(tensor.name)}' wrongly. The file is damaged.")
        position += tensor.n_bytes
    if position != size:
        raise UserError(
            f"{shown} has {size} bytes where its header describes {position}. Was a download or a copy cut short?"
        )


def load_tensors(header: Header, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, all or those of `names`, on the CPU, memory mapped where torch can.

    Raises UserError where one of `names` is not in the file, or torch has no such dtype.
    """
    known = {tensor.name for tensor in header.tensors}
    wanted = [tensor.name for tensor in header.tensors] if names is None else list(names)
    if lacking := [name for name in wanted if name not in known]:
        raise UserError(f"{printable(header.file)} holds no tensor '{printable(lacking[0])}'.")
    with read_by_library(f"{printable(header.file)} does not read"), safe_open(header.file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in wanted}


def read_pieces(tensor: StoredTensor, piece_bytes: int = PIECE_BYTES) -> Iterator[bytearray]:
    """The bytes of `tensor` in order, at most `piece_bytes` at a time. Raises UserError where the file ends early."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.n_bytes
        while left:
            piece = bytearray(min(left, piece_bytes))
            if stream.readinto(piece) != len(piece):
                raise UserError(f"{tensor.file} ends within {tensor.name!r}: it changed while it was read.")
            left -= len(piece)
            yield piece


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """The whole of `tensor` in its own dtype and shape, in memory of its own: nothing of the file is mapped.

    Raises UserError where the file ends early or cannot be read, or torch has no such dtype.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise UserError(f"{tensor.file}: {tensor.name!r} is {tensor.dtype}, which torch cannot hold.")
    found = torch.empty(tensor.n_bytes, dtype=torch.uint8)
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            read = stream.readinto(found.numpy().data)
    except OSError as error:
        raise UserError(f"{tensor.file}: {tensor.name!r} cannot be read: {error.strerror}.") from None
    if read != tensor.n_bytes:
        raise UserError(f"{tensor.file} ends within {tensor.name!r}: it changed while it was read.")
    return found.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)


def read_floats(tensor: StoredTensor, row_items: int, piece_items: int) -> Iterator[torch.Tensor]:
    """The values of a floating-point `tensor` in order as [rows, row_items] blocks in its own dtype.

    A block has about `piece_items` values and at least one row; `row_items` must divide the number of values.
    """
    rows = max(1, piece_items // max(1, row_items))
    row_bytes = row_items * ITEM_BITS[tensor.dtype] // 8
    for piece in read_pieces(tensor, max(1, rows * row_bytes)):
        yield torch.frombuffer(piece, dtype=FLOATS[tensor.dtype]).view(-1, row_items)


def pick_rows(tensor: StoredTensor, row_items: int, rows: Iterable[int]) -> Iterator[torch.Tensor]:
    """The chosen rows of a floating-point `tensor`, each [1, row_items], read from their places alone."""
    row_bytes = row_items * ITEM_BITS[tensor.dtype] // 8
    for row in rows:
        one = StoredTensor(
            tensor.name, tensor.dtype, (1, row_items), tensor.file, tensor.start + row * row_bytes, row_bytes
        )
        yield from read_floats(one, row_items, row_items)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of `tensor` as little-endian bytes, row-major, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(
    file: Path,
    specs: Iterable[TensorSpec],
    pieces: Callable[[str], Iterable[bytes | bytearray | memoryview]],
    metadata: Mapping[str, str] | None = None,
    *,
    replace: bool = False,
) -> dict[str, str]:
    """Write a new safetensors file; `pieces(name)` gives a tensor's bytes when its turn comes. fsynced on return.

    Larger item sizes come first (readers view the data in place, which needs alignment), otherwise the order of
    `specs` is kept. Pieces are hashed and written by a thread of their own while the next ones are made, so a piece must
    stay as it is once given. Gives the SHA-256 of each tensor's bytes as they were written. Raises FileExistsError where
    `file` exists (unless `replace`), ValueError where names repeat or a tensor's bytes are not as many as its spec says.
    """
    ordered = sorted(specs, key=lambda spec: -ITEM_BITS[spec.dtype])
    digests = {spec.name: hashlib.sha256() for spec in ordered}
    with file.open("wb" if replace else "xb") as stream:
        stream.write(header_bytes(ordered, metadata))
        with in_order() as beside:
            for spec in ordered:
                given = 0
                for piece in pieces(spec.name):
                    beside(_write_hashed, stream, piece, digests[spec.name])
                    given += len(piece)
                if given != spec.n_bytes:
                    raise ValueError(f"{spec.name!r}: {given} bytes were given for {spec.n_bytes}")
        sync_stream(stream)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write_hashed(stream: BinaryIO, piece: bytes | bytearray | memoryview, digest: "hashlib._Hash") -> None:
    """Write a piece and add it to the digest; from time to time have the disk begin with what was written."""
    stream.write(piece)
    digest.update(piece)
    done = stream.tell()
    if done // WRITTEN_BYTES > (done - len(piece)) // WRITTEN_BYTES and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, done, os.POSIX_FADV_DONTNEED)  # what waits for the disk is sent there


def digests_of(header: Header, advance: Callable[[int], None]) -> dict[str, str]:
    """The SHA-256 of each tensor's bytes as they are in the file, read once; `advance` is told of the bytes."""
    digests = {tensor.name: hashlib.sha256() for tensor in header.tensors}
    with in_order() as beside:
        for tensor in header.tensors:
            for piece in read_pieces(tensor):
                beside(digests[tensor.name].update, piece)
                advance(len(piece))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def write_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, replace: bool = False
) -> None:
    """`write_safetensors` of tensors in memory, of any dtype, shape and device. Its mode is what the umask says.

    safetensors' own `save_file` gives the mode 0600, leaves a temporary file when it is killed, and does not fsync.
    """
    specs = [TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(file, specs, lambda name: [tensor_bytes(tensors[name])], metadata, replace=replace)


def header_bytes(ordered: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for spec in ordered:
        if spec.name in entries or spec.name == "__metadata__":
            raise ValueError(f"the name {spec.name!r} is taken")
        end = position + spec.n_bytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8, so that wide items are aligned
    return len(text).to_bytes(8, "little") + text


def forget_cached(file: Path) -> None:
    """Ask the system to drop its cached copy of `file`, so that the next read comes from the disk (where it can)."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
