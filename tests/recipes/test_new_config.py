"""Configurations made for a model, data and GPUs. Oracle: --check accepts them, and their plan fits."""

import runpy
import sys
from pathlib import Path

import pytest
import transformers

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.recipes import choose as chooser
from pipeline.recipes.choose import Wish, choose, lengths
from pipeline.recipes.write import GROUPS
from pipeline.training.start import check
from tests.helpers.builders import BOOKS, ROOT, save_model

LARGE = transformers.LlamaConfig(
    hidden_size=2048,
    intermediate_size=11264,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=8192,
    max_position_embeddings=16384,
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """390 MiB in bf16, without weights."""
    folder = tmp_path_factory.mktemp("models") / "large"
    LARGE.save_pretrained(folder)
    return folder


def new_config(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["new_config.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "new_config.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_what_is_written_passes_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "base")
    toml = tmp_path / "config.toml"
    places = ["--model", str(tmp_path / "base"), "--data", str(BOOKS / "*.md"), "--output", str(toml)]
    options = ["--kind", "books", "--gpus", "2x24GiB", "--sequence-len", "64", "--output-dir", str(tmp_path / "runs")]
    assert new_config(monkeypatch, *places, *options) == 0
    text, said = toml.read_text(), capsys.readouterr().out
    assert text.startswith(f"#:schema {ROOT / 'configs' / 'schema.json'}\n")
    assert "# Chosen by the planner: bf16 weights, 1 stage, rows of 64 tokens." in text
    assert "# 2 replicas of it share each step." in text
    assert f"python train.py --config {toml} --check" in said
    config = loading.load(str(toml))
    assert config.pipeline_stages == 1
    assert check.check(config, None) == 0
    assert new_config(monkeypatch, *places, *options) == 2  # it is there already
    assert "--force" in capsys.readouterr().err


def test_what_is_missing_is_asked_for_where_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert new_config(monkeypatch, "--kind", "chat") == 2
    assert "--model: give it" in capsys.readouterr().err


def wish(model: Path, gpus: str, kind: chooser.Kind = "books", length: int | None = 256) -> Wish:
    return Wish(model, "large", kind, "x", gpus, "runs", length)


@pytest.mark.slow
def test_sixteen_bits_come_first_and_few_stages(large: Path) -> None:
    roomy = choose(wish(large, "2x24GiB")).raw
    assert roomy["pipeline_stages"] == 1
    assert "quantization" not in roomy
    cut = choose(wish(large, "2x1.35GiB")).raw  # half of the weights fit on one of them
    assert cut["pipeline_stages"] == 2
    assert "quantization" not in cut
    packed = choose(wish(large, "1x1.35GiB"))
    assert packed.raw["quantization"] == {"bnb": {"load_in_4bit": True}}
    beyond = "its weights alone are more than all GPUs have"
    assert any("bf16 weights, 1 stage" in reason and beyond in reason for reason in packed.reasons)


@pytest.mark.slow
def test_nothing_fits(large: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration of large fits.*4-bit weights"):
        choose(wish(large, "1x1.02GiB"))


def test_rows_are_shortened_unless_their_length_is_given(large: Path) -> None:
    assert lengths(wish(large, "1x24GiB", length=None)) == [8192, 4096, 2048, 1024]
    assert lengths(wish(large, "1x24GiB", "preference", None)) == [2048, 1024]
    assert lengths(wish(large, "1x24GiB", length=300)) == [300]


@pytest.mark.parametrize("kind", ["books", "chat", "preference"])
def test_every_key_has_its_group_and_every_kind_is_valid(large: Path, kind: chooser.Kind) -> None:
    raw = chooser.keys(wish(large, "1x24GiB", kind), chooser.Candidate(True, 1, 8.0, 64))
    grouped = {name for _, names in GROUPS for name in names}
    assert {name for name, value in raw.items() if not isinstance(value, dict | list)} <= grouped
    loading.validate(raw, "made")
