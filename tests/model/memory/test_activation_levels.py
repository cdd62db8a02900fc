"""Each level of activation memory, on the device or on the host: bit-equal results, and only what is needed runs again."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import weights
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.fusion import apply as fusion
from pipeline.model.memory import activation, replay
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.memory.levels import ActivationPolicy, RecomputeLevel
from pipeline.model.stage import Stage, empty_model, read_model_config
from tests.helpers.builders import save_model

KINDS: dict[str, dict[str, Any]] = {"cohere": {}, "llama": {}, "gemma2": {}, "mixtral": {"num_local_experts": 4}}
BETWEEN = [RecomputeLevel.ADAPTER, RecomputeLevel.ATTENTION, RecomputeLevel.PROJECTIONS]
KEEPINGS = [ActivationPolicy(level) for level in BETWEEN] + [
    ActivationPolicy(level, on_host=True) for level in RecomputeLevel
]
ALL = frozenset(fusion.KERNELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind, changes in KINDS.items():
        save_model(root / kind, kind, **changes)
    return {kind: root / kind for kind in KINDS}


def stage_of(
    folder: Path,
    first: int,
    end: int,
    kernels: frozenset[str] = ALL,
    kind: str = "multiplicative_lora",
    dropout: float = 0.0,
) -> Stage:
    """A stage in fp32 with adapters that do something on layers 0 to 2: on down_proj where there is one, and o_proj."""
    meta_model = empty_model(read_model_config(str(folder)), torch.float32, None)
    names = (
        ["o_proj"]
        if meta_model.config.model_type == "mixtral"
        else ["down_proj", "o_proj"][: 1 if kind != "lora" else 2]
    )
    targets = resolve_targets(meta_model, names, [0, 1, 2])
    stage = Stage(meta_model, first, end)
    weights.load(stage, str(folder), torch.float32, torch.device("cpu"))
    inject = inject_lora if kind == "lora" else inject_multiplicative
    inject(stage, targets, 4, 8, dropout, torch.float32, 1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trainable(stage).items():
        if name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    fusion.apply(stage, kernels)
    return stage.train()


def gradients(stage: Stage) -> dict[str, Tensor]:
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(3)
    positions = torch.arange(24).expand(2, 24)
    if stage.is_first:
        x = torch.randint(3, 300, (2, 24), generator=generator)
    else:
        x = torch.randn(2, 24, 32, generator=generator).requires_grad_()
    output = stage((x, positions))
    hidden: Tensor = output if stage.is_last else output[0]
    torch.rand(3)  # as another stage would, between forward and backward
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    found = {name: p.grad for name, p in trainable(stage).items() if p.grad is not None}
    return {"hidden": hidden.detach(), **found} | ({"x": x.grad} if x.grad is not None else {})


CASES: list[dict[str, Any]] = [
    {"first": 0, "end": 4},
    {"first": 0, "end": 4, "kernels": frozenset()},
    {"first": 1, "end": 3, "dropout": 0.3},
    {"first": 1, "end": 3, "kind": "lora", "dropout": 0.3},
]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[tuple[str, int], dict[str, Tensor]]:
    return {(kind, i): gradients(stage_of(folders[kind], **case)) for kind in KINDS for i, case in enumerate(CASES)}


@pytest.mark.parametrize("keeping", KEEPINGS, ids=lambda k: k.level.name + ("-host" if k.on_host else ""))
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "cohere" else pytest.mark.slow) for kind in KINDS]
)
def test_no_level_changes_a_bit(folders: dict[str, Path], expected: dict, kind: str, keeping: ActivationPolicy) -> None:
    for i, case in enumerate(CASES):
        stage = stage_of(folders[kind], **case)
        arena = HostArena(1 << 22, torch.device("cpu"))
        activation.apply(stage, dict.fromkeys(stage.layers, keeping), arena)
        found = gradients(stage)
        assert expected[kind, i].keys() == found.keys()
        for name, tensor in expected[kind, i].items():
            assert torch.equal(found[name], tensor), (name, case)
        assert arena.bytes_in_use == 0
        assert bool(arena.peak_bytes) == keeping.on_host


def test_layers_may_keep_different_things(folders: dict[str, Path]) -> None:
    expected = gradients(stage_of(folders["cohere"], 0, 4))
    stage = stage_of(folders["cohere"], 0, 4)
    arena = HostArena(1 << 22, torch.device("cpu"))
    mixed = [
        ActivationPolicy(RecomputeLevel.EVERYTHING, True),
        ActivationPolicy(RecomputeLevel.PROJECTIONS, True),
        ActivationPolicy(RecomputeLevel.ADAPTER),
        ActivationPolicy(RecomputeLevel.EVERYTHING),
    ]
    activation.apply(stage, dict(enumerate(mixed)), arena)
    for _ in range(2):  # and again: slots are used anew
        found = gradients(stage)
        for parameter in trainable(stage).values():
            parameter.grad = None
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Products(TorchDispatchMode):
    """Counts, by the shape of their weight, products of tokens with a weight transposed, as forward has them."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[tuple[int, ...]] = Counter()
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in replay.PRODUCTS:
            rows, weight = args[-2], args[-1]
            # `linear` multiplies by a transposed view; backward by the weight as it lies.
            if len(rows) == TOKENS and weight.stride(0) == 1:
                self.count[tuple(weight.shape)] += 1
        self.attention += "attention" in str(func) and "backward" not in str(func)
        return func(*args, **(kwargs or {}))


