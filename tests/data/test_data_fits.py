"""The ids that occur, and the positions a model knows, decide whether data fits a model; both are seen by `--check`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PretrainedConfig

from pipeline.config.loading import load
from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.generation import positions
from pipeline.model.stage import empty_model, read_model_config
from pipeline.training.data import fits as data_fits
from pipeline.training.start import check as start
from tests.helpers.builders import BOOKS, save_model, save_tokenizer, write_config

ROWS = 320  # of the tiny model's embedding


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", "llama")
    return tmp_path / "base"


def check(base: Path, text: str = "", **changes: Any) -> None:
    """`--check` of a run over `text` behind a sample book."""
    book = base.parent / "book.txt"
    book.write_text((BOOKS / "the_salt_ledger.md").read_text(encoding="utf-8")[:4000] + text, encoding="utf-8")
    dataset = {"name": "book", "dataset_type": "textfile", "dataset_path": str(book), "sequence_len": 32, **changes}
    settings = {"model": str(base), "output_dir": str(base.parent / "out"), "datasets": [dataset], "pipeline_stages": 1}
    start.check(load(str(write_config(base.parent / "c.toml", **settings))), None)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def add_token(base: Path, token: str, id: int) -> None:
    """A token with an id of its own choice, as files that were put together by hand have it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    def add(content: dict[str, Any]) -> None:
        content["added_tokens"].append({"id": id, "content": token, "special": True, **flags})
        content["model"]["vocab"][token] = id

    edit(base / "tokenizer.json", add)


# Ids


def test_an_id_beyond_the_embedding_is_refused_though_the_tokens_are_fewer_than_its_rows(base: Path) -> None:
    save_tokenizer(base, vocabulary=300)
    add_token(base, "<|scene|>", 700)
    check(base)
    with pytest.raises(
        UserError, match=r"'book': .*'<\|scene\|>' with the id 700, but the model's embedding has 320 rows"
    ):
        check(base, "<|scene|>" + "more text " * 50)


@pytest.mark.parametrize(("id", "fits"), [(ROWS - 1, True), (ROWS, False)])
def test_the_last_row_is_one(base: Path, id: int, fits: bool) -> None:
    save_tokenizer(base, vocabulary=300)
    add_token(base, "<|scene|>", id)
    if fits:
        check(base, "<|scene|>" + "more text " * 50)
        return
    with pytest.raises(UserError, match=f"the id {id}"):
        check(base, "<|scene|>" + "more text " * 50)


def test_an_evaluation_set_is_looked_at_too(base: Path) -> None:
    save_tokenizer(base, vocabulary=300)
    add_token(base, "<|scene|>", 700)
    check(base)
    (base.parent / "held.txt").write_text("<|scene|>" + "more text " * 200)
    held = {
        "name": "held",
        "dataset_type": "textfile",
        "dataset_path": str(base.parent / "held.txt"),
        "sequence_len": 32,
    }
    config = load(str(base.parent / "c.toml"), None, [f"eval_datasets={json.dumps([held]).replace(':', '=')}"])
    with pytest.raises(UserError, match="'held': its text holds the token"):
        start.check(config, None)


def test_more_tokens_than_rows_are_warned_of_when_none_is_used(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(40):
        add_token(base, f"<|fim_{number}|>", ROWS + number)
    check(base)
    assert "the tokenizer has 360 tokens, the model 320 rows in its embedding" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
def test_a_token_that_the_library_made_up_an_id_for_is_refused(base: Path, key: str) -> None:
    """It is behind the vocabulary's last, in a row that pads the embedding and that nobody has trained."""
    save_tokenizer(base, vocabulary=300)
    edit(base / "tokenizer_config.json", lambda content: content.update({key: "<|end_of_book|>"}))
    with pytest.raises(
        UserError, match=rf"\"{key}\" in tokenizer_config.json is '<\|end_of_book\|>'.*id 300 behind the last"
    ):
        check(base)
    add_token(base, "<|end_of_book|>", 300)  # as a model has it that was trained with it
    check(base)


def test_an_eos_beyond_the_embedding_is_refused(base: Path) -> None:
    add_token(base, "<|end|>", ROWS + 1)
    edit(base / "tokenizer_config.json", lambda content: content.update(eos_token="<|end|>"))
    with pytest.raises(UserError, match=r"eos_token '<\|end\|>' has the id 321, but the model only 320 rows"):
        check(base)


def test_the_smaller_of_embedding_and_head_counts() -> None:
    meta_model = empty_model(
        LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=64), torch.float32, None
    )
    assert data_fits.embedding_rows(meta_model) == 64
    meta_model.set_output_embeddings(nn.Linear(32, 60, bias=False, device="meta"))
    assert data_fits.embedding_rows(meta_model) == 60


