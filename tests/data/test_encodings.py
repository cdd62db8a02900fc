"""Text is decoded as Python's own codecs decode it, whether or not a mark says how; what is no text is called what it is."""

import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.data.reading import documents, encodings
from pipeline.data.reading.encodings import Findings
from tests.helpers.data import build, prose

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MARKS = {"utf-8-sig": "", "utf-16-le": "\ufeff", "utf-16-be": "\ufeff", "utf-32-le": "\ufeff", "utf-32-be": "\ufeff"}
UNICODE = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
LANGUAGES = {
    "English": "It is a truth universally acknowledged, that a single man’s fortune — “must” be in want of a wife.\n",
    "Russian": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n",
    "Chinese": "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\n",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見當がつかぬ。\n",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\n",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.\n",
}


def read(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return next(documents.read_sources([documents.Source(path, path.name)])).text


def findings(path: Path) -> Findings:
    met = Findings()
    for document in documents.read_sources([documents.Source(path, path.name)], findings=met):
        assert isinstance(document.text, str)
    return met


# Encodings


@FAST
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=40), st.sampled_from(list(MARKS)))
def test_a_marked_file_is_decoded_by_its_mark(tmp_path: Path, text: str, codec: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "READ_BYTES", 7)  # in the middle of a character and of a surrogate pair
        found = read(tmp_path / "a.txt", (MARKS[codec] + text + "\r\nend").encode(codec))
    assert found == text.replace("\ufeff", "") + "\nend"


@pytest.mark.parametrize("codec", ["utf-8", *UNICODE])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("times", [1, 3000])
def test_a_file_without_a_mark_is_recognised(tmp_path: Path, codec: str, language: str, times: int) -> None:
    text = LANGUAGES[language] * times
    assert read(tmp_path / "a.txt", text.encode(codec)) == text
    labels = findings(tmp_path / "a.txt").encodings
    assert len(labels) == 1
    assert codec[:6].upper() in next(iter(labels)).ljust(6)
    assert ("without a mark" in next(iter(labels))) == (codec != "utf-8")


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32"])
def test_rows_of_json_are_decoded_too(tmp_path: Path, codec: str) -> None:
    row = '{"text": "naïve 🙂 text"}'
    for file, content in (
        ("a.json", f"[{row},\r\n{row}]"),
        ("b.json", f"{row}\r\n{row}"),
        ("a.jsonl", f"{row}\r\n{row}"),
    ):
        (tmp_path / file).write_bytes(content.encode(codec))
        texts = [document.text for document in documents.read("doclist", str(tmp_path / file))]
        assert texts == ["naïve 🙂 text"] * 2


def test_the_report_says_which_encodings_were_read(tmp_path: Path) -> None:
    """Also from the cache; a folder may hold several."""
    text = prose(300)
    for name, content in (
        ("a", text.encode()),
        ("b", text.encode("utf-16")),
        ("c", text.encode("utf-16-be")),
        ("d", ("\ufeff" + text + "\ufeff" + text).encode()),
    ):
        (tmp_path / f"{name}.txt").write_bytes(content)
    expected = (
        "; read as UTF-16, big-endian, without a mark (1 files), UTF-16, little-endian (1 files), UTF-8 (2 files); "
        "1 byte order marks inside the text left out"
    )
    for _ in range(2):
        report = build(tmp_path).train.report
        assert str(report).endswith(expected)
        assert report.documents == 4
    split = build(tmp_path, eval_size=1, eval_split="document").stores
    assert [str(store.report).endswith(expected) for store in split] == [True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("abc".encode("utf-16") + b"x", r"not UTF-16 at byte 8 \(0x78, truncated data\): it is damaged or cut off"),
        ("ab".encode("utf-16") + b"\x00\xd8x\x00", r"not UTF-16 at byte 6 \(0x00, illegal UTF-16 surrogate\)"),
        (b"\xef\xbb\xbfab\xff", r"not UTF-8 at byte 5 \(0xff, invalid start byte\): it is damaged"),
        ("für".encode()[:2], r"not UTF-8 at byte 1 \(0xc3, unexpected end of data\): it is damaged or cut off"),
        (b"x" * 100_000 + "für".encode("cp1252"), r"at byte 100001 \(0xfc.*'x*für', then with `iconv -f CP1252 "),
        ((LANGUAGES["English"] * 9).encode("cp1252"), r"single man’s fortune.*`iconv -f CP1252 -t UTF-8`"),
        ((LANGUAGES["Russian"] * 9).encode("koi8-r"), r"'Все счастливые семьи', then with `iconv -f KOI8-R -t UTF-8`"),
        (
            "für “alle” ".encode() * 9 + "für".encode("cp1252"),
            r"the text around is UTF-8: mend this place, where encodings",
        ),
        (LANGUAGES["English"].encode("utf-16").decode("cp1252", "replace").encode(), "UTF-16 that was converted as if"),
    ],
)
def test_what_does_not_decode_is_refused_with_its_place_and_advice_that_is_right(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "a.txt", content)
    assert str(error.value).startswith(f"{tmp_path}/a.txt: ")


