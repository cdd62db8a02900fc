"""The upload, against a Hub that speaks HTTP on this machine: what is sent, byte for byte, what never is, and its errors."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.console import UserError
from pipeline.publishing import after_training, push
from tests.helpers.artifacts import make_base
from tests.helpers.paths import ROOT
from tests.helpers.publishing import STEP, TOKEN, FakeHub, make_run, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The client as with HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET in the environment, and without HF_HUB_OFFLINE."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_by_the_environment_alone_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As a user has it: HF_ENDPOINT and HF_TOKEN; the merged model arrives byte for byte, and nothing else of the run."""
    run = make_run(tmp_path, ["push", "card", "merge"])
    program = (
        "from pathlib import Path; from pipeline.publishing.after_training import FinishedRun, follow\n"
        f"follow(FinishedRun(Path({str(run.run_dir)!r}), Path({str(run.saved)!r}), {STEP}, Path({str(run.base)!r}), 'again',"
        f" {run.asked!r}, {run.repository!r}, True))"
    )
    with serving() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stdout + done.stderr
    merged = run.run_dir / "merged"
    assert sorted(hub.files) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "fold_report.json",
        "generation_config.json",
        "loss.svg",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert all(content == (merged / name).read_bytes() for name, content in hub.files.items())
    assert {*hub.files, ".saved_at_step"} == {*names_below(merged)}
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("somebody", "a-style", "private")
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in content or b"secret place" in content for content in hub.files.values())
    assert not list(tmp_path.rglob(".cache"))


def test_an_adapter_goes_up_alone_whatever_lies_beside_it(tmp_path: Path, hub: FakeHub) -> None:
    run = make_run(tmp_path, ["push"])
    saved = run.saved
    planted = (
        "optimizer.safetensors",
        "rank-0.safetensors",
        "metrics.jsonl",
        "events.out.tfevents.1",
        "config.toml",
        ".lock",
        "global_step6/rank-0.safetensors",
        "dataset_cache/chunks.arrow",
        "model.safetensors",
        "scheduler.pt",
        "README.md",
    )
    for name in planted:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_bytes(b"not for others")
    after_training.follow(run)
    assert sorted(hub.files) == ["adapter_config.json", "adapter_model.safetensors"]
    assert hub.files["adapter_model.safetensors"] == (saved / "adapter_model.safetensors").read_bytes()
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.base)  # so that PEFT loads it on this machine
    assert json.loads(hub.files["adapter_config.json"]) == {**config, "base_model_name_or_path": "a-base"}


@pytest.mark.parametrize(
    ("asked", "folder", "weights"),
    [
        (["push", "card"], f"step{STEP}", "adapter_model.safetensors"),
        (["push", "card", "export:gguf"], "gguf", "adapter.gguf"),
        (["push", "card", "export:gguf", "export:peft"], "peft", "adapter_model.safetensors"),
    ],
)
def test_what_is_published(tmp_path: Path, hub: FakeHub, asked: list[str], folder: str, weights: str) -> None:
    run = make_run(tmp_path, asked)
    after_training.follow(run)
    assert hub.files[weights] == (run.run_dir / folder / weights).read_bytes()
    assert {weights, "README.md", "loss.svg"} <= set(hub.files) <= set(names_below(run.run_dir / folder))
    assert not any("global_step" in path or "rank-" in path for _, path in hub.requests)


def test_a_merged_model_without_a_card_does_not_go_up_under_the_base_s(tmp_path: Path, hub: FakeHub) -> None:
    base = make_base(tmp_path / "b")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    run = make_run(tmp_path, ["merge", "push"], base=base)
    after_training.follow(run)
    assert (run.run_dir / "merged/README.md").exists()
    assert "README.md" not in hub.files
    assert "model.safetensors" in hub.files


def test_a_model_of_several_files_goes_up_with_all_of_them(tmp_path: Path, hub: FakeHub) -> None:
    run = make_run(tmp_path, ["merge", "push"], base=make_base(tmp_path / "b", shard="40KB"))
    after_training.follow(run)
    index = json.loads(hub.files["model.safetensors.index.json"])
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"].values()) <= set(hub.files)


def test_without_push_no_token_is_read_and_nothing_connects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(push, "get_token", forbidden)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    run = make_run(tmp_path, ["merge", "export:peft", "card"])
    after_training.follow(run)
    assert (run.run_dir / "merged/README.md").exists()
    assert (run.run_dir / "peft/README.md").exists()


def test_a_public_repository_is_refused_where_a_private_one_is_wanted(tmp_path: Path, hub: FakeHub) -> None:
    hub.public.add("somebody/a-style")
    with pytest.raises(UserError, match="is public: nothing was uploaded"):
        after_training.follow(make_run(tmp_path / "1", ["push"]))
    assert not hub.files
    after_training.follow(make_run(tmp_path / "2", ["push"], private=False))
    assert sorted(hub.files) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not know the token"),
        (403, "may not write to somebody/a-style"),
        (500, r"\(500\): as this test wants"),
    ],
)
def test_what_the_hub_refuses(tmp_path: Path, hub: FakeHub, status: int, said: str) -> None:
    hub.status = status
    run = make_run(tmp_path, ["push"])
    with pytest.raises(UserError, match=said) as caught:
        after_training.follow(run)
    assert f"safe in {run.saved}" in str(caught.value)
    assert "  hf upload somebody/a-style " in str(caught.value)
    assert "--private" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert caught.value.exit_code == 2


def test_nobody_answers(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot reach the Hub at http://127"):
            after_training.follow(make_run(tmp_path, ["push"]))


def test_no_token_and_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push.check_ready()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="needs a token that may write"):
        push.check_ready()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1"):
        push.check_ready()
    assert not hub.requests


def test_a_checkpoint_is_not_a_thing_to_upload(tmp_path: Path) -> None:
    run = make_run(tmp_path, ["push"])
    with pytest.raises(UserError, match="neither an adapter nor a model"):
        push.files_of(run.run_dir / f"global_step{STEP}")
    with pytest.raises(UserError, match="neither an adapter nor a model"):
        push.files_of(run.run_dir)
