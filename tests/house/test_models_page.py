"""docs/models.md, `train.py --list-models` and their record are one: what the families' tests found, of every family."""

from importlib.metadata import version
from pathlib import Path

import pytest

from docs import models as docs
from pipeline.commands import known_models
from pipeline.commands.known_models import COLUMNS, TEXT_HALF, UNTRIED, Cell
from pipeline.training.start import arguments
from tests.helpers.what_works import note


def test_the_page_is_what_the_record_says() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "run python -m docs.models"


def test_the_list_has_every_family_that_trains(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--list-models"])
    with pytest.raises(SystemExit) as ended:
        arguments.parse()
    assert not ended.value.code
    shown = capsys.readouterr().out
    _, found = known_models.read()
    listed = {line.split("  ")[0] for line in shown.splitlines()}
    assert {family for family, cells in found.items() if known_models.trains(cells)} <= listed
    assert not {family for family, cells in found.items() if not known_models.trains(cells)} & listed


def test_every_family_of_the_tests_is_there() -> None:
    """With the transformers of the record; a newer one has more families."""
    versions, found = known_models.read()
    if versions["transformers"] != version("transformers"):
        pytest.skip("the record is of another transformers")
    from tests.model import test_every_family as families
    from tests.model import test_text_halves as halves

    tried = {*families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(f"{kind}{TEXT_HALF}" for kind in halves.KINDS)}
    assert found.keys() == tried
    for cells in found.values():
        assert UNTRIED in cells or cells.keys() <= COLUMNS.keys()
    refused = {f for f, cells in found.items() if cells and UNTRIED not in cells and not known_models.trains(cells)}
    assert refused <= families.NEVER.keys()
    one = {family for family, cells in found.items() if known_models.word(cells, "stages") == "one"}
    assert one <= families.NEVER_CUT.keys()
    assert not {*families.NEVER, *families.NEVER_CUT} & {
        f for f, c in found.items() if c.get("stages", Cell(None)).works
    }


def test_what_tests_note_comes_into_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[str] = []
    note(lambda _, value: noted.append(value), "llama", "stages", True, "0")
    note(
        lambda _, value: noted.append(value), "llama", "lora", False, "2 problems:\n  why it\n  not\n  dataset_path = x"
    )
    properties = "".join(f"<property name='{docs.PROPERTY}' value='{value}'/>" for value in noted)
    cases = (
        f"<testcase name='a'><properties>{properties}</properties></testcase><testcase name='b'><failure/></testcase>"
    )
    (tmp_path / "found.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    monkeypatch.setattr(docs, "RECORD", tmp_path / "models.json")
    monkeypatch.setattr(known_models, "RECORD", tmp_path / "models.json")
    assert docs.record([tmp_path / "found.xml"]) == ["b"]
    found = known_models.read()[1]
    assert found.pop("mistral") == {}
    found = {family: cells for family, cells in found.items() if cells}
    assert found == {"llama": {"stages": Cell(True, "0"), "lora": Cell(False, "why it not")}}
    assert [known_models.word(found["llama"], column) for column in ("stages", "lora", "fold")] == ["0", "no", "?"]
