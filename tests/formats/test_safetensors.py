"""The streaming safetensors reader and writer against the safetensors package, and folders that appear whole."""

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from pipeline import files as files_module
from pipeline.artifacts.fold.check import half_spacing
from pipeline.console import UserError
from pipeline.files import atomic_folder, check_disk_space, in_order
from pipeline.formats.dtypes import FLOATS, ITEM_BITS
from pipeline.formats.safetensors import (
    TensorSpec,
    read_floats,
    read_header,
    read_pieces,
    tensor_bytes,
    write_safetensors,
)
from tests.helpers.artifacts import files_of

NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__" and name.isprintable())
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
WHOLE_BYTES = st.sampled_from([name for name, bits in ITEM_BITS.items() if bits >= 8])


@st.composite
def files(draw: st.DrawFn) -> tuple[list[TensorSpec], dict[str, bytes], dict[str, str] | None]:
    """Any tensors a safetensors file can hold, with their bytes, and any metadata."""
    specs = [
        TensorSpec(name, draw(WHOLE_BYTES), draw(SHAPES)) for name in draw(st.lists(NAMES, unique=True, max_size=6))
    ]
    content = {spec.name: draw(st.binary(min_size=spec.n_bytes, max_size=spec.n_bytes)) for spec in specs}
    return specs, content, draw(st.none() | st.dictionaries(NAMES, st.text(max_size=8), max_size=3))


@settings(deadline=None)
@given(files(), st.integers(1, 40))
def test_what_is_streamed_out_is_what_safetensors_reads(tmp_path_factory, file, cut: int) -> None:
    specs, content, metadata = file
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    write_safetensors(
        path, specs, lambda name: [content[name][i : i + cut] for i in range(0, len(content[name]), cut)], metadata
    )
    read = {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in deserialize(path.read_bytes())
    }
    assert read == {spec.name: (spec.dtype, spec.shape, content[spec.name]) for spec in specs}
    with safe_open(path, framework="pt") as stored:
        assert (stored.metadata() or {}) == (metadata or {})
    header = read_header(path)
    assert header.metadata == metadata
    for tensor in header.tensors:
        assert b"".join(read_pieces(tensor, cut)) == content[tensor.name]
        assert tensor.start % (ITEM_BITS[tensor.dtype] // 8) == 0  # readers view the data in place


FLOAT_LISTS = st.lists(
    st.tuples(NAMES, st.sampled_from(list(FLOATS.values())), SHAPES), unique_by=lambda t: t[0], max_size=5
)


@settings(deadline=None)
@given(FLOAT_LISTS, st.integers(1, 50))
def test_what_safetensors_writes_is_streamed_in(tmp_path_factory, wanted, block: int) -> None:
    path = tmp_path_factory.mktemp("stream") / "x.safetensors"
    tensors = {name: torch.randn(shape, dtype=torch.float32).to(dtype) for name, dtype, shape in wanted}
    save_file(tensors, path)
    for stored in read_header(path).tensors:
        expected = tensors[stored.name]
        columns = expected.shape[-1] if expected.dim() else 1
        blocks = list(read_floats(stored, columns, block))
        assert all(len(part) * columns <= max(block, columns) for part in blocks)
        joined = torch.cat(blocks) if blocks else torch.empty(0, dtype=expected.dtype)
        assert torch.equal(joined.reshape(expected.shape), expected)
        assert b"".join(read_pieces(stored)) == bytes(tensor_bytes(expected))


def test_the_writer_refuses_wrong_byte_counts_double_names_and_existing_files(tmp_path: Path) -> None:
    spec = TensorSpec("a", "F32", (2,))
    for number, pieces in enumerate(([b"1234567"], [b"12345678", b"9"], [])):
        content = {"a": pieces}
        with pytest.raises(ValueError, match="bytes were given for 8"):
            write_safetensors(tmp_path / f"{number}", [spec], content.__getitem__)
    with pytest.raises(ValueError, match="taken"):
        write_safetensors(tmp_path / "double", [spec, spec], lambda _: [b"12345678"])
    (tmp_path / "there").write_text("x")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "there", [spec], lambda _: [b"12345678"])


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 60000), st.integers(-30, 0))
def test_half_spacing_is_the_distance_to_the_neighbour(value: float, exponent: int) -> None:
    """The oracle steps to the next value by its bits: in a 16-bit float, the integer above."""
    for dtype in (torch.bfloat16, torch.float16):
        below = torch.tensor(value * 2.0**exponent, dtype=torch.float64).to(dtype)
        if not torch.isfinite(below):
            continue
        above = (below.view(torch.int16) + 1).view(dtype)
        if torch.isfinite(above):
            gap = float(above.double() - below.double())
            assert float(half_spacing(below.double(), dtype)) == gap / 2


