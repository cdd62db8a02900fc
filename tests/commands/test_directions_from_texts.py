"""Directions from texts: the mean difference of the unsplit Hugging Face model's hidden states, and a planted one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from pipeline.artifacts.adapter.read import load_adapter
from pipeline.console import UserError
from pipeline.data.reading.document_rows import document_rows
from tests.helpers.artifacts import load_model, tensors_of
from tests.helpers.builders import BOOKS, save_model
from tests.helpers.directions import LAYERS, D, Make, directions, maker, save_base, stored, unit


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(root / kind, kind) for kind in ("llama", "cohere")}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    return maker(tmp_path, monkeypatch)


def by_hand(base: Path, texts: list[str], sequence_len: int, last: bool) -> list[Tensor]:
    """Mean [D] fp64 of each layer's output, by the unsplit model; rows cut here, from the tokenizer's own ids."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
    kept: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for layer, into in zip(model.base_model.layers, kept, strict=True):
        layer.register_forward_hook(
            lambda _, __, output, into=into: into.append(output[0][-1:] if last else output[0][1:])
        )
    for text in texts:
        ids, room = tokenizer(text, add_special_tokens=False)["input_ids"], sequence_len - 1
        for row in [ids[-room:]] if last else [ids[i : i + room] for i in range(0, len(ids), room)]:
            with torch.no_grad():
                model(torch.tensor([[tokenizer.bos_token_id, *row]]), use_cache=False)
    return [torch.cat(into).double().mean(0) for into in kept]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, list[str]]:
    """The texts of two globs of text files: parts of a sample book, of unequal lengths, some beyond a row of 48."""
    book = sorted(BOOKS.glob("*.md"))[0].read_text(encoding="utf-8")
    parts = {"a": [book[:300], book[1000:1040]], "b": [book[2000:2500]]}
    for name, pieces in parts.items():
        for number, piece in enumerate(pieces):
            (tmp_path / f"{name}{number}.txt").write_text(piece, encoding="utf-8")
    return parts


@pytest.mark.parametrize("name", ["llama", "cohere"])
@pytest.mark.parametrize("position", ["mean", "last"])
def test_directions_from_texts_are_the_unsplit_models_mean_difference(
    bases: dict[str, Path], make: Make, tmp_path: Path, texts: dict[str, list[str]], position: str, name: str
) -> None:
    base, last = bases[name], position == "last"
    adapter = make(
        base,
        "--from-texts",
        tmp_path / "a*.txt",
        tmp_path / "b*.txt",
        "--position",
        position,
        "--sequence-len",
        48,
        "--save-directions",
        tmp_path / "v.safetensors",
    )
    mean_a, mean_b = (by_hand(base, texts[name], 48, last) for name in "ab")
    found = load_file(tmp_path / "v.safetensors")
    assert found.keys() == {f"layers.{i}" for i in range(LAYERS)}
    for layer in range(LAYERS):
        right, size = mean_a[layer] - mean_b[layer], mean_a[layer].abs().max() + mean_b[layer].abs().max()
        # The states are equal bit for bit; a few hundred fp64 numbers summed in another order.
        assert (found[f"layers.{layer}"] - right).abs().max() <= 512 * 2**-53 * size
        assert right.norm() > 1e-2 * size
        A = load_adapter(adapter).pairs[f"model.layers.{layer}.mlp.down_proj"].A[0].double()
        assert (A - right / right.norm()).abs().max() <= 2**-24
    again = make(base, "--directions", tmp_path / "v.safetensors", output="again")
    before, after = tensors_of(adapter), tensors_of(again)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert before.keys() == after.keys()


