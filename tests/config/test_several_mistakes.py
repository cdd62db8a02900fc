"""Mistakes that the schema cannot see, of a model's structure and of paths: all of them at once, with one exit code."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import loading
from pipeline.console import CollectedErrors, UserError
from pipeline.training.start import resolve
from tests.helpers.builders import model_config
from tests.helpers.configs import small

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"layers_to_transform": "0:9"}, "layers_to_transform = '0:9'"),
    "module": ({"target_modules": ["down_prok"]}, "no linear module 'down_prok'"),
    "in full": ({"trainable_modules": ["norn"]}, "trainable_modules"),
    "split": ({"layers_per_stage": [1, 1]}, "adds up to 2 layers"),
    "stages": ({"pipeline_stages": 9}, "only 4 decoder layers"),
}


def refused(tmp_path: Path, **changes: Any) -> str:
    model_config("llama", 4).save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "out"), **changes}
    config = loading.validate(small(**given), "x.toml")
    with pytest.raises(UserError) as caught:
        resolve.resolve(config)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("one", WRONG)
def test_one_of_them_with_a_path_that_leads_nowhere(tmp_path: Path, one: str) -> None:
    changes, words = WRONG[one]
    said = refused(tmp_path, **changes)
    assert said.startswith("2 problems:")
    assert words in said
    assert "a.txt" in said


def test_all_of_them(tmp_path: Path) -> None:
    changes = {key: value for name, (each, _) in WRONG.items() if name != "stages" for key, value in each.items()}
    other = {"name": "b", "dataset_type": "doclist", "dataset_path": "no/such.jsonl", "sequence_len": 64}
    said = refused(tmp_path, **changes, datasets=[*small()["datasets"], other])
    assert said.startswith("6 problems:")
    for name, (_, words) in WRONG.items():
        assert (words in said) == (name != "stages")
    assert "a.txt" in said
    assert "no/such.jsonl" in said


def test_a_single_one_is_said_as_it_is() -> None:
    errors = CollectedErrors()
    with errors.collect():
        raise UserError("x: wrong", 28)
    with pytest.raises(UserError, match=r"^x: wrong$") as caught:
        errors.raise_all()
    assert caught.value.exit_code == 28
    CollectedErrors().raise_all()
