"""docs/samples.md: its configuration is valid, its commands run as they stand, on a small model."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli

import generate
from pipeline.config import loading
from pipeline.config.tables import Samples
from tests.helpers.builders import ROOT, save_model
from tests.helpers.configs import small
from tests.helpers.families import by_peft

PAGE = (ROOT / "docs" / "samples.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?m)^    (python generate\.py .*)$", PAGE)
LAUNCHED = re.findall(r"(?m)^    deepspeed --num_gpus 2 generate\.py (.*)$", PAGE)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("page")
    model = save_model(root / "base", "qwen2", layers=2)
    (root / "base" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.families.load_model", lambda _: model)
        by_peft(root / "base", root / "adapter", "lora")
    (root / "prompts.txt").write_text("The salt was\n")
    return {"BASE": str(root / "base"), "ADAPTER": str(root / "adapter"), "prompts.txt": str(root / "prompts.txt")}


def test_the_configuration_is_valid_and_its_comments_say_the_defaults() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    config = loading.validate(small(**tomli.loads(block)), "x.toml")
    assert config.samples is not None
    written = tomli.loads(block)["samples"]
    assert {key: Samples.model_fields[key].default for key in written if key != "prompts"} == {
        key: value for key, value in written.items() if key != "prompts"
    }


def test_there_are_commands_of_every_kind() -> None:
    assert len(COMMANDS) == 5
    assert len(LAUNCHED) == 1
    assert generate.parser().parse_args(shlex.split(LAUNCHED[0])).prompt


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(
    places: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["Who?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    _, *words = shlex.split(command)
    arguments: list[Any] = [places.get(word, word) for word in words]
    limit = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", [*arguments, *limit])
    assert generate.main() == 0
    said = capsys.readouterr().out
    assert "stopped after" in said or "reached the limit" in said
    assert ("base: " in said) == ("--compare" in arguments)


def test_what_it_names_is_there() -> None:
    assert Path(ROOT / "docs" / "config.md").read_text().count("## `[samples]`") == 1
