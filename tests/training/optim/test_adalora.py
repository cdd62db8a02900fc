"""AdaLoRA's budget over stages: the ranks that PEFT's RankAllocator gives unsplit modules, and the gradient of its loss term."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from pipeline.peft import layers as peft_layers
from pipeline.training.optim import adalora
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer

KEYS: dict[str, Any] = {
    "init_r": 5,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 12,
    "lora_alpha": 8,
    "orth_reg_weight": 0.0,
}
SHAPES = {"a": (12, 8), "b": (6, 8), "c": (8, 16), "d": (4, 4), "e": (10, 10), "f": (7, 9)}
PLACES = {name: place for place, name in enumerate(SHAPES)}
VALUES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}


def linear(name: str) -> nn.Linear:
    rows, columns = SHAPES[name]
    return nn.Linear(columns, rows, bias=False).requires_grad_(False)


def draw(name: str, letter: str, step: int, shape: Any) -> Tensor:
    seed = PLACES[name] * 1000 + "AEB".index(letter) * 100 + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Stage:
    """Some of the modules with PEFT's AdaLoRA layers and an optimizer of their own; `sum_over`: what stands for the group."""

    def __init__(self, names: list[str], kind: str, sum_over: Callable[[Tensor], None], **keys: Any) -> None:
        settings = {**KEYS, **keys}
        made = peft_layers.put_around({name: linear(name) for name in names}, "ADALORA", settings) if names else {}
        self.layers = made
        self.parameters = {
            f"{name}.lora_{letter}": getattr(layer, f"lora_{letter}")["default"]
            for name, layer in made.items()
            for letter in "AEB"
        }
        for name, parameter in self.parameters.items():
            start(name, parameter)
        inner = make_inner(kind, [{"params": list(self.parameters.values())}], **VALUES)
        self.optimizer = PipelineOptimizer(self.parameters, inner, 0.0)
        self.optimizer.sum_over_stages = sum_over  # type: ignore[method-assign]
        adalora.attach(self.optimizer, made, PLACES, peft_layers.as_json("ADALORA", settings))

    def step(self, step: int) -> None:
        for name, total in self.optimizer._sums.items():
            module, _, own = name.partition(".")
            total.copy_(draw(module, own[-1], step, total.shape))
        self.optimizer.step()

    def kept(self) -> dict[str, list[bool] | None]:
        found = {name: layer.kept() for name, layer in self.layers.items()}
        return {name: None if mask is None else mask.bool().tolist() for name, mask in found.items()}


@torch.no_grad()
def start(name: str, parameter: Tensor) -> None:
    module, _, own = name.partition(".")
    parameter.copy_(0.3 * draw(module, own[-1], 0, parameter.shape))


def unsplit() -> tuple[Any, dict[str, Tensor], Any]:
    """PEFT's own model of all modules, its parameters by our names, and torch's optimizer of them."""
    model = AdaLoraModel(
        nn.ModuleDict({name: linear(name) for name in SHAPES}),
        AdaLoraConfig(target_modules=list(SHAPES), **KEYS),
        "default",
    )
    parameters = {
        f"{name}.lora_{letter}": getattr(model.model[name], f"lora_{letter}")["default"]
        for name in SHAPES
        for letter in "AEB"
    }
    for name, parameter in parameters.items():
        start(name, parameter)
    return model, parameters, torch.optim.AdamW(parameters.values(), **VALUES)


def test_two_stages_keep_what_peft_keeps_unsplit() -> None:
    """Weights and masks to the bit, of a stage that trains nothing too, step by step."""
    model, right, optimizer = unsplit()
    barrier, lock, gathered = threading.Barrier(3), threading.Lock(), []

    def total(tensor: Tensor) -> None:
        with lock:
            gathered.append(tensor.clone())
        barrier.wait()
        tensor.copy_(torch.stack(gathered).sum(0))
        if barrier.wait() == 0:
            gathered.clear()
        barrier.wait()

    stages = [Stage(names, "adamw", total) for names in (["a", "b"], [], ["c", "d", "e", "f"])]
    changes = 0
    for step in range(1, KEYS["total_step"] + 1):
        for name, parameter in right.items():
            module, _, own = name.partition(".")
            parameter.grad = draw(module, own[-1], step, parameter.shape)
        optimizer.step()
        before = model.peft_config["default"].rank_pattern
        model.update_and_allocate(step)
        pattern = model.peft_config["default"].rank_pattern
        changes += pattern != before
        at_once = [threading.Thread(target=stage.step, args=(step,)) for stage in stages]
        for one in at_once:
            one.start()
        for one in at_once:
            one.join(timeout=30)
        for stage in stages:
            for name, parameter in stage.parameters.items():
                assert torch.equal(parameter, right[name]), (step, name)
            for name, mask in stage.kept().items():
                assert mask == (pattern and pattern[f"{name}.lora_E.default"]), (step, name)
    kept = [mask for stage in stages for mask in stage.kept().values()]
    assert changes >= 3
    assert sum(map(sum, kept)) == KEYS["target_r"] * len(SHAPES)  # type: ignore[arg-type]
    assert len({sum(mask) for mask in kept if mask}) > 1, "the budget is shared out evenly, and nothing shows"


def test_what_is_dropped_is_zero_past_the_compensated_sum() -> None:
    stage = Stage(list(SHAPES), "adamw_kahan", lambda tensor: None)
    for step in range(1, KEYS["total_step"] + 1):
        stage.step(step)
    for name, layer in stage.layers.items():
        mask = torch.tensor(stage.kept()[name])
        E = layer.lora_E["default"]
        assert not bool(E[~mask].any())
        assert bool(E[mask].all())
        assert not bool(stage.optimizer.inner.state[E]["kahan"][~mask].any())


def test_the_gradient_is_that_of_pefts_loss_term() -> None:
    """AdaLoraModel.forward adds orth_reg_weight times the mean of the norms to the loss; autograd says what its gradient is."""
    stage = Stage(list(SHAPES), "adamw", lambda tensor: None, orth_reg_weight=0.7)
    seen: dict[str, Tensor] = {}
    stage.optimizer.on_gradients = lambda sums: seen.update({name: total.clone() for name, total in sums.items()})
    norms = []
    for name, parameter in stage.parameters.items():
        if not name.endswith("E"):
            P = parameter if name.endswith("A") else parameter.T
            norms.append(torch.norm(P @ P.T - torch.eye(len(P)), p="fro"))
    names = [name for name in stage.parameters if not name.endswith("E")]
    gradients = torch.autograd.grad(0.7 * sum(norms) / len(norms), [stage.parameters[name] for name in names])
    stage.step(1)
    for name, gradient in zip(names, gradients, strict=True):
        module, _, own = name.partition(".")
        expected = draw(module, own[-1], 1, gradient.shape) + gradient
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("step", "dropped"), [(2, None), (3, None), (4, 12), (9, 18), (10, None)])
def test_the_schedule(step: int, dropped: int | None) -> None:
    """Of 30 triplets 12 are left at last, by a cube from step 2 to step 9: after 4 of them 30 − int(18·(5/7)³ + 12)."""
    keys = {key: KEYS[key] for key in ("init_r", "target_r", "tinit", "tfinal", "total_step", "orth_reg_weight")}
    assert adalora.Schedule(modules=6, delta_t=2, beta1=0.85, beta2=0.85, **keys).dropped(step) == dropped