TOKENS = 24
D, F, HEADS, KV = 32, 64, 32, 16  # tests/helpers/builders.py: hidden, feed-forward, widths of q and of k, v
Q, K_AND_V, GATE_AND_UP = (D, HEADS), (D, KV), (D, F)
OUT, DOWN = (HEADS, D), (F, D)  # Q and OUT are the same shape: both square


@pytest.mark.parametrize(
    ("kind", "level", "again"),
    [
        ("cohere", RecomputeLevel.ADAPTER, {Q: 1, K_AND_V: 2, GATE_AND_UP: 2, "attention": 1}),
        ("cohere", RecomputeLevel.ATTENTION, {Q: 1, K_AND_V: 2, GATE_AND_UP: 2}),
        ("cohere", RecomputeLevel.PROJECTIONS, {GATE_AND_UP: 2}),
        ("cohere", RecomputeLevel.EVERYTHING, {}),
        # In a sequential block o_proj's output is part of what the second norm and the MLP read.
        ("llama", RecomputeLevel.ADAPTER, {Q: 2, K_AND_V: 2, GATE_AND_UP: 2, "attention": 1}),
        ("llama", RecomputeLevel.ATTENTION, {Q: 2, K_AND_V: 2, GATE_AND_UP: 2}),
        ("llama", RecomputeLevel.PROJECTIONS, {OUT: 1, GATE_AND_UP: 2}),
        ("llama", RecomputeLevel.EVERYTHING, {}),
    ],
)
def test_only_what_backward_needs_runs_again(
    folders: dict[str, Path], kind: str, level: RecomputeLevel, again: dict[Any, int]
) -> None:
    """One middle layer: which products of a forward are in its backward. Never down_proj's, and o_proj's where it must be."""
    stage = stage_of(folders[kind], 1, 2)
    activation.apply(stage, {1: ActivationPolicy(level, on_host=True)}, HostArena(1 << 22, torch.device("cpu")))
    x = torch.randn(1, TOKENS, D).requires_grad_()
    output = stage((x, torch.arange(TOKENS)[None]))[0]
    with Products() as products:
        output.sum().backward()
    weights_of_the_layer = {Q, K_AND_V, GATE_AND_UP, OUT, DOWN}
    found = {shape: n for shape, n in products.count.items() if shape in weights_of_the_layer}
    assert found == {shape: n for shape, n in again.items() if shape != "attention"}
    assert products.attention == again.get("attention", 0)


def test_without_an_arena_nothing_can_be_on_the_host(folders: dict[str, Path]) -> None:
    stage = stage_of(folders["cohere"], 0, 4)
    activation.apply(stage, {0: ActivationPolicy(RecomputeLevel.INPUT, on_host=True)})
    with pytest.raises(ValueError, match="arena"):
        gradients(stage)
