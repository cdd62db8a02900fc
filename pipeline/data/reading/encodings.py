"""Takes a file's bytes, or a text's pieces, as they come; gives text: decoded, with \\n ends of lines, without marks, checked.

UTF-8, UTF-16 and UTF-32 are told by their byte order marks, and without one by what the beginning of the file holds.
Nothing else is guessed at: what is in no encoding of Unicode is refused, with the likeliest one in the message. A binary
file is called one. A trace of control characters passes and is counted; more of them is an error with its place.
"""

import codecs
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.console import UserError
from pipeline.data.reading.packed import opened
from pipeline.foreign import printable

READ_BYTES = 2**20
HEAD_BYTES = 2**16  # of a file, from which its encoding is told
LEAST_TO_GUESS = 32  # bytes: less tells neither order from the other
STRETCH = 2**16  # characters: control characters are counted against their number at the end of each stretch
TEXT_PER_CONTROL = 2**12  # characters to each control character that is no more than a trace
RARE_LETTERS = 0.1  # part of a western European text's bytes that are no ASCII, at most
SUSPICIOUS, BINARY = 0.02, 0.3  # part of the characters that are control characters

# Longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NAMES = {
    "utf-8": "UTF-8",
    "utf-16-le": "UTF-16, little-endian",
    "utf-16-be": "UTF-16, big-endian",
    "utf-32-le": "UTF-32, little-endian",
    "utf-32-be": "UTF-32, big-endian",
}
_SIGNATURES = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a ZIP archive, as .epub, .docx and .odt are",
    b"\x1f\x8b\x08": "packed with gzip",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"\xfd7zXZ\x00": "packed with xz",
    b"BZh91AY&SY": "packed with bzip2",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Word document",
    b"{\\rtf1": "RTF",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"SQLite format 3\x00": "a SQLite database",
}
_CONVERTED_MARKS = ("ÿþ".encode(), "þÿ".encode())  # UTF-16's, taken for two letters of an 8-bit encoding
# All control characters but white space (tab, ends of lines and pages).
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_C0_BYTE = re.compile(rb"[\x00-\x08\x0e-\x1f]")
_USUAL = ("cp1252", "cp1251", "cp1250", "shift_jis", "gb18030", "big5", "euc_kr")  # among those that fit equally well


@dataclass
class Findings:
    """What reading a dataset met, counted as it is read."""

    encodings: dict[str, int] = field(default_factory=dict)  # files, by how their encoding is called in the report
    control_characters: int = 0
    inner_marks: int = 0  # byte order marks inside texts, left out
    hard_wrapped: int = 0  # documents whose paragraphs are broken into lines
    joined_lines: int | None = None  # None where that was not asked for

    def __str__(self) -> str:
        """The end of a report's line, each part after a semicolon."""
        names = [name if len(self.encodings) == 1 else f"{name} ({n:,} files)" for name, n in self.encodings.items()]
        line = f"; read as {', '.join(sorted(names))}" if names else ""
        if self.control_characters:
            line += f"; {self.control_characters:,} control characters in the text"
        if self.inner_marks:
            line += f"; {self.inner_marks:,} byte order marks inside the text left out"
        if self.joined_lines is not None:
            line += f"; {self.joined_lines:,} line breaks inside paragraphs joined"
        elif self.hard_wrapped:
            line += (
                f"; the lines of {self.hard_wrapped:,} documents are broken inside paragraphs, as Project Gutenberg's "
                f"are: join_lines = true joins them"
            )
        return line


class Encoding(NamedTuple):
    """How a file's bytes become text: a codec of Python's, the length of the mark to skip, what the report calls it.

    `certain`: it is not only assumed for want of another.
    """

    codec: str
    mark_bytes: int
    label: str
    certain: bool = True


UTF8 = Encoding("utf-8", 0, "UTF-8")


def recognise(head: bytes, where: str) -> Encoding:
    """The encoding of the file that begins with `head` (HEAD_BYTES of it). UserError if it is not text at all."""
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            raise UserError(f"{where}: is {kind}, not plain text, whatever its name says: convert or unpack it")
    for mark, codec in _MARKS:
        if head.startswith(mark) and not (codec == "utf-32-le" and len(head) % 4):
            return Encoding(codec, len(mark), _NAMES[codec])
    plain = UTF8._replace(certain=False)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
        controls, limit = _share(len(_CONTROL.findall(text)), len(text)), BINARY
    except UnicodeDecodeError:
        controls, limit = max(_share(len(_C0_BYTE.findall(head)), len(head)), SUSPICIOUS), SUSPICIOUS
        text = ""
    if controls < SUSPICIOUS:
        return plain
    if text and head.startswith(_CONVERTED_MARKS):
        raise UserError(
            f"{where}: is UTF-16 that was converted as if it were an 8-bit encoding, which cannot be put right: "
            f"use the original file; UTF-16 is read as it is"
        )
    guess = _likeliest(head) if b"\x00" in head and len(head) >= LEAST_TO_GUESS else None
    if guess in _NAMES and guess != "utf-8":
        return Encoding(guess, 0, f"{_NAMES[guess]}, without a mark")
    if _share(len(_C0_BYTE.findall(head)), len(head)) > limit:
        raise UserError(f"{where}: is a binary file, not text: leave it out or convert it to plain text in UTF-8")
    return plain


def file_text(path: Path, findings: Findings) -> Iterator[str]:
    """The text of a file in pieces of up to READ_BYTES characters, decoded as its beginning says; not yet `checked`.

    UserError if it cannot be opened or read, or with the first bad byte's offset.
    """
    where = printable(path)
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
        encoding = noted(head, where, findings)
        rest = iter(lambda: file.read(READ_BYTES), b"")
        yield from text_of(itertools.chain((head[encoding.mark_bytes :],), rest), encoding, where)


