"""Documents are what Python's own readers read, their tokens what encoding whole gives; bad input is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from pipeline.console import UserError
from pipeline.data import tokenizer as tokenizers
from pipeline.data.reading import documents, encodings, sources
from tests.helpers import data as helpers_data
from tests.helpers.data import KINDS, WILD, prose, tokenizer, whole

# Without control characters, of which more than a trace is refused (test_encodings.py).
TEXT = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_categories=["Cc"]), st.sampled_from("\r\n\t\ufeff “é🙂")),
    max_size=60,
)
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read seven bytes at a time, so that every boundary falls somewhere inside."""
    monkeypatch.setattr(encodings, "READ_BYTES", 7)


STRINGS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


def texts(dataset_type: str, path: object) -> list[str]:
    return [document.text for document in documents.read(dataset_type, str(path))]


def names(dataset_type: str, path: object) -> list[str]:
    return [document.name for document in documents.read(dataset_type, str(path))]


def as_python_reads(text: str) -> str:
    """Universal newlines, by the standard library's text mode, and no byte order mark anywhere."""
    import io

    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8-sig").read().replace("\ufeff", "")


@FAST
@given(TEXT)
@example("\ufeffa mark of the byte order is no text")
@example("six by\r\nhalf of the end of a line is the seventh")
@example("at the end\r")
def test_a_text_file_reads_as_python_reads_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert texts("textfile", tmp_path / "*.txt") == [as_python_reads(text)]


