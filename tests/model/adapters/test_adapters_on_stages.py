"""Adapters on stages: the same start whatever the cut, names of the whole model, dtypes, and full fine-tuning."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.full import unfreeze_model
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.stage import empty_model
from tests.helpers.builders import model_config, save_model
from tests.helpers.stages import build, chain, hidden, token_ids

RANK, ALPHA = 8, 12.0
S = ALPHA / RANK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    save_model(path, "llama")
    return path


def injected(
    folder: Path,
    cuts: list[int],
    kind: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 42,
    base: torch.dtype = torch.float32,
) -> tuple[list, dict[str, nn.Parameter]]:
    """Stages with an adapter on every down_proj and o_proj, and all trained parameters by global name."""
    inject = inject_multiplicative if kind == "multiplicative_lora" else inject_lora
    meta_model = empty_model(model_config("llama"), dtype, None)
    targets = resolve_targets(meta_model, ["down_proj", "o_proj"], [0, 1, 3])
    stages, trained = chain(folder, cuts, base), {}
    for stage in stages:
        inject(stage, targets, RANK, ALPHA, 0.0, dtype, seed)
        own = trainable(stage)
        assert not own.keys() & trained.keys()
        trained |= own
    return stages, trained


KINDS = pytest.mark.parametrize("kind", ["multiplicative_lora", "lora"])


@KINDS
def test_start_does_not_depend_on_the_cut(folder: Path, kind: str) -> None:
    _, whole = injected(folder, [0, 4], kind)
    for cuts in ([0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]):
        stages, parts = injected(folder, cuts, kind)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not trainable(stages[2]), "layer 2 has no adapter, and its stage nothing to train"


@KINDS
def test_trained_parameters_are_the_adapters_by_the_names_of_the_whole_model(folder: Path, kind: str) -> None:
    stages, trained = injected(folder, [0, 2, 4], kind)
    modules = [f"model.layers.{i}.{m}" for i in (0, 1, 3) for m in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(trained) == sorted(f"{m}.{letter}" for m in modules for letter in "AB")
    for stage in stages:
        assert {id(p) for p in stage.parameters() if p.requires_grad} == {id(p) for p in trainable(stage).values()}
    width = {"self_attn.o_proj": (32, 32), "mlp.down_proj": (64, 32)}
    for name, parameter in trained.items():
        d_in, d_out = next(w for m, w in width.items() if m in name)
        reads = d_out if kind == "multiplicative_lora" else d_in
        assert parameter.shape == ((RANK, reads) if name.endswith(".A") else (d_out, RANK))


@KINDS
def test_start_is_kaiming_uniform_and_zero_and_follows_the_seed(folder: Path, kind: str) -> None:
    _, trained = injected(folder, [0, 4], kind)
    a = {name: p.detach() for name, p in trained.items() if name.endswith(".A")}
    assert not any(p.any() for name, p in trained.items() if name.endswith(".B"))
    for p in a.values():
        bound = p.shape[1] ** -0.5  # √(6 / ((1 + a²)·fan_in)) with a = √5
        assert p.abs().max() <= bound
        assert p.abs().max() > 0.9 * bound
        # The standard deviation of U(±bound) is bound/√3; its estimate from n values is off by a share of 0.45/√n.
        assert abs(float(p.std()) * 3**0.5 / bound - 1) < 5 * 0.45 / p.numel() ** 0.5
    values = {tuple(p.flatten().tolist()) for p in a.values()}
    for seed in (41, 43):
        values |= {
            tuple(p.flatten().tolist()) for n, p in injected(folder, [0, 4], kind, seed=seed)[1].items() if n in a
        }
    assert len(values) == 3 * len(a), "every module and every seed has a start of its own"


@KINDS
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_has_its_own_dtype(folder: Path, kind: str, dtype: torch.dtype, base: torch.dtype) -> None:
    stages, trained = injected(folder, [0, 4], kind, dtype, base=base)
    assert {p.dtype for p in trained.values()} == {dtype}
    assert {p.dtype for p in stages[0].parameters() if not p.requires_grad} == {base}
    stages[0].train()
    hidden(stages, token_ids()).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in trained.values())


def test_pefts_lora_on_a_stage_is_w_plus_s_b_a(folder: Path) -> None:
    stages, trained = injected(folder, [0, 2, 4], "lora")
    plain = build(folder, 0, 4)
    with torch.no_grad():
        for i, name in enumerate(sorted(trained)):
            parameter = trained[name]
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        for name in [n.removesuffix(".A") for n in trained if n.endswith(".A")]:
            weight = plain.model.get_submodule(name).weight
            weight += S * trained[f"{name}.B"] @ trained[f"{name}.A"]
        ours, theirs = hidden(stages, token_ids()), hidden([plain], token_ids())
    # A normed hidden state of about 1 after four layers of sums of 64 products in fp32: the fold's test has 1e-5 too.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_multiplicative_on_stages_is_one_plus_s_b_a_times_w(folder: Path) -> None:
    stages, trained = injected(folder, [0, 1, 4], "multiplicative_lora")
    plain = build(folder, 0, 4)
    with torch.no_grad():
        for i, name in enumerate(sorted(trained)):
            parameter = trained[name]
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
        for name in [n.removesuffix(".A") for n in trained if n.endswith(".A")]:
            module = plain.model.get_submodule(name)
            module.weight += S * trained[f"{name}.B"] @ (trained[f"{name}.A"] @ module.weight)
        ours, theirs = hidden(stages, token_ids()), hidden([plain], token_ids())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# Full fine-tuning


def test_unfreeze_everything_or_by_name(folder: Path) -> None:
    stage = build(folder, 0, 2)
    assert not trainable(stage), "weights are frozen as loaded"
    unfreeze_model(stage, ["down_proj", "embed_tokens"])
    expected = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))]
    assert sorted(trainable(stage)) == expected
    unfreeze_model(stage, None)
    assert trainable(stage).keys() == dict(stage.model.named_parameters()).keys()
    unfreeze_model(stage, ["no_such"])
    assert not trainable(stage)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_naming_one_of_a_tied_pair_names_both(tmp_path: Path, target: str) -> None:
    save_model(tmp_path, "cohere", layers=2)
    names = []
    for stage in chain(tmp_path, [0, 1, 2]):
        unfreeze_model(stage, [target])
        names += list(trainable(stage))
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]
