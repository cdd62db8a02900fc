"""JSON, TOML, front matter and safetensors headers of others: whatever is in them, the outcome is a value or a UserError.

Oracles: Python's own json and tomli for what is accepted, safetensors' own reader for headers.
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save_file

from pipeline import foreign
from pipeline.config import loading
from pipeline.console import UserError
from pipeline.formats.safetensors import load_tensors, read_header
from pipeline.publishing.card import licence
from tests.helpers.configs import small

DAMAGED_JSON = {
    "nothing": b"",
    "cut short": b'{"a": [1, 2',
    "no JSON": b"<html>404</html>",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "half of a surrogate pair": rb'{"a": "\ud800"}',
    "the same as a key": rb'{"\udfff": 1}',
    "the same in a list": rb'[["\ud83d"]]',
    "a key twice": b'{"a": 1, "a": 2}',
    "a key twice, within": b'{"x": [{"a": 1, "a": 2}]}',
    "a control character": b'{"a": "\x1b"}',
    "brackets for ever": b"[" * 100_000,
    "nested 400 deep": b"[" * 400 + b"]" * 400,
    "objects 400 deep": b'{"a":' * 400 + b"1" + b"}" * 400,
    "4 300 digits": b'{"a": ' + b"9" * 4300 + b"}",
    "5 000 digits": b'{"a": -' + b"9" * 5000 + b"}",
    "two values": b"{} {}",
    "a comma at the end": b'{"a": 1,}',
}


@pytest.mark.parametrize("kind", DAMAGED_JSON)
def test_damaged_json_is_one_message_with_its_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(DAMAGED_JSON[kind])
    with pytest.raises(UserError, match=r"x\.json (does not read as JSON: .|nests deeper)") as refused:
        foreign.read_json(file, "a test")
    assert "\n" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_what_is_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"[]" + b" " * 100)
    monkeypatch.setattr(foreign, "JSON_LIMIT_BYTES", 100)
    for name, words in (
        ("nowhere", "is missing"),
        (".", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("loop", "cannot be read"),
        ("a\0b", "cannot be read"),
        ("x" * 300, "cannot be read"),
        ("large", "102 bytes"),
    ):
        with pytest.raises(UserError, match=f"{words}.*a test"):
            foreign.read_json(tmp_path / name, "a test")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON_VALUES, st.booleans())
def test_honest_json_is_read_as_python_reads_it(value: Any, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert foreign.parse_json(text.encode(), "x") == foreign.parse_json(text, "x") == json.loads(text)


@settings(max_examples=300)
@given(JSON_VALUES, st.data())
def test_any_bytes_are_json_as_python_reads_it_or_a_message(value: Any, data: st.DataObject) -> None:
    raw = spoilt(json.dumps(value, ensure_ascii=False).encode(), data)
    try:
        found = foreign.parse_json(raw, "x")
    except UserError:
        return
    assert repr(found) == repr(json.loads(raw))  # repr: NaN is not itself


def spoilt(raw: bytes, data: st.DataObject, within: int = 1 << 30) -> bytes:
    """`raw` with a few bytes replaced, put in, taken out, or cut off."""
    changed = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        at = data.draw(st.integers(0, min(len(changed), within)), "at")
        what = data.draw(st.sampled_from(("replace", "insert", "remove", "cut")), "what")
        if what == "cut":
            del changed[at:]
        elif what == "remove":
            del changed[at : at + data.draw(st.integers(1, 8), "bytes")]
        else:
            piece = data.draw(st.binary(min_size=1, max_size=4), "piece")
            changed[at : at + (len(piece) if what == "replace" else 0)] = piece
    return bytes(changed)


DAMAGED_TOML = {
    "arrays 400 deep": "x = " + "[" * 400 + "]" * 400,
    "inline tables 400 deep": "x = " + "{a = " * 400 + "1" + "}" * 400,
    "a key of 1 000 parts": "a." * 999 + "a = 1",
    "a table of 1 000 parts": "[" + "a." * 999 + "a]",
    "4 300 digits": "seed = " + "9" * 4300,
    "5 000 digits": "seed = " + "9" * 5000,
    "65 bits": f"seed = {2**64}",
    "hexadecimal": "seed = 0x" + "f" * 6000,
    "a NUL": r'output_dir = "a\u0000b"',
    "not UTF-8": b'output_dir = "\xff"',
    "UTF-16": "x = 1".encode("utf-16"),
    "brackets for ever": "x = " + "[" * 100_000,
    "a control character": 'model = "\x1b[2J"',
    "2 MB": "# " + "x" * 2_000_000,
}


@pytest.mark.parametrize("kind", DAMAGED_TOML)
def test_a_damaged_config_is_one_message_with_its_file(kind: str, tmp_path: Path) -> None:
    content = DAMAGED_TOML[kind]
    file = tmp_path / "x.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"x\.toml") as refused:
        loading.load(str(file))
    assert refused.value.exit_code == 2
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "a." * 999 + "a=1",
        "seed=" + "9" * 4300,
        "seed=" + "9" * 5000,
        "seed=" + "[" * 400 + "]" * 400,
        "datasets.²=1",
        "datasets.-1=1",
        "datasets." + "9" * 5000 + "=1",
        f"seed={2**70}",
        r'output_dir="a\u0000b"',
        "datasets.0x0.sequence_len=1",
        "\x1b[2J=1",
    ],
    ids=lambda override: override[:20].encode("unicode_escape").decode(),
)
def test_a_damaged_override_is_one_message(override: str, tmp_path: Path) -> None:
    import tomli_w

    (tmp_path / "x.toml").write_text(tomli_w.dumps(small()))
    with pytest.raises(UserError) as refused:
        loading.load(str(tmp_path / "x.toml"), overrides=[override])
    assert refused.value.exit_code == 2


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_config_or_a_message(tmp_path: Path, data: st.DataObject) -> None:
    import tomli_w

    file = tmp_path / "x.toml"
    file.write_bytes(spoilt(tomli_w.dumps(small()).encode(), data))
    try:
        loading.load(str(file))
    except UserError as refused:
        assert "x.toml" in str(refused)
    else:
        assert tomli.loads(file.read_text("utf-8-sig"))


LAUGHS = "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmno"))
DAMAGED_CARDS = {
    "brackets for ever": "[" * 50_000,
    "a list": "- a",
    "a text": "just words",
    "no YAML": "a: [b",
    "tabs": "a:\n\t- b",
    "an impossible date": "license: 2020-99-99",
    "a Python object": "license: !!python/object/apply:os.system [id]",
    "itself": "license: &a [*a]",
    "a number": "license: 3",
    "nothing": "license:",
    "objects": "license: {a: b}",
    "laughs": "a: &a [x, x, x]\n" + LAUGHS,
    "a link that is a list": "license: mit\nlicense_link: [a]",
    "much": "x: " + "y" * 200_000,
}


@pytest.mark.parametrize("kind", DAMAGED_CARDS)
def test_a_damaged_card_of_the_base_tells_no_licence(kind: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{DAMAGED_CARDS[kind]}\n---\n# A model\n")
    assert licence(tmp_path, "owner/name") in ({}, {"license": "mit"})


def test_cards_that_are_no_text(tmp_path: Path) -> None:
    for content in (b"---\nlicense: \xff\n---\n", b"", b"---\n", b"# no front matter\n---\nlicense: mit\n---\n"):
        (tmp_path / "README.md").write_bytes(content)
        assert licence(tmp_path, None) == {}
    (tmp_path / "README.md").write_bytes("\ufeff---\r\nlicense: apache-2.0\r\n---\r\ntext".encode())
    assert licence(tmp_path, None) == {"license": "apache-2.0"}


# --- safetensors headers


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with metadata and tensors of three dtypes."""
    file = tmp_path_factory.mktemp("stored") / "x.safetensors"
    tensors = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.tensor([1]),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return file.read_bytes()


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    "1",
    "",
    [],
    {},
    [[]],
    2**63,
    10**90,
    [1, 2, 3, 4],
    [-1, 1],
    [True],
    [1.0, 2.0],
    ["a"],
    [2**62, 2**62, 4],
    [0, 10**9],
    [5, 1],
    [None],
    [1] * 65,
    float("nan"),
    "BOOL\x1b",
    "F33",
)


