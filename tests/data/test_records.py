"""Rows of every format that is read, packed and in folders; bad rows by their place. Oracles: json, csv, pyarrow, datasets."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.console import UserError
from pipeline.data.reading import documents, records
from pipeline.data.reading.encodings import Findings
from pipeline.data.reading.json_rows import Broken
from pipeline.data.reading.sources import find

ROWS = [
    {"messages": [{"role": "user", "content": "Thé?\n🙂"}, {"role": "assistant", "content": "NA"}], "id": 1},
    {"messages": [{"role": "user", "content": "null"}, {"role": "assistant", "content": ""}], "id": 2},
]
TEXTS = [
    {"prompt": "NA", "completion": "null"},
    {"prompt": 'a,"b"\nc', "completion": ""},
    {"prompt": "None", "completion": " "},
]


def read(path: object) -> list[records.Record]:
    return list(records.read(find("chat", str(path)), Findings()))


def values(path: object) -> list[Any]:
    return [record.value for record in read(path)]


def as_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=1)
    return sink.getvalue()


def as_arrow(rows: list[Any], kind: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue()


def as_csv(rows: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


FORMATS: dict[str, tuple[Callable[[list[Any]], bytes], list[Any]]] = {
    "a.json": (lambda rows: json.dumps(rows).encode(), ROWS),
    "b.json": (lambda rows: json.dumps({"data": rows, "version": [1]}, indent=1).encode(), ROWS),
    "c.json": (lambda rows: json.dumps({"version": 2, "rows": rows}, indent=1).encode(), ROWS),
    "d.json": (lambda rows: json.dumps({"version": 2, "rows": rows}).encode(), ROWS),
    "e.json": (as_jsonl, ROWS),
    "a.jsonl": (as_jsonl, ROWS),
    "a.parquet": (as_parquet, ROWS),
    "a.arrow": (as_arrow, ROWS),
    "stream.arrow": (lambda rows: as_arrow(rows, pa.ipc.new_stream), ROWS),
    "a.csv": (as_csv, TEXTS),
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_rows(tmp_path: Path, name: str, packing: str) -> None:
    write, rows = FORMATS[name]
    (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](write(rows)))
    assert values(tmp_path / f"{name}{packing}") == rows
    assert values(tmp_path) == rows  # the folder


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.arrow", "a.parquet"])
def test_documents_of_every_format_by_any_field(tmp_path: Path, name: str, packing: str) -> None:
    rows = [{"id": str(n), "body": text} for n, text in enumerate(("one\r\ntwo", "", "Thé 🙂"))]
    (tmp_path / f"{name}{packing}").write_bytes(PACKINGS[packing](FORMATS[name][0](rows)))
    read = documents.read_sources(find("doclist", str(tmp_path)), field="body")
    assert [document.text for document in read] == ["one\ntwo", "", "Thé 🙂"]
    with pytest.raises(UserError, match="Name the field with the text in field_text"):
        list(documents.read_sources(find("doclist", str(tmp_path))))


def test_a_folder_has_all_that_fits_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, (write, rows)) in enumerate(FORMATS.items()):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/{name}").write_bytes(write(rows))
    (tmp_path / "README.md").write_text("# About")
    assert values(tmp_path) == [row for _, rows in FORMATS.values() for row in rows]
    assert "left out README.md" in capsys.readouterr().err
    assert read(tmp_path)[-1].where == "9/a.csv:5"


def test_a_folder_of_save_to_disk_is_its_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    assert values(tmp_path / "saved") == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits train: give the folder of one of them"):
        values(tmp_path / "splits")
    assert values(tmp_path / "splits/train") == ROWS


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.fixed_dictionaries({"prompt": CELLS, "completion": CELLS.map(lambda t: t + ".")}), min_size=1))
def test_csv_reads_as_the_standard_library_reads_it(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv(rows))
    expected = list(csv.DictReader(io.StringIO(as_csv(rows).decode().replace("\r\n", "\n"))))
    assert values(tmp_path / "a.csv") == expected == rows


def test_utf16_with_a_mark_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(ROWS).decode().encode("utf-16"))
    (tmp_path / "b.csv").write_bytes(as_csv(TEXTS).decode().encode("utf-16"))
    assert values(tmp_path / "a.jsonl") == ROWS
    assert values(tmp_path / "b.csv") == TEXTS


def test_marks_and_other_ends_of_lines_and_blank_lines_change_nothing(tmp_path: Path) -> None:
    content = as_jsonl(ROWS).replace(b"\n", b"\r\n\r\n \r\n")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
    assert values(tmp_path / "a.jsonl") == ROWS
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + as_csv(TEXTS) + b"\r\n\r\n")
    assert values(tmp_path / "a.csv") == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "where", "sentence"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', "a.jsonl:2", "is not valid JSON, column 7"),  # the last line is cut
        ("a.jsonl", b'{"a": 1}\n\nno\n{"a": 2}', "a.jsonl:3", "is not valid JSON, column 1"),
        ("a.jsonl", b'{"a": 1}\r\n{"a": "\xe9"}\n{"a": 2}', "a.jsonl:2", r"is not UTF-8 at byte 17 of the file \(0xe9"),
        ("a.jsonl", b"[" * 100_000 + b"\n{}", "a.jsonl:1", "nests lists"),
        ("a.csv", b"a,b\n1,2\n3\n4,5", "a.csv:3", "has 1 fields, the header 2"),
        ("a.csv", b'a,b\n1,2\n"x\ny",\xe9\n4,5', "a.csv:3", "is not UTF-8 at byte 14 of the file"),
        ("a.csv", b'a,b\n1,2\n"x"y,3\n4,5', "a.csv:3", "is not valid CSV"),
        ("a.csv", b'a,b\n1,2\n"x,3\n4,5', "a.csv:3", "is not valid CSV"),
    ],
)
def test_a_bad_row_is_one_and_has_a_place(tmp_path: Path, name: str, content: bytes, where: str, sentence: str) -> None:
    import re

    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    (bad,) = (record for record in found if isinstance(record.value, Broken))
    assert bad.where == where
    assert re.match(sentence, bad.value.sentence)
    lines = content.count(b"\n") + 1 - name.endswith("csv")
    swallowed = 1 if content.count(b'"') % 2 and name.endswith("csv") else 0  # a quotation mark that is not closed
    inside = b"\ny" in content
    assert len(found) == lines - content.count(b"\n\n") - swallowed - inside


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty; a .csv has a line with the columns' names first"),
        ("a.csv", b"a,a\n1,2", "more than one column 'a'"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 and no more", "cannot be read as Arrow"),
        ("a.jsonl.gz", b"no such thing", "cannot be read: it is damaged or cut off"),
        ("a.jsonl.gz", gzip.compress(as_jsonl(ROWS * 99))[:-30], "cannot be read: it is damaged or cut off"),
        ("a.jsonl.zst", PACKINGS[".zst"](as_jsonl(ROWS * 99))[:-9], "cannot be read: it is damaged or cut off"),
        ("a.jsonl", b"PK\x03\x04", "is a ZIP archive"),
        ("a.json", b'[{"a": 1}, {"a": ', "element 2 is not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*{message}"):
        read(tmp_path / name)
