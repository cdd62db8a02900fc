"""Joining lines gives back the text that was wrapped, and nothing else; the oracle is the standard library's textwrap."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading import line_breaks
from pipeline.data.reading.encodings import Findings
from tests.helpers.builders import BOOKS
from tests.helpers.data import build, prose, shelve

BOOK = (BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")
EVANGELINE = """\
This is the forest primeval. The murmuring pines and the hemlocks,
Bearded with moss, and in garments green, indistinct in the twilight,
Stand like Druids of eld, with voices sad and prophetic,
Stand like harpers hoar, with beards that rest on their bosoms.

"""
KEPT = {
    "verse": "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 9,
    "long verse": EVANGELINE * 5,
    "indented": "a line that is long enough to be a wrapped one, or nearly so,\n    and one that is indented\n" * 5,
    "a list": "- an item of a list that is long enough to be a line of running text\n" * 9,
    "numbers": "".join(f"{i}. an item of a list that is long enough to be a line of running text\n" for i in range(9)),
    "quotation": "> words of another that are long enough to be a line of running text\n" * 9,
    "a table": "| a cell that is rather long, but no longer | than others, one | of two |\n" * 9,
    "code": "```\nwords of a program that are long enough to be a line of running text\nand more\n```\n" * 5,
    "Markdown's breaks": "words of a letter that are long enough to be a line of running text  \nand more\\\nand more\n"
    * 3,
    "a paragraph a line": "\n".join(prose(60, seed=i).replace("\n", " ") for i in range(20)),
    "chapters": "Chapter 1. In which this happens\nChapter 2. In which that happens\n" * 9,
}


def joined(text: str, size: int = 2**20) -> tuple[str, Findings]:
    """The text joined, read in pieces of `size` characters."""
    findings = Findings()
    pieces: Iterator[str] = (text[at : at + size] for at in range(0, len(text), size))
    return "".join(line_breaks.joined(pieces, findings)), findings


def wrapped(text: str, width: int) -> str:
    """As Project Gutenberg has it: paragraphs in lines of at most `width` characters."""
    fill = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=True).fill
    return "\n".join(fill(line) if line.strip() else line for line in text.split("\n"))


@pytest.mark.parametrize("width", [60, 65, 72, 75, 100])
@pytest.mark.parametrize("size", [7, 2**20])
def test_a_wrapped_book_comes_back(width: int, size: int) -> None:
    text = wrapped(BOOK, width)
    found, findings = joined(text, size)
    assert found == BOOK
    assert findings.joined_lines == text.count("\n") - BOOK.count("\n") > 200


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("size", [7, 2**20])
def test_line_breaks_that_were_meant_are_kept(kind: str, size: int) -> None:
    assert joined(KEPT[kind], size)[0] == KEPT[kind]
    assert not line_breaks.hard_wrapped(KEPT[kind])


@pytest.mark.parametrize(
    ("above", "below", "expected"),
    [
        ("words ", "and more", "words and more"),
        ("a drawing-", "room", "a drawing-room"),
        ("he said—", "and went", "he said—and went"),
        ("he said--", "and went", "he said--and went"),
        ("he said —", "and went", "he said — and went"),
        ("words", " and more", "words and more"),
        ("words", "   and more", "words\n   and more"),
        ("words", "", "words\n"),
        ("in the year", "1813. It was", "in the year 1813. It was"),
        ("words", "# Chapter", "words\n# Chapter"),
    ],
)
def test_a_break_becomes_a_space_or_nothing(above: str, below: str, expected: str) -> None:
    lead = "a line that is long enough to be one that was wrapped; "
    assert joined(f"{lead}{above}\n{below}\n")[0] == f"{lead}{expected}\n"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["\n", "\n\n", "word ", "- ", "```", "    ", "long-", "x" * 60, "x" * 9000, "Ü—"])),
    st.integers(1, 50),
)
def test_nothing_but_single_line_breaks_and_the_pieces_do_not_matter(parts: list[str], size: int) -> None:
    text = "".join(parts)
    found = joined(text, size)[0]
    assert found == joined(text)[0]
    assert found.split() == text.split() or "-" in text or "—" in text
    assert found.count("\n\n") == text.count("\n\n")
    assert "".join(found.split()) == "".join(text.split())


def test_wrapped_texts_are_found() -> None:
    for width in (60, 65, 72, 75, 100):
        assert line_breaks.hard_wrapped(wrapped(BOOK, width))
    assert not line_breaks.hard_wrapped(BOOK)
    assert not line_breaks.hard_wrapped("")
    mixed = KEPT["verse"] + wrapped(BOOK, 70)
    assert line_breaks.hard_wrapped(mixed)


def test_the_report_says_it_and_joining_gives_the_unwrapped_books_chunks(tmp_path: Path) -> None:
    folder = shelve(tmp_path / "plain", BOOK, EVANGELINE * 5)
    plain = build(folder)
    assert "broken inside" not in str(plain.train.report)
    folder = shelve(tmp_path / "wrapped", wrapped(BOOK, 72), EVANGELINE * 5)
    broken, mended = build(folder), build(folder, join_lines=True)
    assert (
        "; the lines of 1 documents are broken inside paragraphs, as Project Gutenberg's are: join_lines = true"
        in str(broken.train.report)
    )
    assert str(mended.train.report).endswith(
        f"; {mended.train.report.findings.joined_lines:,} line breaks inside paragraphs joined"
    )
    assert mended.train.report.sha256 == plain.train.report.sha256 != broken.train.report.sha256
