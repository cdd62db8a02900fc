"""Every way to be out of space, in everything that is written: exit code 28, the bytes, and nothing that keeps room.

The system itself refuses: a small tmpfs (where it can be mounted), a limit on the size of files; a quota is played.
"""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed import DistStoreError

from pipeline.artifacts.adapter.directions import write_directions
from pipeline.artifacts.adapter.write import save_adapter
from pipeline.console import RankError, UserError, is_out_of_space
from pipeline.files import check_writable, explain_out_of_space, write_json
from pipeline.training.checkpoint import commit as checkpoint
from pipeline.training.metrics import Metrics
from pipeline.training.run import errors
from pipeline.training.run import folder as run_folder
from tests.helpers.artifacts import FACTS, random_tensors
from tests.helpers.checkpoints import facts
from tests.helpers.data import ROOT, build, prose, shelve, tokenizer

LIMIT = 64 * 1024  # bytes of a file
ROOM = 256 * 1024  # bytes of a disk
BIG = 3 * ROOM // 4  # items of four bytes


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def small_files(folder: Path) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def quota(folder: Path) -> Iterator[None]:
    def used_up(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", used_up)
        yield


WAYS = {
    small_disk: r"the disk is full: .*[KM]iB needed, .* free at ",
    small_files: r"a file may not be larger than 64 KiB \(ulimit -f\), .*[KM]iB needed",
    quota: r"the disk quota is used up: .*[KM]iB needed, .* free at ",
}


def a_checkpoint(folder: Path, shelf: Path) -> None:
    checkpoint.save(folder, "launch", 0, 1, 4, {"w": torch.zeros(BIG), "rng": torch.zeros(8)}, facts(1))


def an_adapter(folder: Path, shelf: Path) -> None:
    tensors = random_tensors({"model.layers.0.mlp.down_proj": (BIG // 4, 8)}, 4, multiplicative=True)
    save_adapter(folder / "out", tensors, kind="multiplicative_lora", rank=4, alpha=4.0, **FACTS)


def a_file(folder: Path, shelf: Path) -> None:
    write_directions(folder / "out.safetensors", {0: torch.zeros(BIG)})


def a_cache(folder: Path, shelf: Path) -> None:
    build(shelf, cache_dir=folder / "cache", tokenizer=tokenizer("gpt2"))


def the_library_itself(folder: Path, shelf: Path) -> None:
    """safetensors says "os error 28" in words, and leaves a temporary file that has all the room there was."""
    with explain_out_of_space(folder / "x", "1 MiB"):
        try:
            save_file({"w": torch.zeros(BIG)}, folder / "x.safetensors")
            os.fsync(0)
        finally:
            for left in folder.iterdir():
                left.unlink()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shelve(tmp_path_factory.mktemp("data") / "shelf", prose(60_000))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("write", [a_checkpoint, an_adapter, a_file, a_cache, the_library_itself])
def test_it_ends_with_28_and_the_bytes_and_leaves_no_room_taken(
    tmp_path: Path, shelf: Path, way: Callable, write: Callable
) -> None:
    folder = tmp_path / "out"
    with way(folder):
        folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=WAYS[way]) as refused:
            write(folder, shelf)
        assert refused.value.exit_code == 28
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 4096
        assert not list(folder.glob("global_step*"))


def test_a_run_does_not_begin_where_there_is_no_room_for_it(tmp_path: Path) -> None:
    """Said before the data are read, and by --check."""
    with small_disk(tmp_path / "disk"):
        (tmp_path / "disk" / "filler").write_bytes(bytes(ROOM - 2 * 4096))
        with pytest.raises(UserError, match=r"output_dir = .*full: at least 64 KiB needed, .* free at") as refused:
            check_writable(tmp_path / "disk", "output_dir")
        assert refused.value.exit_code == 28


@pytest.mark.parametrize("what", ["config", "metrics", "record"])
def test_what_a_run_writes_on_the_way(tmp_path: Path, what: str) -> None:
    """Small files: the block in which a run happens explains what they raise."""
    metrics = Metrics(tmp_path, 0, True)
    with (
        pytest.raises(RankError, match=r"quota is used up: .* free at .*quota exceeded") as refused,
        errors.out_of_space_explained(tmp_path),
        quota(tmp_path),
    ):
        if what == "config":
            run_folder._take_folder(tmp_path, None, "max_steps = 1\n")
        elif what == "record":
            write_json(tmp_path / "run.json", {"format": 1})
        else:
            metrics.log(1, {"train/loss": 1.0})
            metrics.sync()
    assert refused.value.exit_code == 28
    assert not list(tmp_path.rglob("*.tmp"))


SAID = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "x"),
    OSError(errno.EFBIG, "x"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
    pa.ArrowException("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    pa.ArrowInvalid("Error writing bytes to file: [errno 122]"),
    RuntimeError("write: No space left on device"),
    RuntimeError("Disk quota exceeded"),
    DistStoreError("No space left on device"),
]


@pytest.mark.parametrize("error", SAID, ids=repr)
def test_it_is_told_from_what_libraries_say(error: Exception) -> None:
    assert is_out_of_space(error)
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not save") from cause
    except RuntimeError as outer:
        assert is_out_of_space(outer)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "x"),
        UserError("No space left on device"),
        RuntimeError("os error 280"),
        ValueError("28"),
        OSError(errno.ENOENT, "No such file", "/os error 28/File too large"),
    ],
    ids=repr,
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_space(error)


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("log('x')", 28),
        ("open('/dev/full', 'w').write('x' * 9999)", 28),
        ("(_ for _ in ()).throw(UserError('x'))", 2),
        ("(_ for _ in ()).throw(RankError('x', 5))", 5),
    ],
)
def test_a_command_whose_own_output_is_on_a_full_disk_keeps_its_exit_code(main: str, code: int) -> None:
    """A log on the full disk: the message has no room either."""
    program = (
        f"from pipeline.console import *; from pipeline.console import RankError; run_command(lambda: {main} or 0)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=full, timeout=60)
    assert done.returncode == code
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == (0 if main == "log('x')" else code)
    assert "Traceback" not in said.stderr