# What is no text


def packed() -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (packed(), "a ZIP archive, as .epub"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"\x1f\x8b\x08\x00rest", "packed with gzip"),
        (b"{\\rtf1\\ansi text}", "RTF"),
        (b"PAR1" + bytes(range(256)), "Parquet"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "a binary file"),
        (bytes(4096), "a binary file"),
        (b"H\0i\0", "a binary file"),
        (bytes(range(256)) * 300, "a binary file"),
    ],
)
@pytest.mark.parametrize("file", ["a.txt", "a.json", "a.jsonl"])
def test_a_binary_file_is_called_one(tmp_path: Path, content: bytes, kind: str, file: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}: is {kind}"):
        _ = [document.text for document in documents.read_sources([documents.Source(tmp_path / file, file)])]


@pytest.mark.parametrize("control", ["\0", "\x1b", "\b", "\x7f", "\x92", "\x1a"])
def test_control_characters_beyond_a_trace_are_refused_with_their_place(tmp_path: Path, control: str) -> None:
    """A trace is counted: one, and one more for every 4 096 characters. U+0092 is an apostrophe wrongly converted."""
    line = "a line of text that is long enough to be one\n"
    assert read(tmp_path / "a.txt", (line * 9 + control + line).encode()) == line * 9 + control + line
    assert findings(tmp_path / "a.txt").control_characters == 1
    name = "NUL" if control == "\0" else f"U+{ord(control):04X}"
    with pytest.raises(
        UserError, match=rf"a\.txt: line 10 holds a control character \({name.replace('+', '[+]')}\), one of 3 "
    ):
        read(tmp_path / "a.txt", (line * 9 + control + line + control * 2 + line).encode())


@pytest.mark.parametrize("size", [7, 1000, 2**20])
def test_a_trace_does_not_depend_on_how_a_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Control characters close together are refused however long the text before them; spread thinly they pass."""
    monkeypatch.setattr(encodings, "READ_BYTES", size)
    line = "x" * 4999 + "\n"
    spread = (line[:-2] + "\x01\n") * 100
    assert len(read(tmp_path / "a.txt", spread.encode())) == len(spread)
    assert findings(tmp_path / "a.txt").control_characters == 100
    close = line * 100 + "\0" * 18 + line * 100
    with pytest.raises(UserError, match="line 101 holds a control character"):
        read(tmp_path / "a.txt", close.encode())


@pytest.mark.parametrize("character", ["\t", "\f", "\v", "\x85", "\u2028", "\u200b", "\u00ad", "\ufffd", "\ue000"])
def test_white_space_and_odd_characters_pass(tmp_path: Path, character: str) -> None:
    assert read(tmp_path / "a.txt", (character * 50).encode()) == character * 50
    assert findings(tmp_path / "a.txt").control_characters == 0


def test_rows_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "' + "a\\u0000" * 40 + '"}')
    rows = documents.read("doclist", str(tmp_path / "a.jsonl"))
    assert next(rows).text == "a\0b"
    with pytest.raises(UserError, match=r"a\.jsonl: the text of row 2: line 1 holds a control character \(NUL\)"):
        _ = next(rows).text