def strange_headers(header: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Headers that are wrong in one place, by what it is. Each is refused: none says the same as `header`."""
    for value in STRANGE:
        if not isinstance(value, dict):
            yield f"the header is {value!r}", value
        if not (value is None or value == {}):
            yield f"__metadata__ = {value!r}", header | {"__metadata__": value}
        if not isinstance(value, str):
            yield f"metadata's value = {value!r}", header | {"__metadata__": {"format": value}}
        yield f"a.weight = {value!r}", header | {"a.weight": value}
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{key} = {value!r}", header | {"a.weight": header["a.weight"] | {key: value}}
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no {key}", header | {"a.weight": {k: v for k, v in header["a.weight"].items() if k != key}}
    yield "one key more", header | {"a.weight": header["a.weight"] | {"stride": [1]}}
    for name in ("a\x1b[2J", "a\nb", "a\x07", "a\0", "a\u202eb", "x" * 2000):
        yield f"named {name[:9]!r}", {(name if k == "a.weight" else k): v for k, v in header.items()}
    begin, end = header["a.weight"]["data_offsets"]
    for offsets in (
        [begin + 1, end + 1],
        [begin, end + 1],
        [begin, end - 1],
        [begin - 4, end - 4],
        [0, end],
        [end, begin],
    ):
        if offsets != [begin, end]:
            yield f"at {offsets}", header | {"a.weight": header["a.weight"] | {"data_offsets": offsets}}
    text = json.dumps(header)
    yield "an entry twice", (text[:-1] + ', "b": ' + json.dumps(header["b"]) + "}").encode()
    yield "half of a surrogate pair", text.replace("a.weight", r"\ud800").encode()
    yield "400 deep", b'{"a":' * 400 + b"1" + b"}" * 400
    yield "brackets for ever", b"[" * 50_000
    yield "4 300 digits", text.replace(f"[{begin}, {end}]", f"[{begin}, {'9' * 4300}]").encode()
    yield "not UTF-8", text.encode().replace(b"a.weight", b"a.\xff\xff")


def test_strange_headers_are_refused_by_file(stored: bytes, tmp_path: Path) -> None:
    header, data = parts(stored)
    file, count = tmp_path / "x.safetensors", 0
    for what, strange in strange_headers(header):
        file.write_bytes(packed(strange, data))
        try:
            read_header(file)
        except UserError as refused:
            assert "x.safetensors" in str(refused), what
            assert str(refused).isprintable(), what
            count += 1
        else:
            raise AssertionError(f"accepted: {what}")
    assert count > 100


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:8],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: bytes(8) + raw[8:],
        lambda raw: raw[:40],
    ],
)
def test_files_that_are_not_whole(stored: bytes, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(spoil(stored))
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_header(file)


@pytest.mark.parametrize("name", ["nowhere", "folder", "a\0b"])
def test_what_cannot_be_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path / name)


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_header_that_is_accepted_says_what_safetensors_reads(
    stored: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(spoilt(stored, data, within=len(stored)))
    try:
        header = read_header(file)
    except UserError:
        return
    theirs = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in deserialize(file.read_bytes())}
    assert {t.name: (t.dtype, t.shape) for t in header.tensors} == theirs
    for tensor, (name, entry) in zip(header.tensors, sorted_by(header, deserialize(file.read_bytes())), strict=True):
        assert file.read_bytes()[tensor.start : tensor.start + tensor.n_bytes] == bytes(entry["data"]), name
    try:
        load_tensors(header)
    except UserError as refused:  # a dtype that torch does not have
        assert "x.safetensors" in str(refused)


def sorted_by(header: Any, entries: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    order = [tensor.name for tensor in header.tensors]
    return sorted(entries, key=lambda entry: order.index(entry[0]))
