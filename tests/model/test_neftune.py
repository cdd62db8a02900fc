"""NEFTune's noise: the paper's distribution, in training alone, the same draw with and without recomputation.

Oracles: the moments of the uniform distribution, and transformers' own hook from the same generator.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.model import neftune
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.memory import activation
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from tests.helpers.builders import save_model
from tests.helpers.stages import build, hidden, token_ids

ALPHA = 5.0
ROWS, TOKENS, WIDTH = 3, 24, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    save_model(path, "llama")
    return path


def noisy(folder: Path, first: int = 0, end: int = 4, dtype: torch.dtype = torch.float32) -> Stage:
    stage = build(folder, first, end, dtype).train()
    neftune.apply(stage, ALPHA)
    return stage


def noise(stage: Stage, ids_BT: Tensor, lengths_B: Tensor | None = None, positions_BT: Tensor | None = None) -> Tensor:
    """What is added to the embedding's output in one forward of `stage`, [B, T, D]."""
    caught: list[Tensor] = []
    handle = stage.model.base_model.layers[0].register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    lengths = () if lengths_B is None else (lengths_B,)
    running = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    stage((ids_BT, running if positions_BT is None else positions_BT, *lengths))
    handle.remove()
    return caught[0].detach() - torch.nn.functional.embedding(ids_BT, stage.model.get_input_embeddings().weight)


def test_bounds_and_moments_are_the_papers(folder: Path) -> None:
    """Uniform in ±α/√(T·D): variance α²/(3·T·D), which tells it from a Gaussian of any scale that keeps the bounds."""
    stage, draws = noisy(folder), []
    torch.manual_seed(0)
    for _ in range(40):
        draws.append(noise(stage, token_ids(ROWS, TOKENS)))
    values = torch.stack(draws).double()
    bound = ALPHA / math.sqrt(TOKENS * WIDTH)
    n = values.numel()
    # Within the bound, up to the rounding of embedding + noise (numbers below 8, in fp32) and back.
    assert values.abs().max() <= bound + 2 * 8 * 2**-24
    assert values.abs().max() > bound * (1 - 20 / n), "of n draws one comes that close but with probability e^-20"
    # Estimates from n values: the mean is off by σ/√n, the variance by σ²·√((κ − 1)/n) with κ = 9/5; five of these.
    variance = ALPHA**2 / (3 * TOKENS * WIDTH)
    assert abs(float(values.mean())) < 5 * math.sqrt(variance / n)
    assert float(values.square().mean()) == pytest.approx(variance, rel=5 * math.sqrt(0.8 / n))
    # And evenly between: a tenth of all in each tenth, off by √(0.1·0.9/n).
    tenths = torch.histc(values.float(), bins=10, min=-bound, max=bound) / n
    assert (tenths - 0.1).abs().max() < 6 * math.sqrt(0.09 / n)


def test_each_row_has_the_size_of_its_own_length(folder: Path) -> None:
    """A padded row of T tokens is as noisy as it would be alone; filler without tokens does no harm."""
    stage, lengths = noisy(folder), torch.tensor([TOKENS, 6, 0])
    torch.manual_seed(0)
    values = torch.stack([noise(stage, token_ids(ROWS, TOKENS), lengths) for _ in range(20)]).double()
    assert values.isfinite().all()
    for row, length in ((0, TOKENS), (1, 6)):
        own, bound = values[:, row], ALPHA / math.sqrt(length * WIDTH)
        assert 0.99 * bound < own.abs().max() <= bound + 2 * 8 * 2**-24
        assert float(own.square().mean()) == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / own.numel()))