def test_a_folder_appears_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with atomic_folder(output) as folder:
        (folder / "file").write_text("new")
        assert not output.exists()
    assert files_of(tmp_path) == {"deep/out/file": b"new"}
    with pytest.raises(RuntimeError), atomic_folder(output, replace=True) as folder:
        (folder / "file").write_text("newer")
        raise RuntimeError
    assert files_of(tmp_path) == {"deep/out/file": b"new"}
    with atomic_folder(output, replace=True) as folder:
        (folder / "other").write_text("newest")
        assert files_of(output) == {"file": b"new"}
    assert files_of(tmp_path) == {"deep/out/other": b"newest"}
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert files_of(tmp_path / "empty") == {"file": b"new"}


def test_a_file_or_a_full_folder_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for replace in (False, True):
        with pytest.raises(UserError, match="is a file"), atomic_folder(tmp_path / "file", replace=replace):
            pass
    with pytest.raises(UserError, match=r"not empty.*--force"), atomic_folder(tmp_path):
        pass


def test_leftovers_of_killed_processes_are_cleared_and_an_old_folder_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-00000000").mkdir()
    (tmp_path / ".out.partial-00000000" / "half").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    (tmp_path / ".out.replaced-11111111").mkdir()  # killed between the two renames of a replacement
    (tmp_path / ".out.replaced-11111111" / "old").write_text("old")
    (tmp_path / ".outer.partial-00000000").mkdir()  # another output's
    with pytest.raises(UserError, match="not empty"), atomic_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".outer.partial-00000000", "out"]
    assert files_of(tmp_path / "out") == {"old": b"old"}
    (tmp_path / ".out.replaced-22222222").mkdir()  # killed before the old folder was deleted
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".outer.partial-00000000", "out"]


def _hold(output: Path, entered: Callable, leave: Callable) -> None:
    with atomic_folder(output):
        entered.set()  # type: ignore[attr-defined]
        leave.wait(30)  # type: ignore[attr-defined]


def test_two_processes_do_not_write_to_one_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", entered, leave))
    other.start()
    assert entered.wait(30)
    with pytest.raises(UserError, match="another process is writing"), atomic_folder(tmp_path / "out"):
        pass
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1  # the other's folder is left alone
    leave.set()
    other.join(30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_exit_code_28_and_leaves_nothing(tmp_path: Path, monkeypatch, code: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(UserError, match=r"cannot write .*out: .* needed") as refused,
        atomic_folder(tmp_path / "out") as folder,
    ):
        write_safetensors(folder / "x", [TensorSpec("a", "U8", (1,))], lambda _: [b"1"])
    assert refused.value.exit_code == 28
    assert not list(tmp_path.iterdir())


def test_disk_space_is_checked_with_figures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    check_disk_space(tmp_path / "not" / "yet", 2**30)
    with pytest.raises(UserError, match=r"1.5 GiB needed, 1 GiB free") as refused:
        check_disk_space(tmp_path / "not" / "yet", 3 * 2**29)
    assert refused.value.exit_code == 28


def test_calls_are_made_in_order_beside_the_block_and_their_errors_raised() -> None:
    done: list[int] = []
    with in_order(most=2) as beside:
        for number in range(50):
            beside(done.append, number)
    assert done == list(range(50))
    with pytest.raises(ZeroDivisionError), in_order() as beside:
        beside(divmod, 1, 0)
    with pytest.raises(KeyError), in_order() as beside:
        raise KeyError
