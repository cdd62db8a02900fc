"""Files in pieces: bounded, whole or not at all, and neither end waits for ever for the other's disk."""

import os
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline import files
from pipeline.training.nodes import pieces


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> deque[torch.Tensor]:
    """What was sent and not received; a receiver that expects another size than was sent fails."""
    sent: deque[torch.Tensor] = deque()
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces.dist, "send", lambda piece, to, group: sent.append(piece.clone()))
    monkeypatch.setattr(pieces.dist, "recv", lambda piece, sender, group: piece.copy_(sent.popleft()))
    return sent


@pytest.mark.parametrize("size", [0, 1, 1000, 2500])
def test_a_file_arrives_in_bounded_pieces(tmp_path: Path, wire: deque[torch.Tensor], size: int) -> None:
    (tmp_path / "a").write_bytes(os.urandom(size))
    pieces.send(tmp_path / "a", size, 0, None)
    assert [len(piece) for piece in wire] == [1000] * (size // 1000) + [size % 1000] * (size % 1000 > 0)
    pieces.receive(tmp_path / "b", size, 1, None)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_cannot_be_read_is_said_when_all_has_gone(tmp_path: Path, wire: deque[torch.Tensor]) -> None:
    (tmp_path / "short").write_bytes(b"x" * 1500)
    for name in ("missing", "short"):
        with pytest.raises(OSError, match=name):
            pieces.send(tmp_path / name, 2500, 0, None)
        assert [len(piece) for piece in wire] == [1000, 1000, 500]
        wire.clear()


def test_what_cannot_be_written_is_said_when_all_has_come(
    tmp_path: Path, wire: deque[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"x" * 2500)
    pieces.send(tmp_path / "a", 2500, 0, None)
    with pytest.raises(OSError, match="No such file"):
        pieces.receive(tmp_path / "no folder" / "b", 2500, 1, None)
    assert not wire
    monkeypatch.setattr(pieces, "sync_stream", full)
    pieces.send(tmp_path / "a", 2500, 0, None)
    with pytest.raises(OSError, match="No space"):
        pieces.receive(tmp_path / "b", 2500, 1, None)
    assert not wire
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_which_disks_no_other_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mounted(**kinds: str) -> None:
        mounts = [
            psutil._ntuples.sdiskpart("x", {"root": "/", "here": str(tmp_path)}[k], v, "") for k, v in kinds.items()
        ]
        monkeypatch.setattr(files.psutil, "disk_partitions", lambda all: mounts)

    for kinds, own in (
        ({"root": "ext4"}, True),
        ({"root": "ext4", "here": "nfs4"}, False),
        ({"root": "nfs", "here": "xfs"}, True),
        ({"root": "something new"}, False),
        ({}, False),
    ):
        mounted(**kinds)
        assert files.is_on_own_disk(tmp_path / "runs") == own, kinds
