"""What a fold reads and writes, counted: every byte of the base once, every byte of the result once written, once read back."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts.fold import merge as merge_module
from pipeline.artifacts.fold import rows as fold_rows
from pipeline.artifacts.fold.merge import merge
from pipeline.formats import safetensors
from pipeline.formats.base_model import read_base
from pipeline.formats.safetensors import StoredTensor
from tests.helpers.artifacts import down_proj, make_base, multiplicative

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[StoredTensor], Counter[Path]]:
    """Bytes read of whole tensors (the fingerprint looks at single rows), and bytes written by file name."""
    read: Counter[StoredTensor] = Counter()
    written: Counter[Path] = Counter()
    real_read, real_write = safetensors.read_pieces, safetensors._write_hashed

    def read_pieces(tensor: StoredTensor, *size: int) -> Any:
        for piece in real_read(tensor, *size):
            read[tensor] += len(piece)
            yield piece

    def write(stream: Any, piece: Any, digest: Any) -> None:
        written[Path(stream.name).name] += len(piece)
        real_write(stream, piece, digest)

    monkeypatch.setattr(safetensors, "read_pieces", read_pieces)
    monkeypatch.setattr(merge_module, "read_pieces", read_pieces)
    monkeypatch.setattr(safetensors, "_write_hashed", write)
    return read, written


@pytest.mark.parametrize("held", [True, False])
def test_each_byte_is_read_and_written_once(tmp_path: Path, monkeypatch, counted, held: bool) -> None:
    """A multiplicative weight above HELD_BYTES is read for A·W, for the fold, and for the check's own A·W in fp64."""
    read, written = counted
    make_base(tmp_path / "base")
    multiplicative(tmp_path / "adapter")
    if not held:
        monkeypatch.setattr(fold_rows, "HELD_BYTES", 0)
    read.clear(), written.clear()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base = read_base(tmp_path / "base")
    changed = {f"{module}.weight" for module in down_proj()}
    assert changed < base.tensors.keys()
    for name, tensor in base.tensors.items():
        assert read[tensor] == tensor.n_bytes * (1 if held or name not in changed else 3)
    # The fold's files had another folder while they were written.
    back = Counter({t.name: n for t, n in read.items() if tmp_path / "base" != t.file.parent and t.n_bytes == n})
    result = read_base(tmp_path / "out")
    assert back == {t.name: t.n_bytes for t in result.tensors.values()}
    assert written == {name: sum(t.n_bytes for t in header.tensors) for name, header in result.headers.items()}
