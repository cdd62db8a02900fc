"""Fixtures of several test files."""

import pytest

from pipeline.artifacts.fold import check as fold_check
from pipeline.artifacts.fold import rows as fold_rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows of 48: matrices of 32 rows fall into three and a rest, as real ones do at the real size."""
    monkeypatch.setattr(fold_rows, "BLOCK_ITEMS", 500)
    monkeypatch.setattr(fold_check, "BLOCK_ITEMS", 700)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not wrapped, wherever the tests run: pytest-xdist tells its workers of 80 columns."""
    monkeypatch.setenv("COLUMNS", "200")
