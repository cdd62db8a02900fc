"""`--preview` on a terminal, in colours, and `--prepare`, which ends where the data is in the cache."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipeline.config import loading
from pipeline.console import UserError
from pipeline.data.chat.builtin import BUILT_IN
from pipeline.data.rows import makers
from pipeline.training.start import check
from tests.helpers.builders import save_model
from tests.helpers.configs import small
from tests.helpers.rows import talk, write_jsonl

# Select Graphic Rendition (ECMA-48, 8.3.117).
BOLD, DIM, INVERSE, GREEN, CYAN = 1, 2, 7, 32, 36


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder)
    (folder / "chat_template.jinja").write_text(BUILT_IN["alpaca"])
    return folder


def config_of(base: Path, folder: Path, **changes: Any) -> Any:
    rows: list[Any] = [talk("Is it late?", "It is."), talk("Why?", ""), *[talk("Is it?", "No."), "{"] * 2]
    dataset: dict[str, Any] = {
        "name": "talks",
        "dataset_type": "chat",
        "dataset_path": str(write_jsonl(folder / "a.jsonl", rows)),
        "sequence_len": 128,
        "max_bad_rows": 0.5,
        **changes,
    }
    dataset = {key: value for key, value in dataset.items() if value is not None}
    raw = small(model=str(base), output_dir=str(folder / "runs"), target_modules=["down_proj"], datasets=[dataset])
    return loading.validate(raw, "x.toml")


def styled(printed: str) -> list[tuple[str, frozenset[int]]]:
    """The pieces of what a terminal is sent, each with the codes that are on."""
    pieces, on = [], frozenset[int]()
    for code, text in re.findall(r"(?:\x1b\[([\d;]*)m)?([^\x1b]*)", printed):
        if code:
            on = frozenset() if code == "0" else on | {int(number) for number in code.split(";")}
        if text:
            pieces.append((text, on))
    return pieces


def test_a_preview_on_a_terminal_is_in_colours_and_counts_the_dataset(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert check.check(config_of(base, tmp_path, packing="best_fit"), 1) == 0
    said = capsys.readouterr().out
    pieces = styled(said)
    codes = dict(pieces)
    targets = {text for text, on in pieces if {BOLD, GREEN} <= on}
    assert {text for text in targets if not text.startswith("⟦")} == {"It is.", "No."}
    assert any(INVERSE in codes[text] and "EOS" in text for text in targets)  # a special token, trained
    masked = "".join(text for text, on in pieces if DIM in on and INVERSE not in on)
    assert "Is it late?" in masked
    assert "### Response:" in masked
    assert [CYAN in codes[text] for text in codes if text.startswith("⟦a.jsonl:")] == [True] * 3  # borders
    assert any(re.fullmatch(r"⟦\d+ × padding⟧", text) for text in codes)
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    assert "bad, left out: 2 × not valid JSON (a.jsonl:4, a.jsonl:6)" in plain
    assert "bad, left out: 1 × empty answer (a.jsonl:2)" in plain
    assert "talks: 6 conversations read = 3 rows of 119 tokens, 14 of them (11.8%) targets, 3 of these stops" in plain


def test_prepare_puts_the_data_into_the_cache_and_ends(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weight is read; what comes after makes no row."""
    read: list[Any] = []
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *a, **k: read.append(a))
    config = config_of(base, tmp_path)
    assert check.prepare_data(config) == 0
    (store,) = (tmp_path / "runs" / "dataset_cache").glob("*/rows*")
    assert f"prepared: in {tmp_path / 'runs' / 'dataset_cache'}" in capsys.readouterr().out
    assert not read
    assert not list((tmp_path / "runs").glob("*/config.toml"))  # and no run begun

    def made(*_: Any) -> Any:
        raise AssertionError("a row is made again")

    monkeypatch.setattr(makers.Chat, "__call__", made)
    assert check.check(config, None) == 0
    assert store.exists()


@pytest.mark.parametrize("kind", ["pretokenized", "chat"])
def test_one_bad_row_of_two_hundred_is_too_much_where_a_program_wrote_them(
    base: Path, tmp_path: Path, kind: str
) -> None:
    """`max_bad_rows` is 0.01, and 0 of token ids, which nobody types."""
    good = {"input_ids": [5, 6, 7]} if kind == "pretokenized" else talk("Is it?", "It is.")
    path = write_jsonl(tmp_path / "b.jsonl", [good] * 199 + ["{"])
    config = config_of(base, tmp_path, dataset_type=kind, dataset_path=str(path), max_bad_rows=None)
    if kind == "chat":
        assert check.check(config, None) == 0
        return
    with pytest.raises(UserError, match=r"1 of 200 rows are bad \(0\.5%\), more than max_bad_rows = 0 allows"):
        check.check(config, None)
