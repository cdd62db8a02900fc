"""Activation memory: what is recomputed or kept in host memory changes no number."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.memory import activation
from pipeline.model.memory.host_arena import HostArena, Ticket
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage
from tests.helpers.builders import save_model
from tests.helpers.stages import build, token_ids

KINDS: dict[str, dict[str, Any]] = {
    "cohere": {},
    "gemma2": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
}
MODES = [True, "unsloth"]
POSITIONS = torch.arange(24).expand(2, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind, changes in KINDS.items():
        save_model(root / kind, kind, **changes)
    return {kind: root / kind for kind in KINDS}


def stage_with_adapters(folder: Path, first: int, end: int, mode: bool | str, dropout: float = 0.0) -> Stage:
    """With an adapter of useful size on every o_proj of the stage, in train mode."""
    stage = build(folder, first, end)
    targets = [f"model.layers.{i}.self_attn.o_proj" for i in range(first, end)]
    inject_multiplicative(stage, targets, 4, 8.0, dropout, torch.float32, 42)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(trainable(stage).items())):
            if name.endswith(".B"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    put_away(stage, mode)
    return stage.train()


def put_away(stage: Stage, mode: bool | str) -> None:
    """As activation_checkpointing = `mode` does."""
    arena = HostArena(1 << 20, torch.device("cpu")) if mode == "unsloth" else None
    policy = ActivationPolicy(RecomputeLevel.INPUT if mode else RecomputeLevel.EVERYTHING, on_host=mode == "unsloth")
    activation.apply(stage, dict.fromkeys(stage.layers, policy), arena)


def gradients(stage: Stage, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of everything that has one; dropout from a seed."""
    torch.manual_seed(7)
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    output = stage((x, POSITIONS))
    output = output if stage.is_last else output[0]
    torch.rand(3)  # as another stage would, between forward and backward
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: p.grad for name, p in trainable(stage).items() if p.grad is not None}
    return output.detach(), found | ({"input": x.grad} if x.grad is not None else {})


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "end"), [(0, 4), (1, 3)], ids=["whole", "middle"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_gradients_are_the_same(
    folders: dict, kind: str, first: int, end: int, mode: bool | str, dropout: float
) -> None:
    x = token_ids() if first == 0 else torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(5))
    output, right = gradients(stage_with_adapters(folders[kind], first, end, False, dropout), x)
    ours, found = gradients(stage_with_adapters(folders[kind], first, end, mode, dropout), x)
    assert torch.equal(ours, output)
    assert found.keys() == right.keys()
    assert len(right) == 2 * (end - first) + (first > 0)
    for name, gradient in right.items():
        assert gradient.any(), name
        assert torch.equal(found[name], gradient), name


def test_dropout_is_no_sham(folders: dict) -> None:
    x = token_ids()
    with_it, without = (gradients(stage_with_adapters(folders["cohere"], 0, 4, True, p), x)[0] for p in (0.3, 0.0))
    assert not torch.equal(with_it, without)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_only_the_layers_inputs_are_kept(folders: dict, mode: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward: of each layer its input, on the device or as a copy in host memory."""
    copies: list[torch.Size] = []
    put = Ticket.put

    def recording(self: Ticket, tensor: Tensor) -> int:
        copies.append(tensor.shape)
        return put(self, tensor)

    monkeypatch.setattr(Ticket, "put", recording)
    stage = stage_with_adapters(folders["cohere"], 1, 4, mode)
    inputs: list[Any] = []
    inside: list[weakref.ref[Tensor]] = []
    for layer in stage.layers.values():
        layer.self_attn.register_forward_hook(lambda _m, _x, y: inside.append(weakref.ref(y[0])))
        layer.input_layernorm.register_forward_pre_hook(lambda _m, x: inputs.append(weakref.ref(x[0])))
    x = torch.randn(2, 24, 32).requires_grad_()
    output = stage((x, POSITIONS))
    gc.collect()
    assert len(inside) == 3, "what attention returned is gone"
    assert all(ref() is None for ref in inside), "what attention returned is gone"
    if mode == "unsloth":
        assert copies == [x.shape] * 3
        assert inputs[1]() is None, "the device's own copies are gone"
        assert inputs[2]() is None, "the device's own copies are gone"
    else:
        assert not copies
    output.sum().backward()
    assert len(inside) == 6, "each layer ran forward once more"


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_evaluation_runs_each_layer_once_and_keeps_nothing(folders: dict, mode: bool | str) -> None:
    stage = stage_with_adapters(folders["cohere"], 0, 4, mode).eval()
    runs: list[int] = []
    for layer in stage.layers.values():
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        output = stage((token_ids(), POSITIONS))
    assert not output.requires_grad
    assert len(runs) == 4


def test_false_leaves_the_layers_alone(folders: dict) -> None:
    stage = build(folders["cohere"], 0, 2)
    before = [layer.forward for layer in stage.layers.values()]
    put_away(stage, False)
    assert [layer.forward for layer in stage.layers.values()] == before
