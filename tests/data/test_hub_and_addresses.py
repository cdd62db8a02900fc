"""Datasets that are not on this machine: on the Hub (a local server), in its cache, at addresses of fsspec's and of HTTP."""

import functools
import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import constants

from pipeline.console import UserError
from pipeline.data.reading import hub
from pipeline.data.reading.sources import find
from pipeline.data.streaming.sources import RemoteRows, rows_of
from tests.formats.test_hub import COMMIT, Hub
from tests.helpers.rows import stored, talk

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: small
  data_files: small/*.csv
---
Conversations.
"""
FILES = {
    "README.md": CARD.encode(),
    "data/train-00000-of-00002.jsonl": json.dumps(talk("a", "b")).encode(),
    "data/train-00001-of-00002.jsonl": json.dumps(talk("c", "d")).encode(),
    "data/test-00000-of-00001.jsonl": json.dumps(talk("e", "f")).encode(),
    "small/a.csv": b"prompt,completion\nNA,null\n",
    "picture.png": b"x",
}
TRAIN = [name for name in FILES if "train" in name]


class Datasets(Hub):
    """`owner/open`, and `owner/gated`, which nobody may read."""

    def do_POST(self) -> None:
        """What is at these paths: how datasets' stream asks of files."""
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("paths", [])
        type(self).asked.append(self.path)
        found = [
            {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for file, body in FILES.items()
            if file in wanted
        ]
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def answer(self, *, with_body: bool) -> None:
        type(self).asked.append(self.path)
        path = self.path.partition("?")[0]
        if "owner/open" not in path:
            return self.send(401, b"", {"X-Error-Code": "GatedRepo" if "gated" in path else "RepoNotFound"})
        if "/revision/" in path and path.split("/revision/")[1] not in ("main", "v1", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for f, b in FILES.items()
            ]
            siblings = [{"rfilename": file, "size": len(body)} for file, body in FILES.items()]
            info = {"id": "owner/open", "sha": COMMIT, "siblings": siblings}
            return self.send(
                200, json.dumps(tree if "/tree/" in path else info).encode(), {"Content-Type": "application/json"}
            )
        body = FILES[path.split(f"/resolve/{COMMIT}/")[1]]
        if (part := self.headers.get("Range")) is not None:
            first, last = part.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last or len(body)) + 1]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send(200, body, {"X-Repo-Commit": COMMIT, "ETag": etag}, with_body=with_body)
        return None


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the Hub was asked by this process, whose cache is empty."""
    handler = type("Handler", (Datasets,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", address),
        ("HF_HUB_CACHE", str(tmp_path / "hub")),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
    monkeypatch.chdir(tmp_path)
    yield handler.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def names(path: str, kind: str = "chat") -> list[str]:
    return [source.name for source in find(kind, path)]


def test_a_split_of_the_hub_is_downloaded_and_read(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert names("hub:owner/open") == TRAIN
    assert not any("test-" in path or "picture" in path for path in asked)
    assert names("hub:owner/open@v1:test") == ["data/test-00000-of-00001.jsonl"]
    store = stored(Path("hub:owner/open"))
    assert store.report.read == 2
    assert store.documents(0)[0].name == "data/train-00000-of-00002.jsonl:1"
    (small,) = find("completion", "hub:owner/open:small/train")
    assert small.path.read_bytes() == FILES["small/a.csv"]
    for path, message in (
        (
            "hub:owner/open:validation",
            r"has no split 'validation'; it has train, test: name one, as in hub:owner/open:train",
        ),
        ("hub:owner/open:large/train", r"cannot tell its splits: BuilderConfig 'large' not found"),
        ("hub:owner/open@v9", r"has no revision 'v9' on the Hub"),
        ("hub:owner/gated", r"owner/gated is gated: accept its terms at http.*/datasets/owner/gated"),
        ("hub:owner/other", r"shows no dataset of that name"),
        ("hub:open", r"is not hub:OWNER/NAME, with @REVISION"),
    ):
        with pytest.raises(UserError, match=message):
            names(path)
    with pytest.raises(
        UserError, match=r"'textfile' reads files in \.txt and \.md, not data/train-00000.*refs/convert/parquet"
    ):
        names("hub:owner/open", "textfile")
    # Where the Hub is not to be asked.
    asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert names("hub:owner/open") == TRAIN
    assert not asked
    (folder,) = {source.path for source in find("chat", "hub:owner/open") if "00001" in source.name}
    folder.unlink()
    with pytest.raises(
        UserError, match=r"1 of its files are not in the Hub's cache, 'data/train-00001-of-00002.jsonl' first"
    ):
        names("hub:owner/open")
    with pytest.raises(
        UserError, match=r"it is not in .*hub, and the Hub is not asked, as HF_HUB_OFFLINE is set.*--repo-type dataset"
    ):
        names("hub:owner/never")


