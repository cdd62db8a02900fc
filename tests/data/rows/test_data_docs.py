"""docs/data-*.md: each page's example is a dataset that --preview reads and that trains what the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import tomli

from pipeline.config import loading
from pipeline.data.chat.builtin import BUILT_IN
from pipeline.training.start import check
from tests.helpers.configs import small
from tests.helpers.paths import ROOT

PAGES = {path.stem.removeprefix("data-"): path for path in sorted((ROOT / "docs").glob("data-*.md"))}
# What the preview shows of the page's rows, in whatever order.
SHOWN = {
    "text": ["⟦news.jsonl#1⟧The river rose", "⟦EOS <EOS>⟧⟦"],
    "chat": ["What is a sluice?\n\n### Response:\n«A gate for water.⟦EOS <EOS>⟧»"],
    "completion": [
        "weir: «a low dam",
        "»",
        "Say what it is.\n\na lock\n\n«Two gates with a boat between them.⟦EOS <EOS>⟧»",
    ],
    "preference": [
        "sluice:« a gate for water⟦EOS <EOS>⟧»",
        "sluice:« a kind of boat⟦EOS <EOS>⟧»",
        "«A key.⟦EOS <EOS>⟧»",
    ],
    "streaming": ["⟦stories.jsonl:1⟧The miller", "stories.jsonl:2⟧"],
    "pretokenized": ["of 'ids', 5 tokens, 3 of them predicted", "of 'ids', 4 tokens, 3 of them predicted"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose tokenizer has a chat template."""
    from tests.helpers.builders import save_model

    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(folder)
    (folder / "chat_template.jinja").write_text(BUILT_IN["alpaca"])
    return folder


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_there_is_a_page_for_each_kind() -> None:
    assert set(PAGES) == set(SHOWN)


@pytest.mark.parametrize(("kind", "place", "shown"), [("unpaired", 0, "« a tall tower"), ("ranked", 1, "« a wall")])
def test_rows_of_the_other_kinds_of_preferences_are_read(
    kind: Any, place: int, shown: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(blocks(PAGES["preference"], "json")[place])
    rows = {"dataset_type": kind, "dataset_path": str(tmp_path / "rows.jsonl"), "sequence_len": 64}
    loss = {"unpaired": "kto", "ranked": "plackett_luce"}[kind]
    raw = small(
        model=str(model),
        output_dir=str(tmp_path / "runs"),
        pipeline_stages=1,
        micro_batch_size_per_gpu=2,
        datasets=[{**rows, "ranks": 3} if kind == "ranked" else rows],
        target_modules=["down_proj"],
        objective={"type": "preference", "loss_type": loss},
    )
    assert check.check(loading.validate(raw, "x.toml"), 9) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("kind", SHOWN)
def test_the_example_of_the_page_is_a_dataset(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (rows,), (table,) = blocks(PAGES[kind], "jsonl"), blocks(PAGES[kind], "toml")
    assert len(table.splitlines()) <= 10
    datasets = tomli.loads(table)["datasets"]
    path = Path(datasets[0]["dataset_path"])
    assert f"`{path}`" in PAGES[kind].read_text(encoding="utf-8")
    path.parent.mkdir()
    path.write_text(rows)
    goes_with: dict[str, dict[str, Any]] = {
        "preference": {"objective": {"type": "preference"}},
        "streaming": {"epochs": None, "max_steps": 3},
    }
    raw = small(
        model=str(model),
        output_dir="runs",
        pipeline_stages=1,
        datasets=datasets,
        target_modules=["down_proj"],
        **goes_with.get(kind, {}),
    )
    assert check.check(loading.validate(raw, "x.toml"), 9) == 0
    said = capsys.readouterr()
    for text in SHOWN[kind]:
        assert text in said.out, said.out
    assert "warning" not in said.err