def test_a_planted_direction_is_found(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All embeddings are one vector, but for the tokens of A's text (3·v more) and for BOS (far off, and not counted).

    The layers write nothing, so that is the residual stream after each of them.
    """
    base, v = tmp_path / "base", unit(directions())
    model = save_model(base, "llama", 2)
    (tmp_path / "a.txt").write_text("aaaa aaaa")
    (tmp_path / "b.txt").write_text("bcd" * 100)
    ids = AutoTokenizer.from_pretrained(base)("aaaa aaaa", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        common = model.base_model.embed_tokens.weight[9].clone()
        model.base_model.embed_tokens.weight[:] = common
        model.base_model.embed_tokens.weight[ids] += 3 * v.float()
        model.base_model.embed_tokens.weight[1] += 1000 * torch.randn(D)
        for layer in model.base_model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(base)
    adapter = load_adapter(make(base, "--from-texts", tmp_path / "a.txt", tmp_path / "b.txt", kind="householder"))
    assert len(adapter.pairs) == 4
    for pair in adapter.pairs.values():
        # common + 3·v and 3·v, each rounded to fp32, beside a difference of length 3; then v rounded.
        error = (2 * float(common.norm() + 3) / 3 + 2) * 2**-24
        assert (pair.A[0].double() - v).norm() <= error
        assert (pair.B[:, 0].double() + 2 * v).norm() <= 2 * error
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.strip().startswith(("0 ", "1 "))] == [["0", "3"], ["1", "3"]]


def test_one_layers_direction_in_every_layer(
    bases: dict[str, Path], make: Make, tmp_path: Path, texts: dict[str, list[str]]
) -> None:
    vectors = directions(LAYERS)
    pairs = load_adapter(make(bases["llama"], "--directions", stored(tmp_path, vectors), "--direction-layer", 2)).pairs
    assert len(pairs) == 2 * LAYERS
    assert all((pair.A[0].double() - unit(vectors[2])).abs().max() <= 2**-24 for pair in pairs.values())
    sources = ("--from-texts", tmp_path / "a*.txt", tmp_path / "b0.txt")
    found = make(bases["llama"], *sources, "--direction-layer", 1, "--layers", "0,3", output="texts")
    right = [by_hand(bases["llama"], texts[name], 512, last=False)[1] for name in "ab"]
    v = (right[0] - right[1]) / (right[0] - right[1]).norm()
    pairs = load_adapter(found).pairs
    assert {name.split(".")[2] for name in pairs} == {"0", "3"}
    assert all((pair.A[0].double() - v).abs().max() <= 2**-23 for pair in pairs.values())


def test_texts_that_give_no_direction(bases: dict[str, Path], make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one and the same")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="A and B have the same mean after layer 0"):
        make(bases["llama"], "--from-texts", tmp_path / "a.txt", tmp_path / "a.txt")
    with pytest.raises(UserError, match="holds no text"):
        make(bases["llama"], "--from-texts", tmp_path / "a.txt", tmp_path / "empty.txt")
    with pytest.raises(UserError, match="matches no"):
        make(bases["llama"], "--from-texts", tmp_path / "a.txt", tmp_path / "b.txt")
    with pytest.raises(UserError, match="leaves no room for text; use 2 or more"):
        make(bases["llama"], "--from-texts", tmp_path / "a.txt", tmp_path / "a.txt", "--sequence-len", 1)
    assert not (tmp_path / "adapter").exists()


def test_rows_are_pieces_of_single_documents(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    long = "The lamp was lit. " * 30
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (long, "", "Short.")))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, "Short.")]
    rows = document_rows(tokenizer, str(tmp_path / "t.jsonl"), 20)
    assert all(row[0] == tokenizer.bos_token_id and 2 <= len(row) <= 20 for row in rows)
    assert torch.cat([row[1:] for row in rows]).tolist() == ids[0] + ids[1]
    assert len(rows) == -(-len(ids[0]) // 19) + 1, "no row holds two documents"
    largest = max(max(each) for each in ids)
    document_rows(tokenizer, str(tmp_path / "t.jsonl"), 20, embedding_rows=largest + 1)
    with pytest.raises(UserError, match=f"with the id {largest}, but the model's embedding has {largest} rows"):
        document_rows(tokenizer, str(tmp_path / "t.jsonl"), 20, embedding_rows=largest)
    ends = document_rows(tokenizer, str(tmp_path / "t.jsonl"), 20, ends_only=True)
    assert [row.tolist() for row in ends] == [[tokenizer.bos_token_id, *each[-19:]] for each in ids]
