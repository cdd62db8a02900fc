"""For the tests of what follows a training: a finished run's folder, and a Hub that speaks HTTP on this machine.

The Hub answers what huggingface_hub's client asks for (repository, validation, preupload, LFS, commit) and keeps what it
was sent; nothing of the client is replaced.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.config import loading
from pipeline.publishing.after_training import FinishedRun
from tests.helpers.artifacts import make_base, multiplicative
from tests.helpers.configs import small

TOKEN = "hf_only_for_this_test"
STEP = 6
DATA = [
    {
        "use": "training",
        "name": "book",
        "documents": 3,
        "tokens": 12345,
        "chunks": 196,
        "sequence_len": 64,
        "rows": 372,
        "different": 186,
    },
    {
        "use": "evaluation",
        "name": "held_out",
        "documents": 1,
        "tokens": 700,
        "chunks": 11,
        "sequence_len": 64,
        "rows": 11,
        "different": 11,
    },
]
PART = {
    "from_step": 0,
    "to_step": 4,
    "seconds": 100.0,
    "stages": 2,
    "replicas": 1,
    "devices": ["NVIDIA A6000"] * 2,
    "peak_bytes": [3 << 30, 5 << 30],
    "versions": {"mulora-pipe": "0.2.0+g0123456789ab", "torch": "2.13.0", "peft": "0.21.2"},
}
PARTS = [PART, {**PART, "from_step": 4, "to_step": 6, "seconds": 50.0}]
METRICS = [
    {"step": 0, "eval/held_out/loss": 4.75, "eval/held_out/perplexity": 115.584284},
    *(
        {"step": n, "train/loss": 4.5 - n / 7, "train/tokens_per_s": 1000.0 + n, "train/epoch": n / 3}
        for n in range(1, 7)
    ),
    {"step": 3, "eval/held_out/loss": 4.1234567, "eval/held_out/perplexity": 61.7723},
    {"step": 6, "eval/held_out/loss": 3.9876543, "eval/held_out/perplexity": 53.928},
]


def make_run(
    folder: Path, asked: list[str], *, private: bool = True, base: Path | None = None, **changes: Any
) -> FinishedRun:
    """A run of STEP steps that has ended, in `folder`, with a checkpoint and all that must never be shared in it."""
    base = base or make_base(folder / "secret place" / "a-base")
    run_dir = folder / "secret place" / "runs" / "20260102_03-04-05"
    multiplicative(run_dir / f"step{STEP}", base_model=str(base))
    keys = {"hub_model_id": "somebody/a-style", "hub_private_repo": private, **changes}
    raw = small(model=str(base), output_dir=str(run_dir.parent), after_training=asked, **keys)
    raw["datasets"][0]["dataset_path"] = str(folder / "secret place" / "*.md")
    (run_dir / "config.toml").write_text(loading.to_toml(loading.validate(raw, "x.toml")))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (run_dir / "run.json").write_text(json.dumps({"format": 1, "data": DATA, "parts": PARTS}))
    checkpoint = run_dir / f"global_step{STEP}"
    checkpoint.mkdir()
    for name in ("manifest.json", "rank-0.safetensors"):
        (checkpoint / name).write_bytes(b"optimizer state")
    return FinishedRun(
        run_dir=run_dir,
        saved=run_dir / f"step{STEP}",
        step=STEP,
        base=base,
        resume_line="deepspeed train.py --resume_from_checkpoint x",
        asked=asked,
        repository="somebody/a-style",
        private=private,
    )


class FakeHub:
    """What the Hub was sent: `files` by path, `requests` as (method, path), `created` repositories as their payload.

    `public`: repositories that exist already and are public. `status`: with what every request is answered, if not 200.
    """

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.public: set[str] = set()
        self.status: int | None = None
        self.objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path.startswith("/lfs/"):
            oid = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            href = {o["oid"]: {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}} for o in objects}
            return 200, {"objects": [{**o, "actions": href[o["oid"]]} for o in objects]}
        if "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": modes[f["path"].endswith((".safetensors", ".gguf"))],
                        "shouldIgnore": False,
                    }
                    for f in json.loads(body)["files"]
                ]
            }
        if "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self._commit(repository, [json.loads(line) for line in body.splitlines()])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return 200, {"id": match[1], "private": match[1] not in self.public, "sha": "0" * 40}
        return 404, {"error": f"not played here: {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        self.created.append(wanted)
        return (409 if name in self.public else 200), {"url": f"{self.address}/{name}"}

    def _validate(self, content: str) -> tuple[int, Any]:
        """The Hub's rule for a base model, by which local folders fail."""
        base = re.search(r"^base_model: (.*)$", content.split("\n---")[0], re.M)
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1])
        return (
            (400, {"errors": [{"message": f'"base_model" with value "{base[1]}" is not valid.'}]})
            if wrong
            else (200, {"warnings": [], "errors": []})
        )

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "header", line
        return 200, {"commitUrl": f"{self.address}/{repository}/commit/1", "commitOid": "1" * 40, "success": True}


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A Hub on a free port of this machine."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
            if hub.status or not known:
                status, content = hub.status or 401, {"error": "as this test wants it"}
            else:
                status, content = hub.answer(self.command, path, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
