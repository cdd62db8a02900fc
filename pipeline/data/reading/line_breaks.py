"""Takes a text's pieces; says whether its paragraphs are broken into lines, as Project Gutenberg's are, and joins them.

A line break inside a paragraph is joined if it can be the wrapping's: the line above with the next line's first word
would have been longer than FULL_COLUMNS, and the line is no longer than WIDE_COLUMNS. So the short lines of verse,
addresses and tables of contents stay, and so do lines that are indented by more than a space, lists, headings, quotations
(>), tables, fenced code, and Markdown's own line breaks (two spaces or a backslash at the end). The break becomes a space,
or nothing after a hyphen or a dash that a word touches. A text most of whose breaks cannot be the wrapping's stays whole.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from pipeline.data.reading.encodings import Findings

FULL_COLUMNS = 55  # prose is wrapped at more (Project Gutenberg: 65 to 75)
WIDE_COLUMNS = 120  # and at less than this
SAMPLE_CHARS = 2**16  # of a text, from which it is told whether it is wrapped
LEAST_BREAKS = 8
LONG_LINE = 2**13  # characters; a longer line passes in parts

_FENCE = re.compile(r"`{3}|~{3}")
# How lines that are not running text begin.
_MARKED = re.compile(r"\s{2}|\t|\s?$|[-+*•](\s|$)|\d{1,2}[.)]\s|#|>|\||=|`{3}|~{3}|[-*_]{3}")
_MEANT_BREAK = re.compile(r"(  |\\)$")
_TOUCHED_DASH = re.compile(r"[^\s\"“‘(\[][-\u00ad\u2010-\u2015]$")
_WORD = re.compile(r" ?(\S+)")


def noted(pieces: Iterable[str], findings: Findings) -> Iterator[str]:
    """The same pieces; counts the text in `findings.hard_wrapped` if it is."""
    sample, size = list[str](), 0
    for piece in pieces:
        if size < SAMPLE_CHARS:
            sample.append(piece[: SAMPLE_CHARS - size])
            size += len(piece)
        yield piece
    findings.hard_wrapped += bool(hard_wrapped("".join(sample)))


def hard_wrapped(text: str) -> bool | None:
    """Whether most line breaks inside paragraphs are the wrapping's: of full lines, in the middle of sentences.

    None if there are too few to tell.
    """
    if text.count("\n") < LEAST_BREAKS:
        return None
    lines = [line if line.strip() else "" for line in text.split("\n")]
    inside = [(above, below) for above, below in itertools.pairwise(lines) if above and below]
    if len(inside) < LEAST_BREAKS:
        return None
    wrapped = [below for above, below in inside if _full(above[:5], len(above), below)]
    running_on = sum(below[0].isalpha() and not below[0].isupper() for below in wrapped)
    return len(wrapped) > len(inside) / 2 and running_on > len(wrapped) / 3


def joined(pieces: Iterable[str], findings: Findings) -> Iterator[str]:
    """The text with the wrapping's line breaks joined, in pieces; no more is held than the sample and a line."""
    findings.joined_lines = findings.joined_lines or 0
    rest, opening, size = iter(pieces), list[str](), 0
    while size < SAMPLE_CHARS and (piece := next(rest, "")):
        opening.append(piece)
        size += len(piece)
    sample, pieces = "".join(opening)[:SAMPLE_CHARS], itertools.chain(opening, rest)
    if hard_wrapped(sample) is False:
        yield from pieces
        return
    joiner = _Joiner()
    for parts in _in_lines(pieces):
        if text := "".join([joiner.take(part) for part in parts]):
            yield text
    if joiner.breaks:
        yield "\n"
    findings.joined_lines += joiner.joined


class _Joiner:
    """Decides on each line break when the line below begins."""

    def __init__(self) -> None:
        self.opening, self.length, self.ending = "", 0, ""  # of the line so far
        self.breaks = False  # a line has ended, and the break after it is not given out yet
        self.fenced = False
        self.joined = 0

    def take(self, part: str) -> str:
        """What to give out for a line (with its \\n) or the next part of a long one."""
        text, before = part.removesuffix("\n"), ""
        begins = self.breaks or not self.length
        if self.breaks:
            before = self._break(text)
            self.length, self.ending = 0, ""
        if begins:
            self.opening = text[:5]
            if _FENCE.match(text):
                self.fenced = not self.fenced
        self.length, self.ending = self.length + len(text), (self.ending + text[-2:])[-2:]
        self.breaks = len(text) < len(part)
        return before + text

    def _break(self, below: str) -> str:
        """What stands for the break between the line that has ended and `below`."""
        length = self.length - (self.ending[-1:] == " ")
        if self.fenced or _MEANT_BREAK.search(self.ending) or not _full(self.opening, length, below):
            return "\n"
        self.joined += 1
        spaced = self.ending.endswith(" ") or below.startswith(" ")
        return "" if spaced or _TOUCHED_DASH.search(self.ending) else " "


def _full(opening: str, length: int, below: str) -> bool:
    """Whether the break between a line of running text and `below` can be the wrapping's."""
    word = _WORD.match(below)
    if word is None or _MARKED.match(opening) or _MARKED.match(below):
        return False
    return length <= WIDE_COLUMNS and length + 1 + len(word[1]) > FULL_COLUMNS


def _in_lines(pieces: Iterable[str]) -> Iterator[list[str]]:
    """For each piece the lines that end in it, each with its \\n; of a line that gets too long what there is."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        parts = [f"{line}\n" for line in lines]
        if len(rest) > LONG_LINE:
            parts.append(rest)
            rest = ""
        yield parts
    if rest:
        yield [rest]
