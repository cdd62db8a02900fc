"""A model by its name on the Hub: from a local server that speaks the Hub's protocol, from its cache, and refused in words."""

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from pipeline.console import UserError
from pipeline.formats.hub import awaits_weights, model_folder
from pipeline.names import hub_model, id_in_cache
from tests.helpers.builders import ROOT, environment

COMMIT = "c" * 40
NOWHERE = "http://127.0.0.1:9"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
WANTED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"as is",
    INDEX: json.dumps({"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    **{name: name.encode() * 1000 for name in SHARDS},
}
UNWANTED = dict.fromkeys(
    ("pytorch_model.bin", "consolidated.safetensors", "original/params.json", "original/model.safetensors", "x.gguf"),
    b"x",
)
FILES = WANTED | UNWANTED
GIVE = "import sys; from pipeline.console import run_command; from pipeline.formats.hub import model_folder; "
GIVE += "run_command(lambda: print('folder:', model_folder(sys.argv[1], 'model')) or 0)"


class Hub(BaseHTTPRequestHandler):
    """`owner/open`, `owner/huge`, `owner/pickles`, and `owner/gated`, which nobody may read."""

    asked: list[str]  # methods and paths, of the server's class

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if name == "owner/gated":
            return self.send(401, b"", {"X-Error-Code": "GatedRepo"})
        if name not in ("owner/open", "owner/huge", "owner/pickles"):
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if "/revision/" in path:
            revision = path.split("/revision/")[1]
            if revision not in ("main", COMMIT):
                return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/"):
            body = self.tree(name) if "/tree/" in path else self.info(name)
            return self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        body = FILES[path.split(f"/resolve/{COMMIT}/")[1]]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send(200, body, {"X-Repo-Commit": COMMIT, "ETag": etag}, with_body=with_body)
        return None

    def files(self, name: str) -> dict[str, int]:
        sizes = {file: len(body) for file, body in FILES.items()}
        if name == "owner/huge":
            sizes[SHARDS[0]] = 2**60
        return sizes if name != "owner/pickles" else {k: sizes[k] for k in ("config.json", "pytorch_model.bin")}

    def info(self, name: str) -> dict[str, Any]:
        siblings = [{"rfilename": file, "size": size} for file, size in self.files(name).items()]
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}

    def tree(self, name: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file, "size": size, "oid": hashlib.sha1(FILES[file]).hexdigest()}
            for file, size in self.files(name).items()
        ]

    def send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    handler = type("Handler", (Hub,), {"asked": []})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}", handler.asked  # type: ignore[attr-defined]
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def asked(server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server was asked by this process, whose cache is empty."""
    for name, value in (("ENDPOINT", server[0]), ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server[0] + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    return server[1]


def downloads(asked: list[str]) -> list[str]:
    return [line for line in asked if line.startswith("GET") and "/resolve/" in line]


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("CohereForAI/c4ai-command-r-v01", ("CohereForAI/c4ai-command-r-v01", None)),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", None),
        ("./a/b", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("a/../b", None),
        ("models/x-Q4_K_M.gguf", None),
        ("a/b@../c", None),
    ],
)
def test_what_names_a_model_on_the_hub(text: str, named: tuple[str, str | None] | None) -> None:
    assert hub_model(text) == named


def test_downloaded_once_whole_and_nothing_else_and_then_from_the_cache(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    light = model_folder("owner/open", "model", weights=False)
    assert names(Path(light)) == WANTED.keys() - set(SHARDS)
    assert awaits_weights(Path(light))
    assert "are not here yet; a run downloads them" in capsys.readouterr().out
    assert model_folder("owner/open@main", "model") == light
    folder = Path(light)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == WANTED
    assert (folder.name, id_in_cache(folder)) == (COMMIT, "owner/open")
    assert not awaits_weights(folder)
    assert not [line for line in asked if any(name in line for name in UNWANTED)]
    assert len(downloads(asked)) == len(WANTED)
    assert model_folder("owner/open", "model") == light
    assert len(downloads(asked)) == len(WANTED)
    # With a server that is not there, and offline: what is whole in the cache, and not what is not.
    with monkeypatch.context() as no_network:
        no_network.setattr(constants, "ENDPOINT", NOWHERE)
        assert model_folder("owner/open", "model") == light
        assert "cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder("owner/open", "model") == model_folder(f"owner/open@{COMMIT}", "model") == light
    assert not capsys.readouterr().err
    (folder / SHARDS[1]).unlink()
    with pytest.raises(UserError, match="it is not whole in"):
        model_folder("owner/open", "model")
    assert model_folder("owner/open", "model", weights=False) == light


def test_of_several_processes_one_downloads(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", GIVE, "owner/open"]
    several = [
        subprocess.Popen(
            command,
            env=environment(**env, WORLD_SIZE="3", RANK=str(rank), PYTHONPATH=str(ROOT)),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (2, 1, 0)
    ]
    said = [process.communicate(timeout=60)[0] for process in several]
    assert [process.returncode for process in several] == [0, 0, 0]
    assert len({line for out in said for line in out.splitlines() if line.startswith("folder: ")}) == 1
    assert len([line for line in asked if line.startswith("GET /api/models/owner/open?")]) == 1
    assert len(downloads(asked)) == len(WANTED)


def test_a_folder_of_that_name_goes_first(asked: list[str], tmp_path: Path) -> None:
    (tmp_path / "owner" / "open").mkdir(parents=True)
    assert model_folder("owner/open", "model") == "owner/open"
    assert not asked


def test_the_same_folder_as_huggingface_hub_finds_offline(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("owner/open", "model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download("owner/open", allow_patterns=["model*", "config.json"]) == folder


@pytest.mark.parametrize(
    ("model", "constant", "code", "said"),
    [
        ("owner/gated", {}, 2, "owner/gated is gated: accept its terms at http://127.0.0.1"),
        ("owner/none", {}, 2, "shows no model of that name: check the spelling"),
        ("owner/open@v9", {}, 2, "owner/open has no revision 'v9' on the Hub"),
        (
            "owner/pickles",
            {},
            2,
            "neither model.safetensors nor model.safetensors.index.json; it has pytorch_model.bin",
        ),
        ("owner/huge", {}, 28, "not enough disk space"),
        ("owner/open", {"HF_HUB_OFFLINE": True}, 2, "the Hub is not asked, as HF_HUB_OFFLINE is set"),
        ("owner/open", {"ENDPOINT": NOWHERE}, 2, "cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_one_message(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, model: str, constant: dict[str, Any], code: int, said: str
) -> None:
    for name, value in constant.items():
        monkeypatch.setattr(constants, name, value)
    with pytest.raises(UserError) as caught:
        model_folder(model, "model")
    assert caught.value.exit_code == code
    assert str(caught.value).startswith(f"model = '{model}': ")
    assert said in str(caught.value)


def test_train_says_it_in_one_line_and_ends_with_2(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE=1, before anything heavy is imported."""
    config = (ROOT / "configs" / "config_creative_writer.toml").read_text()
    (tmp_path / "x.toml").write_text(re.sub(r"(?m)^model *=.*$", "model = 'owner/model'", config))
    command = [sys.executable, str(ROOT / "train.py"), "--config", "x.toml", "--check"]
    env = environment(HF_HOME=str(tmp_path))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: model = 'owner/model': there is no such folder here")
    assert len(done.stderr.splitlines()) == 1