def test_a_split_of_the_hub_is_streamed_and_not_downloaded(asked: list[str], tmp_path: Path) -> None:
    """By datasets, from the commit that the name means now."""
    there = [f"hf://datasets/owner/open@{COMMIT}/{name}" for name in TRAIN]
    assert hub.addresses("hub:owner/open") == there
    assert hub.addresses("hub:owner/open@v1:test") == [
        f"hf://datasets/owner/open@{COMMIT}/data/test-00000-of-00001.jsonl"
    ]
    assert not any("train-" in path and "/resolve/" in path for path in asked)
    source = rows_of("chat", "hub:owner/open", "talks")
    assert isinstance(source, RemoteRows)
    cursor = source.open(None)
    rows = [(record.where, [m["content"] for m in record.value["messages"]]) for record in cursor.take(9)]
    assert rows == [("talks#1", ["a", "b"]), ("talks#2", ["c", "d"])]
    assert cursor.ended
    assert not list((tmp_path / "hub").rglob("*.jsonl"))
    for path, message in (
        ("hub:owner/gated", r"owner/gated is gated: accept its terms at http.*/datasets/owner/gated"),
        ("hub:owner/open:validation", r"has no split 'validation'; it has train, test"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of("chat", path, "talks")
    with pytest.raises(UserError, match=r"files of one kind are streamed, .*; it has \.csv"):
        rows_of("completion", "hub:owner/open:small/train", "pairs")


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hub:a/b", ("a/b", None, None, None)),
        ("hub:a/b@refs/convert/parquet:train", ("a/b", "refs/convert/parquet", None, "train")),
        ("hub:a/b-c.d:en/test", ("a/b-c.d", None, "en", "test")),
    ],
)
def test_names_of_the_hub(path: str, parts: tuple[Any, ...]) -> None:
    assert tuple(hub.parsed(path)) == parts


# Addresses


def test_files_in_another_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    there, bucket = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    for name, text in (("a.txt", "one"), ("deep/b.txt", "two"), ("c.jsonl", "{}"), ("[d].txt", "four")):
        there.pipe(f"{bucket}/{name}", text.encode())
    address = f"memory:/{bucket}"
    assert names(f"{address}/*.txt", "textfile") == ["[d].txt", "a.txt"]
    assert names(f"{address}/**/*.txt", "textfile") == ["[d].txt", "a.txt", "deep/b.txt"]
    assert names(address, "chat") == ["c.jsonl"]
    assert names(f"{address}/deep/b.txt", "textfile") == ["b.txt"]
    (before,) = find("textfile", f"{address}/a.txt")
    assert before.path.read_text() == "one"
    there.get_file, fetch = None, there.get_file  # a copy that is there is taken
    assert find("textfile", f"{address}/a.txt") == [before]
    there.get_file = fetch
    there.pipe(f"{bucket}/a.txt", b"changed")
    (after,) = find("textfile", f"{address}/a.txt")
    assert (after.path.read_text(), before.path.read_text()) == ("changed", "one")
    with pytest.raises(
        UserError, match=r"names no file that this dataset_type reads; it has 1 files, 'c\.jsonl' first"
    ):
        names(f"{address}/c.jsonl", "textfile")
    with pytest.raises(UserError, match="reads; nothing is there"):
        names(f"{address}/x*.txt", "textfile")
    with pytest.raises(UserError, match=r"s3://a/b\.txt': Install s3fs"):
        names("s3://a/b.txt", "textfile")
    with pytest.raises(UserError, match=r"nowhere://a.*cannot be fetched: Protocol not known"):
        names("nowhere://a", "textfile")


def test_a_file_at_a_web_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a b.txt").write_text("from afar")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/a%20b.txt"
    try:
        (source,) = find("textfile", address)
        assert (source.name, source.path.read_text()) == ("a b.txt", "from afar")
        assert find("textfile", address) == [source]
        with pytest.raises(UserError, match="cannot be fetched: Client error '404"):
            find("textfile", address.replace("a%20b", "c"))
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match=r"cannot be fetched: .*\(ConnectError\)"):
        find("textfile", address)
