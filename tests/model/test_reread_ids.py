"""Layers that are given something made of the token ids, and hidden states of several streams, over stages.

Oracle: transformers' whole model, logits and the gradients of adapters, which are to be equal to the bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from pipeline.console import UserError
from pipeline.evaluation.scoring import Scorer
from pipeline.evaluation.units import Row
from pipeline.model import cut_check, tiny_copy
from pipeline.model.adapters.base import trainable
from pipeline.model.layerwise import run_layerwise
from pipeline.model.stage import empty_model, read_model_config
from pipeline.model.structure.handed import from_wire, to_wire
from pipeline.model.structure.parts import parts_of
from pipeline.planning import formula
from pipeline.planning.counts.fake_layers import layer_alone
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.quick import only
from tests.helpers.stages import CPU, build
from tests.model.test_every_family import COMPLETED, config_of

LAYERS = 6
# The axes of the hidden state between layers, and how many of it there are.
KINDS = {"gemma4_text": ("BTD", 1), "gemma3n_text": ("SBTD", 4), "deepseek_v4": ("BTSD", 4)}
SHARED = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # 4 and 5 read from 2 and 3
over_kinds = pytest.mark.parametrize("kind", KINDS)


def large(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, num_hidden_layers=LAYERS, **{**COMPLETED.get(kind, {}), **changes})


def saved(kind: str, folder: Path, **changes: Any) -> tuple[Any, Tensor]:
    """A tiny model in `folder`, and its logits."""
    whole, logits = tiny_copy.tiny_copy(large(kind, **changes))
    whole.save_pretrained(folder)
    return whole, logits


def gradients(folder: Path, n_stages: int, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of stages read from `folder`, adapters put in, and the gradients of these, stage by stage backwards."""
    plan = resolve.resolve(config_of(folder, n_stages, adapter_type="lora", target_modules="all-linear", **changes))
    stages = [build(folder, first, end) for first, end in plan.ranges]
    for stage in stages:
        families.inject(stage, plan.trained.adapter)
        with torch.no_grad():
            for name, parameter in trainable(stage).items():
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    logits = cut_check._logits(stages, backward=True)
    return logits, {n: p.grad for stage in stages for n, p in trainable(stage).items() if p.grad is not None}


@pytest.mark.parametrize("kind", only(("gemma4_text",), KINDS))
def test_what_layers_are_handed_is_observed(kind: str) -> None:
    cut_check.check(large(kind), [(0, 1), (1, 4), (4, 6)])
    parts = parts_of(tiny_copy.tiny_copy(large(kind))[0])
    assert (parts.axes, parts.streams) == KINDS[kind]
    assert parts.rereads_ids
    plain = parts_of(tiny_copy.tiny_copy(large("llama"))[0])
    assert (plain.axes, plain.streams, plain.rereads_ids, plain.second) == ("BTD", 1, False, False)


@pytest.mark.parametrize(("axes", "shape"), [("BTD", (2, 5, 6)), ("SBTD", (4, 2, 5, 6)), ("BTSD", (2, 5, 4, 6))])
def test_streams_cross_as_one_tensor(axes: str, shape: tuple[int, ...]) -> None:
    parts = parts_of(tiny_copy.tiny_copy(large("llama"))[0]).__class__
    made = parts("", "", "", "", axes=axes, streams=4 if "S" in axes else 1)
    hidden = torch.randn(shape)
    crossing = to_wire(made, hidden)
    assert crossing.shape == (2, 5, 6 * made.streams)
    assert torch.equal(from_wire(made, crossing), hidden)


@pytest.mark.slow
@over_kinds
def test_stages_equal_the_whole_and_each_other(kind: str, tmp_path: Path) -> None:
    _, logits = saved(kind, tmp_path)
    one, right = gradients(tmp_path, 1)
    for n_stages in (2, 3):
        found, theirs = gradients(tmp_path, n_stages)
        assert torch.equal(found, one)
        assert theirs.keys() == right.keys()
        assert all(torch.equal(gradient, right[name]) for name, gradient in theirs.items())
    assert not torch.equal(one, logits), "the adapters do something"


@pytest.mark.slow
@over_kinds
def test_scores_and_states_layer_by_layer_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    whole, _ = saved(kind, tmp_path)
    ids = tiny_copy.token_ids()
    row = Row(ids[0].tolist(), [(4, 9)], 0)
    one, three = (
        Scorer([build(tmp_path, *ends) for ends in cut], CPU, torch.float32, 0).score([row], greedy=True)
        for cut in ([(0, LAYERS)], [(0, 2), (2, 3), (3, LAYERS)])
    )
    assert one == three
    layer, found = f"{parts_of(whole).layers}.{LAYERS - 1}.self_attn", []
    run_layerwise(
        str(tmp_path),
        [ids[0]],
        modules=layer.__eq__,
        tap=lambda *said: found.append(said[2]),
        device=CPU,
        dtype=torch.float32,
    )
    whole.get_submodule(layer).register_forward_hook(lambda *said: found.append(said[2][0][0]))
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    assert torch.equal(*found)


@pytest.mark.slow
def test_keys_and_values_are_shared_within_a_stage(tmp_path: Path) -> None:
    saved("gemma4_text", tmp_path, **SHARED)
    one, right = gradients(tmp_path, 1)
    two, theirs = gradients(tmp_path, 2, layers_per_stage=[2, 4])
    assert torch.equal(one, two)
    assert all(torch.equal(gradient, right[name]) for name, gradient in theirs.items())
    with pytest.raises(UserError, match=r"'gemma4_text': cutting it into 2 stages.*pipeline_stages = 1"):
        gradients(tmp_path, 2, layers_per_stage=[4, 2])


@pytest.mark.slow
def test_what_would_part_the_copies_of_the_embedding_is_refused(tmp_path: Path) -> None:
    saved("gemma4_text", tmp_path)
    resolve.resolve(config_of(tmp_path, 1, neftune_noise_alpha=5.0))
    with pytest.raises(UserError, match="neftune_noise_alpha: the layers of model_type 'gemma4_text'"):
        resolve.resolve(config_of(tmp_path, 2, neftune_noise_alpha=5.0))
    with pytest.raises(UserError, match="trainable_modules: the layers of model_type 'gemma4_text'"):
        resolve.resolve(config_of(tmp_path, 2, trainable_modules=["embed_tokens"]))
    resolve.resolve(config_of(tmp_path, 2, trainable_modules=["post_attention_layernorm"]))


@pytest.mark.slow
def test_each_stage_is_counted_with_its_copy(tmp_path: Path) -> None:
    saved("gemma4_text", tmp_path)
    model = empty_model(read_model_config(str(tmp_path)), torch.bfloat16, None)
    cost = formula.costs(model, first_trained=0, recompute=False, sequence_len=16)
    first, last = formula.stage_bytes(cost, [(0, 3), (3, 6)])
    there = [
        sum(p.nbytes for p in build(tmp_path, *ends, dtype=torch.bfloat16).parameters()) for ends in ((0, 3), (3, 6))
    ]
    assert cost.embedding_bytes > 0
    assert first == there[0]
    norm = sum(p.nbytes for p in model.model.norm.parameters())
    assert (
        last == there[1] + cost.head_bytes - norm
    )  # which does not ask whether the head is tied, and leaves the norm out
    with layer_alone(model, 4, 16) as run:
        assert run().shape == (1, 16, model.config.hidden_size)
