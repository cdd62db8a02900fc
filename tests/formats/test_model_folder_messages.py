"""What is said of a `model` that is not the folder of a decoder."""

from pathlib import Path

import pytest
from transformers import BartConfig, T5Config

from pipeline.console import UserError
from pipeline.model.stage import read_model_config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("models/model-Q4_K_M.gguf", "GGUF"),
        ("/no/such/folder", "no such folder"),
        ("./a/b", "no such folder"),
        ("a\x1b[31m/b", "no such folder"),
    ],
)
def test_no_folder(given: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_model_config(given)
    assert said in str(caught.value)
    assert str(caught.value).startswith("model = ")
    assert "\x1b" not in str(caught.value)


def test_a_file_of_the_folder_and_a_folder_of_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x.gguf").touch()
    with pytest.raises(UserError, match="give the folder it is in"):
        read_model_config(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="packed for inference"):
        read_model_config(str(tmp_path / "gguf"))


@pytest.mark.parametrize("config", [T5Config(), BartConfig()], ids=lambda c: str(c.model_type))
def test_an_encoder_decoder_is_called_one_in_one_line(tmp_path: Path, config: T5Config) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"'{config.model_type}' is an encoder-decoder") as caught:
        read_model_config(str(tmp_path))
    assert len(str(caught.value)) < 400