@FAST
@given(st.lists(TEXT, max_size=5), st.booleans())
def test_json_and_jsonl_read_as_the_standard_library_reads_them(tmp_path: Path, rows: list[str], ascii: bool) -> None:
    objects = [{"id": [1, {"text": "no"}], "text": text, "more": None} for text in rows]
    (tmp_path / "a.json").write_text(json.dumps(objects, ensure_ascii=ascii, indent=1), encoding="utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=ascii) for row in objects)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    expected = [as_python_reads(text) for text in rows]
    assert texts("doclist", tmp_path / "a.json") == expected
    assert texts("doclist", tmp_path / "a.jsonl") == expected
    assert names("doclist", tmp_path / "a.json") == [f"a.json#{i + 1}" for i in range(len(rows))]
    assert names("doclist", tmp_path / "a.jsonl") == [f"a.jsonl#{2 * i + 1}" for i in range(len(rows))]  # lines


@FAST
@given(st.lists(TEXT, max_size=40), st.sampled_from(STRINGS), st.integers(1, 20))
def test_parquet_reads_as_pyarrow_reads_it(tmp_path: Path, rows: list[str], kind: pa.DataType, group: int) -> None:
    table = pa.table({"n": range(len(rows)), "text": pa.array(rows, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    assert pq.read_schema(tmp_path / "a.parquet").field("text").type.equals(kind) or pa.types.is_dictionary(kind)
    assert texts("doclist", tmp_path / "a.parquet") == [as_python_reads(text) for text in rows]
    assert names("doclist", tmp_path / "a.parquet") == [f"a.parquet#{i + 1}" for i in range(len(rows))]


@FAST
@given(TEXT, st.binary(max_size=12).filter(lambda junk: not any(byte < 32 for byte in junk)))
def test_text_that_is_not_utf8_is_refused_with_the_offset_of_the_first_bad_byte(
    tmp_path: Path, text: str, junk: bytes
) -> None:
    content = b"a" + text.encode() + b"\xff" + junk  # not at the beginning, where it can begin a mark
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode("utf-8")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: not UTF-8 at byte {expected.value.start} \(0x"):
        texts("textfile", tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\n' + b'"\xe9"')
    with pytest.raises(UserError, match=r"a\.jsonl: not UTF-8 at byte 16 "):
        texts("doclist", tmp_path / "a.jsonl")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("number", ["7" * 5000, "-" + "7" * 5000, "[" + "9" * 4999 + "]", "1e400", "NaN"])
def test_a_field_that_nobody_reads_may_hold_any_number(tmp_path: Path, number: str) -> None:
    rows = [f'{{"text": "a", "n": {number}}}', '{"n": 12, "text": "b"}']
    for file, content in (("a.jsonl", "\n".join(rows)), ("a.json", f"[{','.join(rows)}]"), ("b.json", "\n".join(rows))):
        (tmp_path / file).write_text(content)
        assert texts("doclist", tmp_path / file) == ["a", "b"]


@pytest.mark.parametrize("lead", ["", "\n\n         \n", "\ufeff"])
def test_lines_of_json_may_be_called_json(tmp_path: Path, lead: str) -> None:
    (tmp_path / "a.json").write_text(lead + '{"text": "a", "n": [1, {"b": 2}]}\r\n\r\n{"text": "b"}')
    assert texts("doclist", tmp_path / "a.json") == ["a", "b"]
    first = 1 + lead.count("\n")
    assert names("doclist", tmp_path / "a.json") == [f"a.json#{first}", f"a.json#{first + 2}"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.json", '"text"', "must be a list of objects"),
        (
            "a.json",
            '{\n"text": "x"\n}',
            "line 1 is not valid JSON, .* must be a list of objects, .* or have an object on each",
        ),
        ("a.json", '{"data": [{"text": "x"}], "rows": []}', "has a list in 'data' and another in 'rows'"),
        ("a.json", '{"data": [{"text": "x"}]', "after the list the object should end, not ''"),
        ("a.jsonl", '[{"text": "x"}, \n{"text": "y"}]', "A list of objects belongs in a .json file: rename it"),
        ("a.json", "", "must be a list of objects"),
        ("a.json", '[{"text": "x"}, {"text": ', "element 2 is not valid JSON"),
        ("a.json", '[{"text": "x"}', "element 1 is not valid JSON: the list does not end"),
        ("a.json", '\n[{"text":\n"x"},\n{"text": nul}\n]', r"a\.json: line 4: element 2 is not valid JSON"),
        (
            "a.json",
            '{"data":\n[\n{"text": "x"},\n{"text": "y"} {"text": "z"}]}',
            "line 4: after element 2 there should be",
        ),
        ("a.json", '[{"text": "' + "x" * 3 * 2**20 + '"},\n{"text": "y"},\n{"text": 0x}]', "line 3: element 3 is not"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', "after element 1 there should be ',' or '\\]'"),
        ("a.json", '[{"text": "x"}] more', "after the end of the list there should be nothing, not 'more'"),
        ("a.json", "[] more", "after the end of the list there should be nothing, not 'more'"),
        ("a.json", '["x"]', "row 1 has no field 'text' that holds a string; it is 'x'"),
        ("a.json", '[{"text": "x"}, 12]', "row 2 has no field 'text' that holds a string; it is 12"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "row 2 has no field 'text' .* object with the fields text"),
        ("a.jsonl", '{"content": "x", "id": 1}', "row 1 has no field 'text' .* the fields content, id. Name the field"),
        ("a.jsonl", '{"messages": []}', "This is chat data"),
        ("a.json", '[{"conversations": []}]', "This is chat data"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}',
            r"These are pairs \(prompt and completion\): set dataset_type = 'completion'",
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": null}', "row 2 has no field 'text' .*, and 'text' is not a string"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y", "n": ' + DEEP + "}", "a.jsonl: line 2 nests lists"),
        ("a.json", '[{"text": "x"}, {"text": "y", "n": ' + DEEP + "}]", "a.json: line 1: element 2 nests lists"),
        ("a.json", '{"text": "x"}\n{"text": "y", "n": ' + DEEP + "}", "a.json: line 2 nests lists"),
        ("a.jsonl", '{"text": "x"}\n\n{"text"}', "line 3 is not valid JSON, column 8"),
        ("a.jsonl", '{"text": "ab\\ud800"}', r"row 1: its text has half a surrogate pair \(\\ud800\) at character 2"),
        ("a.parquet", "no such thing", "cannot be read as Parquet"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        texts("doclist", tmp_path / file)
    assert file in str(error.value)


def test_parquet_without_texts_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"messages": [[{"role": "user"}]]}), tmp_path / "e.parquet")
    for file, message in (
        ("a", "no column 'text'; its columns: content"),
        ("b", "holds int64"),
        ("c", "row 2 has no"),
        ("d", "not strings"),
        ("e", "This is chat data"),
    ):
        with pytest.raises(UserError, match=message):
            texts("doclist", tmp_path / f"{file}.parquet")


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for path in ("b.txt", "a.md", "C.TXT", "deep/er/d.txt", "deep/e.txt", "cover.jpg", "rows.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('{"text": "x"}')
    return tmp_path


def test_globs_are_sorted_and_reach_any_depth(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names("textfile", shelf / "*.txt") == ["b.txt"]
    assert names("textfile", shelf / "**/*.txt") == ["b.txt", "deep/e.txt", "deep/er/d.txt"]
    assert names("textfile", shelf / "deep/e.txt") == ["e.txt"]
    assert names("textfile", shelf / "d*/*.txt") == ["deep/e.txt"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(line.endswith("C.TXT, which differ from the glob in capital letters only") for line in said)
    assert names("textfile", shelf / "*") == ["C.TXT", "a.md", "b.txt"]
    assert "left out cover.jpg, deep/, rows.jsonl" in capsys.readouterr().err


def test_a_relative_path_and_a_name_with_brackets(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)
    (shelf / "x [1].txt").write_text("text")
    assert names("textfile", "*.md") == ["a.md"]
    assert names("textfile", "deep/**/*.txt") == ["e.txt", "er/d.txt"]
    assert names("textfile", "x [1].txt") == ["x [1].txt"]


def test_a_path_that_matches_nothing_lists_what_is_there(shelf: Path) -> None:
    for dataset_type, path, message in (
        (
            "textfile",
            "*.epub",
            r"matches no \.txt or \.md file.*holds C\.TXT, a\.md, b\.txt, cover\.jpg, deep/, rows\.jsonl",
        ),
        ("textfile", "rows.jsonl", "It matches rows.jsonl: for these set dataset_type = 'doclist'"),
        ("doclist", "*.txt", "It matches b.txt: for these set dataset_type = 'textfile'"),
        ("textfile", "*.jpg", "It matches cover.jpg"),
        ("textfile", "deep", r"It is a folder: write '.*deep/\*\*/\*\.txt'"),
        ("textfile", "missing/*.txt", "There is no folder '.*missing'; '.*' holds C.TXT"),
    ):
        with pytest.raises(UserError, match=message):
            sources.find(dataset_type, str(shelf / path))
    with pytest.raises(
        UserError, match="dataset_type = 'axolotl' is not known; use one of: textfile, doclist, chat, completion"
    ):
        sources.find("axolotl", "x")


def test_documents_are_read_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    reading = documents.read("textfile", str(tmp_path / "*.txt"))
    assert next(reading).text == "first"
    with pytest.raises(UserError, match=r"b\.txt"):
        _ = next(reading).text


# Tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(WILD)
def test_encoding_in_segments_is_encoding_whole(kind: str, text: str) -> None:
    encode = tokenizers.encoder(tokenizer(kind))
    pieces = [text[i : i + 50] for i in range(0, len(text), 50)]
    segments = list(tokenizers.segments(encode, pieces, segment_chars=200, window_chars=64))
    assert [id for ids in encode(segments) for id in ids] == whole(kind, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_book_is_cut_into_segments_of_bounded_size(kind: str) -> None:
    text = prose(20_000, seed=4)
    encode = tokenizers.encoder(tokenizer(kind))
    segments = list(tokenizers.segments(encode, [text], segment_chars=4000, window_chars=500))
    assert max(map(len, segments)) <= 4000 + 500  # the last may reach over the window
    assert [id for ids in encode(segments) for id in ids] == whole(kind, text)


def test_text_without_a_place_to_cut_is_encoded_whole() -> None:
    text = "ka" * 3000
    segments = list(tokenizers.segments(tokenizers.encoder(tokenizer()), [text], segment_chars=200, window_chars=64))
    assert segments == [text]


def test_a_place_where_cutting_changes_tokens_is_passed_over() -> None:
    """A tokenizer with one token for 'ro mo' must not be cut between the two."""
    from tokenizers import Tokenizer, models

    vocabulary = {character: id for id, character in enumerate("mor \n")} | {"ro": 5, "mo": 6, "ro ": 7, "ro mo": 8}
    backend = Tokenizer(models.BPE(vocabulary, [("r", "o"), ("m", "o"), ("ro", " "), ("ro ", "mo")]))
    encode = lambda texts: [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]  # noqa: E731
    text = "ro mo" * 40 + "\n" + "ro mo" * 20
    segments = list(tokenizers.segments(encode, [text], segment_chars=100, window_chars=40))
    assert [id for ids in encode(segments) for id in ids] == backend.encode(text).ids
    assert segments == ["ro mo" * 40 + "\n", "ro mo" * 20]


@FAST
@given(st.lists(WILD, max_size=8), st.integers(1, 400), st.integers(1, 3))
def test_documents_are_tokenised_in_order_whatever_the_batches(texts: list[str], batch_chars: int, batch: int) -> None:
    read = [documents.Document(str(i), lambda text=text: iter([text])) for i, text in enumerate(texts)]  # type: ignore[misc]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "BATCH_CHARS", batch_chars)
        patch.setattr(tokenizers, "BATCH_SEGMENTS", batch)
        patch.setattr(tokenizers.segments, "__defaults__", (200, 64))
        found: list[tuple[str, list[int]]] = []
        ended = True
        for name, ids, last in tokenizers.tokens(tokenizer(), read):
            if ended:
                found.append((name, []))
            found[-1][1].extend(ids.tolist())
            assert found[-1][0] == name
            ended = last
    assert found == [(str(i), whole("gpt2", text)) for i, text in enumerate(texts)]


def test_the_state_left_in_a_tokenizer_changes_neither_tokens_nor_fingerprint() -> None:
    plain, used = tokenizer(), helpers_data.tokenizer.__wrapped__("gpt2")
    before = tokenizers.fingerprint(used)
    used(["one", "a longer one"], padding="max_length", truncation=True, max_length=4)
    text = prose(100)
    assert tokenizers.fingerprint(used) == before == tokenizers.fingerprint(plain)
    assert tokenizers.encoder(used)([text, "a"]) == [whole("gpt2", text), whole("gpt2", "a")]
    assert len({tokenizers.fingerprint(tokenizer(kind)) for kind in KINDS}) == len(KINDS)
    assert tokenizers.fingerprint(tokenizer("gpt2", bos=False)) != before


def test_a_tokenizer_written_in_python_is_encoded_whole_too() -> None:
    """ByT5's: no backend in Rust, no BOS."""
    used = ByT5Tokenizer()
    assert not used.is_fast
    text = prose(300) + "日本 🙂"
    read = [documents.Document("a", lambda: iter([text])), documents.Document("b", lambda: iter([]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers.segments, "__defaults__", (200, 64))
        found = [(name, ids.tolist()) for name, ids, _ in tokenizers.tokens(used, read)]
    assert len(found) > 5
    assert [id for _, ids in found for id in ids] == [byte + 3 for byte in text.encode()]  # as its paper defines them
    assert len(tokenizers.fingerprint(used)) == 64