# Positions


def test_chunks_longer_than_the_models_positions_are_warned_of(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(base, sequence_len=256)
    assert "max_position_embeddings" not in capsys.readouterr().err
    check(base, sequence_len=257)
    assert (
        "datasets.0.sequence_len = 257 is more than the model's max_position_embeddings = 256: "
        in capsys.readouterr().err
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, 128),
        ({"rope_parameters": YARN}, 512),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": YARN}}, 512),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 128),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_positions_are_those_of_the_stretched_rope(changes: dict[str, Any], known: int | None) -> None:
    config = PretrainedConfig()
    for key, value in {"max_position_embeddings": 128, **changes}.items():
        setattr(config, key, value)
    assert positions.positions(config) == known


def test_a_model_with_a_vector_for_each_position_is_refused() -> None:
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_positions=16, n_layer=1, n_embd=8, n_head=1, vocab_size=32))
    positions.check("datasets.0.sequence_len = 16", 16, model, lower="datasets.0.sequence_len")
    with pytest.raises(UserError, match=r"sequence_len = 17 is more than .* = 16, and .* \(transformer\.wpe\): lower"):
        positions.check("datasets.0.sequence_len = 17", 17, model, lower="datasets.0.sequence_len")


# Names of formats


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("sharegpt", "write dataset_type = 'chat'"),
        ("alpaca", "write dataset_type = 'completion'"),
        ("csv", "write what the rows are: dataset_type = 'doclist'"),
        ("epub", "books are read from .txt and .md files"),
        ("jsonl", "write what the rows are: dataset_type = 'doclist'"),
        ("txt", "write dataset_type = 'textfile'"),
    ],
)
def test_formats_of_other_trainers_are_told_what_to_write(base: Path, written: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"datasets\W0\W+dataset_type.*{said}"):
        check(base, dataset_type=written)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": 3}}'),
        ("added_tokens.json", "[3]"),
    ],
)
def test_a_damaged_tokenizer_is_one_message(base: Path, file: str, content: str) -> None:
    """What does not decide the tokens may be anything."""
    (base / file).write_text(content)
    try:
        check(base)
    except UserError as error:
        assert str(error).startswith((f"model = '{base}'", f"{base}/{file}"))
    else:
        assert file != "tokenizer.json"


# Special tokens that nobody has trained


def test_special_tokens_whose_embedding_was_never_trained_are_named(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of the embedding that are next to nothing beside the others, as those of a padded vocabulary are."""
    weights = load_file(base / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights[name][[5, 6]] *= 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    model = empty_model(read_model_config(str(base)), torch.float32, None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    token = tokenizer.convert_ids_to_tokens(6)
    data_fits.check_trained("talks", [2, 4, 6, ROWS + 5], tokenizer, model, read_base(base, "model"))
    said = capsys.readouterr()
    assert f"dataset 'talks': '{token}': the base's embedding" in said.out + said.err
    assert "trainable_modules = ['embed_tokens', 'lm_head']" in said.out + said.err
    data_fits.check_trained("talks", [2, 4], tokenizer, model, read_base(base, "model"))
    said = capsys.readouterr()
    assert not said.out + said.err