def noted(head: bytes, where: str, findings: Findings) -> Encoding:
    """`recognise`, and the encoding is counted in `findings`."""
    encoding = recognise(head, where)
    findings.encodings[encoding.label] = findings.encodings.get(encoding.label, 0) + 1
    return encoding


def text_of(raws: Iterable[bytes], encoding: Encoding, where: str) -> Iterator[str]:
    """The bytes `raws` (cut anywhere, from after the mark) decoded, with \\n for every end of line.

    UserError with the file's first bad byte's offset.
    """
    decoder = codecs.getincrementaldecoder(encoding.codec)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = encoding.mark_bytes
    for raw in itertools.chain(raws, (b"",)):
        held = bytes(decoder.getstate()[0])
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise _not_decodable(where, encoding, offset - len(held), held + raw, error) from None
        offset += len(raw)
        if text := newlines.decode(text, final=not raw):
            yield text


def checked(pieces: Iterable[str], where: str, findings: Findings) -> Iterator[str]:
    """The pieces of one text without the byte order marks in it.

    UserError, with line and place, where control characters are more than a trace: one, and one for each
    TEXT_PER_CONTROL characters, in the whole text and in each stretch of it.
    """
    meter = _ControlMeter(where)
    for piece in pieces:
        meter.count(piece)
        text = piece.replace("\ufeff", "")
        findings.inner_marks += len(piece) - len(text)
        if text:
            yield text
    meter.weigh()
    findings.control_characters += meter.found


class _ControlMeter:
    """Counts the control characters of one text and refuses it when they are more than a trace."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.length = self.lines = self.found = self.in_stretch = 0
        self.first: tuple[str, int] | None = None  # the stretch's first one, and its line

    def count(self, piece: str) -> None:
        """Take in the next piece, in stretches that do not depend on how the text is cut into pieces."""
        begin = 0
        while begin < len(piece):
            part = piece[begin : begin + STRETCH - self.length % STRETCH]
            if controls := _CONTROL.findall(part):
                if self.first is None:
                    self.first = controls[0], self.lines + part.count("\n", 0, part.index(controls[0])) + 1
                self.found, self.in_stretch = self.found + len(controls), self.in_stretch + len(controls)
            begin, self.length, self.lines = begin + len(part), self.length + len(part), self.lines + part.count("\n")
            if self.length % STRETCH == 0:
                self.weigh()
                self.in_stretch, self.first = 0, None

    def weigh(self) -> None:
        """UserError if there are too many by now."""
        trace = 1 + min(self.length, STRETCH) // TEXT_PER_CONTROL
        if self.first and (self.in_stretch > trace or self.found > 1 + self.length // TEXT_PER_CONTROL):
            control, line = self.first
            name = "NUL" if control == "\x00" else f"U+{ord(control):04X}"
            raise UserError(
                f"{self.where}: line {line:,} holds a control character ({name}), one of {self.found:,} up to character "
                f"{self.length:,}: text has none but tabs and ends of lines; remove them or convert the file anew"
            )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _likeliest(sample: bytes) -> str | None:
    """Python's name of the encoding that `sample` is most likely in; None if it is likely in none."""
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    if best is None:
        return None
    equal = [best.encoding, *best.could_be_from_charset]
    return next((usual for usual in _USUAL if usual in equal), best.encoding).replace("utf_", "utf-").replace("_", "-")


def _not_decodable(where: str, encoding: Encoding, offset: int, raw: bytes, error: UnicodeDecodeError) -> UserError:
    """What is wrong at the first bad byte of `raw`, which is at `offset` of the file, and how to mend it."""
    place, byte = offset + error.start, raw[error.start]
    wrong = f"{where}: not {encoding.label.split(',')[0]} at byte {place} (0x{byte:02x}, {error.reason})"
    if encoding.certain or error.reason == "unexpected end of data":
        return UserError(f"{wrong}: it is damaged or cut off")
    begin = max(0, error.start - HEAD_BYTES // 2)
    around = raw[begin : error.start + HEAD_BYTES // 2]
    as_utf8 = around.decode("utf-8", "replace")
    wrong_places = as_utf8.count("\ufffd")
    if sum(character > "\x7f" for character in as_utf8) >= 2 * wrong_places:
        return UserError(f"{wrong}, though the text around is UTF-8: mend this place, where encodings were mixed")
    guess = _likeliest_8_bit(around)
    if guess is None:
        return UserError(f"{wrong}: it is damaged, or in an encoding that has to be converted to UTF-8")
    before = around[max(0, error.start - begin - 20) : error.start - begin].decode(guess, "replace")
    reads = before + around[error.start - begin :][:20].decode(guess, "replace")
    return UserError(
        f"{wrong}: convert it to UTF-8; if this reads right, '{printable(reads)}', then with "
        f"`iconv -f {guess.upper()} -t UTF-8`"
    )


def _likeliest_8_bit(sample: bytes) -> str | None:
    """The encoding that text which is in none of Unicode is most likely in: Windows' for a few letters among ASCII."""
    guess = _likeliest(sample)
    foreign = sum(byte >= 0x80 for byte in sample)
    if guess is not None and foreign < len(sample) * RARE_LETTERS:
        try:
            if not _CONTROL.search(sample.decode("cp1252")):
                return "cp1252"
        except UnicodeDecodeError:
            pass
    return None if guess in _NAMES or guess == "ascii" else guess
