"""Fixtures of several test files."""

import os
import tempfile
from pathlib import Path

import pytest

from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold import rows as fold_rows

# What is remembered for a machine is of these tests alone; the processes that they start inherit it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mulora-pipe-tests-")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows of 48: matrices of 32 rows fall into three and a rest, as real ones do at the real size."""
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 500)
    monkeypatch.setattr(fold_check, "BLOCK_ITEMS", 700)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not wrapped, wherever the tests run: pytest-xdist tells its workers of 80 columns."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Cohere model of four layers; a file that needs another one has a `base` of its own."""
    from tests.helpers.builders import save_model  # transformers takes seconds to import

    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama model of four layers."""
    from tests.helpers.builders import save_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    save_model(folder, "llama")
    return folder