def test_documents_of_a_packed_row_have_the_size_of_their_own_lengths(folder: Path) -> None:
    """Two documents and padding in one row: each as noisy as alone."""
    stage, parts = noisy(folder), ((0, 6), (6, 20))
    positions = torch.tensor([[*range(6), *range(14), *range(4)]])
    torch.manual_seed(0)
    values = torch.stack(
        [noise(stage, token_ids(1, TOKENS), torch.tensor([20]), positions)[0] for _ in range(40)]
    ).double()
    assert values.isfinite().all()
    for begin, end in parts:
        own, bound = values[:, begin:end], ALPHA / math.sqrt((end - begin) * WIDTH)
        assert 0.99 * bound < own.abs().max() <= bound + 2 * 8 * 2**-24
        assert float(own.square().mean()) == pytest.approx(bound**2 / 3, rel=5 * math.sqrt(0.8 / own.numel()))


def test_transformers_hook_adds_the_same_from_the_same_generator(folder: Path) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    ids = token_ids(ROWS, TOKENS)
    torch.manual_seed(1)
    ours = noise(noisy(folder), ids)
    theirs_stage = build(folder, 0, 4).train()
    embedding = theirs_stage.model.get_input_embeddings()
    embedding.neftune_noise_alpha = ALPHA
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(1)
    theirs = noise(theirs_stage, ids)
    # −m + 2m·u beside m·(−1 + 2u): some roundings of m; and of embedding + noise, below 8, on both sides.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 8 * 2**-24)


def test_none_in_evaluation_and_nothing_drawn(folder: Path) -> None:
    ids = token_ids()
    stage, plain = noisy(folder).eval(), build(folder, 0, 4)
    before = torch.get_rng_state()
    assert torch.equal(hidden([stage], ids), hidden([plain], ids))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(hidden([stage.train()], ids), hidden([plain], ids))


def test_later_stages_have_none(folder: Path) -> None:
    stage = noisy(folder, 2, 4)
    state, carried = torch.get_rng_state(), torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    stage((carried, torch.arange(8).expand(2, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_embeddings_are_rounded_once(folder: Path) -> None:
    """embedding + noise in fp32, then the nearest bf16: within half a unit in the last place of the sum."""
    ids = token_ids(ROWS, TOKENS)
    torch.manual_seed(2)
    exact = noise(noisy(folder), ids) + torch.nn.functional.embedding(
        ids, build(folder, 0, 4, torch.bfloat16).model.get_input_embeddings().weight
    )
    stage, caught = noisy(folder, dtype=torch.bfloat16), []
    stage.model.base_model.layers[0].register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    torch.manual_seed(2)
    stage((ids, torch.arange(TOKENS).expand_as(ids)))
    assert caught[0].dtype == torch.bfloat16
    # Half a unit is at most 2⁻⁸ of the number; the fp32 noise was found by a difference of numbers below 8.
    assert ((caught[0].float() - exact).abs() <= exact.abs() * 2**-8 + 2 * 8 * 2**-24).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_with_and_without_recomputation(folder: Path, dropout: float) -> None:
    """The embedding lies outside what is recomputed: from one generator state, the same gradients to the last bit."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        stage = build(folder, 0, 4).train()
        targets = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
        inject_multiplicative(stage, targets, 4, 8.0, dropout, torch.float32, 42)
        trained = trainable(stage)
        with torch.no_grad():
            for i, parameter in enumerate(trained.values()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        neftune.apply(stage.train(), ALPHA)
        level = RecomputeLevel.INPUT if recompute else RecomputeLevel.EVERYTHING
        activation.apply(stage, dict.fromkeys(stage.layers, ActivationPolicy(level)))
        torch.manual_seed(3)
        hidden([stage], token_ids()).square().sum().backward()
        return {name: p.grad for name, p in trained.items()}  # type: ignore[misc]

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    assert all(bool(g.any()) for g in kept.values())
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_gradients_reach_a_trained_embedding(folder: Path) -> None:
    """The noise is a constant beside the weight."""
    stage = noisy(folder)
    weight = stage.model.get_input_embeddings().weight.requires_grad_(True)
    ids, caught = token_ids(), []
    stage.model.base_model.layers[0].register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    stage((ids, torch.arange(ids.shape[1]).expand_as(ids)))
    caught[0].sum().backward()
    counts = torch.bincount(ids.flatten(), minlength=weight.shape[0]).float()
    assert torch.equal(weight.grad, counts[:, None].expand_as(weight))
