"""Tokens of a direction: what adding it does through a transformers model's norm and head; planted tokens."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.console import UserError
from pipeline.formats.base_model import read_base
from pipeline.inspection import tokens
from pipeline.inspection.tokens import labels, lens, nearest_tokens, sides, visible
from tests.helpers.builders import VOCABULARY, save_model
from tests.helpers.inspection import orthonormal

WIDTH = 32


@pytest.fixture(scope="module", params=["llama", "cohere", "gemma2"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """RMSNorm and an own head; LayerNorm and a tied one; RMSNorm with 1 + weight and a tied one. Norms of real weights."""
    folder = tmp_path_factory.mktemp("models") / request.param
    made = save_model(folder, request.param, layers=1)
    assert ("lm_head.weight" in read_base(folder).tensors) == (request.param == "llama")
    with torch.no_grad():
        made.model.norm.weight.add_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) * 0.5)
    made.save_pretrained(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder).double().eval()


def difference(model: torch.nn.Module, direction: torch.Tensor) -> torch.Tensor:
    """logits(x + d) − logits(x − d) of head(norm(x)), for an x at a right angle to d (and, as LayerNorm takes means off, to
    the vector of ones and so to d less its mean): both are of one length, so what the norm divides by is the same."""
    x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    ones = torch.full((WIDTH,), WIDTH**-0.5, dtype=torch.float64)
    kept = torch.linalg.qr(torch.stack([ones, direction], 1)).Q
    x = x - kept @ (kept.T @ x)
    x = x * direction.norm() / x.norm()
    with torch.no_grad():
        down, up = model.lm_head(model.model.norm(torch.stack([x - direction, x + direction])))
    return up - down


@pytest.mark.parametrize("block_items", [WIDTH * 7, 2**20])
def test_against_the_models_own_norm_and_head(model, monkeypatch, block_items: int) -> None:
    """Norms in fp32 on either side, sums of 32 products: scores agree to 1e-4 of a standard deviation."""
    monkeypatch.setattr(tokens, "BLOCK_ITEMS", block_items)
    folder, theirs = model
    directions = orthonormal(3, WIDTH, 7) * torch.tensor([[1.0], [5.0], [-0.01]])
    found = nearest_tokens(lens(read_base(folder)), directions, count=6, vocabulary=VOCABULARY)
    for direction, scores in zip(directions, found, strict=True):
        logits = difference(theirs, direction)
        z = (logits - logits.mean()) / logits.std(correction=0)
        for ends, largest in ((scores.raised, True), (scores.lowered, False)):
            expected = z.topk(6, largest=largest)
            assert [token for token, _ in ends] == expected.indices.tolist()
            assert (
                torch.tensor([score for _, score in ends], dtype=torch.float64).sub(expected.values).abs().max() < 1e-4
            )


def test_a_planted_token_is_the_first(model) -> None:
    """The direction that raises a token most: its row of the head, through the norm's weight."""
    folder, theirs = model
    gamma = theirs.model.norm.weight.detach()
    gamma = gamma + 1 if type(theirs).__name__.startswith("Gemma") else gamma
    rows = theirs.lm_head.weight.detach()
    wanted = [17, 101, 250]
    directions = (rows - rows.mean(0))[wanted] * gamma
    # The best alignment with the centred row after the norm is not a proof that no longer row wins: the oracle says so.
    found = nearest_tokens(lens(read_base(folder)), directions, count=3, vocabulary=VOCABULARY)
    for token, direction, scores in zip(wanted, directions, found, strict=True):
        assert int(difference(theirs, direction.double()).argmax()) == token == scores.raised[0][0]
        assert scores.raised[0][1] > 3
    found = nearest_tokens(lens(read_base(folder)), -directions, count=3, vocabulary=VOCABULARY)
    assert [scores.lowered[0][0] for scores in found] == wanted


def test_rows_of_the_head_without_a_token_are_left_out(model) -> None:
    folder, _ = model
    found = nearest_tokens(lens(read_base(folder)), orthonormal(2, WIDTH, 1), count=50, vocabulary=40)
    assert all(token < 40 for scores in found for token, _ in scores.raised + scores.lowered)
    assert [len(scores.raised) for scores in found] == [40, 40]
    with pytest.raises(UserError, match="48 numbers"):
        nearest_tokens(lens(read_base(folder)), orthonormal(2, 48, 1), count=5, vocabulary=40)


def test_labels_are_readable_and_harmless(model) -> None:
    folder, _ = model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    label = labels(tokenizer)
    ids = tokenizer("the salt\n\x1b[31m", add_special_tokens=False).input_ids
    words = [label(token) for token in ids]
    assert "".join(words) == "the␣salt↵·[31m"
    assert label(10**6) == "⟨1000000⟩"
    assert all(word and word.isprintable() for word in map(label, range(VOCABULARY)))
    assert visible("a\x00b\u202ec") == "a·b·c"


def test_which_vectors_are_directions_of_the_residual_stream() -> None:
    assert sides("multiplicative_lora", "model.layers.3.mlp.down_proj") == (True, True)
    assert sides("multiplicative_lora", "model.layers.3.self_attn.q_proj") == (False, False)
    assert sides("lora", "model.layers.3.self_attn.q_proj") == (True, False)
    assert sides("lora", "model.layers.3.self_attn.o_proj") == (False, True)
