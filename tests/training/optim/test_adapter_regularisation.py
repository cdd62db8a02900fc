"""Decay of the product s·B·A and the bound on its norm.

Oracles: autograd in fp64 of ½·λ·‖s·B·A‖², with the D×D product made; AdamW written out in fp64; qlora-pipe's formula.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import loading
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.full import unfreeze_model
from pipeline.training.optim.adamw_kahan import AdamWKahan
from pipeline.training.optim.inner import make_inner
from pipeline.training.optim.parameter_groups import build
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.optim.regularisation import Factors, bound_norms, decay_products, factors_of
from pipeline.training.stage import families, parts
from pipeline.training.start import to_train
from tests.helpers.builders import save_model
from tests.helpers.configs import small
from tests.helpers.stages import chain

BF16 = torch.bfloat16
RANK, D_IN, D_OUT = 4, 24, 40
UNIT = 2**-24
LR, RATIO, LAMBDA = 1e-3, 16.0, 0.5
VALUES: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}


def adapters(dtype: torch.dtype, *scalings: float) -> dict[str, Factors]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=g).to(dtype))

    return {f"m{i}": Factors(draw(RANK, D_IN), draw(D_OUT, RANK), s) for i, s in enumerate(scalings)}


def named(factors: dict[str, Factors]) -> dict[str, nn.Parameter]:
    return {f"{m}.{letter}": p for m, f in factors.items() for letter, p in zip("AB", f[:2], strict=True)}


def inner(kind: str, factors: dict[str, Factors], ratio: float = 1.0, **changes: Any) -> Any:
    optimizer = make_inner(kind, build(named(factors), fast_ratio=ratio, weight_decay=0.0), **{**VALUES, **changes})
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_factor"]
    return optimizer


def fp64_gradients(A: Tensor, B: Tensor, s: float) -> tuple[Tensor, ...]:
    """Of ½‖s·B·A‖²_F, by autograd."""
    a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    return torch.autograd.grad(0.5 * (s * b @ a).square().sum(), (a, b))


def product_norm(A: Tensor, B: Tensor, s: float) -> float:
    return float(torch.linalg.matrix_norm(s * (B.detach().double() @ A.detach().double())))


@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw", "adamw8bit"])
def test_decay_is_lr_times_the_gradient_of_the_product(kind: str) -> None:
    """Of both factors from the weights before the step, B's at LoRA+'s rate."""
    factors = adapters(torch.float32, 2.0, 0.25)
    before = {name: p.detach().clone() for name, p in named(factors).items()}
    decay_products(factors, LAMBDA, inner(kind, factors, RATIO))
    for module, (_, _, s) in factors.items():
        of_A, of_B = fp64_gradients(before[f"{module}.A"], before[f"{module}.B"], s)
        for letter, rate, gradient in (("A", LR, of_A), ("B", LR * RATIO, of_B)):
            name = f"{module}.{letter}"
            start, now = before[name].double(), named(factors)[name].detach().double()
            # Two products in fp32, of at most 40 and of 4 terms, and of numbers of about |B|²·|A| before they cancel;
            # the weight is rounded once.
            terms = (D_OUT + RANK + 4) * UNIT * float(gradient.abs().max()) * 4
            assert (
                (now - (start - rate * LAMBDA * gradient)).abs() <= rate * LAMBDA * terms + start.abs() * UNIT
            ).all()
            assert (now - start).abs().max() > 1000 * rate * LAMBDA * terms, "it says something"


def test_product_that_does_nothing_does_not_decay() -> None:
    """A begins as noise and B as zero: the product is zero, and A keeps what it is. Plain weight decay shrinks A."""
    factors = adapters(torch.float32, 2.0)
    with torch.no_grad():
        factors["m0"].B.zero_()
    before = factors["m0"].A.detach().clone()
    decay_products(factors, LAMBDA, inner("adamw", factors))
    assert torch.equal(factors["m0"].A, before)
    assert not factors["m0"].B.any()


def test_bf16_adapters_decay_as_fp64_says() -> None:
    """At a rate at which each decay is far below half a unit in the last place of bf16: 2000 of them, through the sum."""
    factors, steps, lr = adapters(BF16, 1.0), 2000, 5e-6
    optimizer = inner("adamw_kahan", factors, lr=lr)
    A, B = (p.detach().double() for p in factors["m0"][:2])
    start = {letter: p.detach().clone() for letter, p in zip("AB", factors["m0"][:2], strict=True)}
    for _ in range(steps):
        decay_products(factors, 0.1, optimizer)
        of_A, of_B = fp64_gradients(A, B, 1.0)
        A, B = A - lr * 0.1 * of_A, B - lr * 0.1 * of_B
    for letter, parameter, exact in zip("AB", factors["m0"][:2], (A, B), strict=True):
        moved = (start[letter].double() - exact).abs()
        found = parameter.detach().double() + optimizer.state[parameter]["kahan"].double()
        # Each step rounds the compensation, at most 2⁻⁸ of the weight, twice to fp32; and the change, to the products'
        # relative precision as above, of what has moved in all.
        allowed = steps * 2 * 2**-8 * UNIT * exact.abs().max() + 4 * 48 * UNIT * moved.max()
        assert (found - exact).abs().max() <= allowed < 0.01 * moved.max(), letter
        assert (moved / steps < start[letter].double().abs() * 2**-9).float().mean() > 0.9, "one step alone is lost"


@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw"])
def test_decay_then_update_is_adamws_step_with_this_decay(kind: str) -> None:
    """θ ← θ − lr·(m̂/(√v̂ + ε) + λ·∇½‖sBA‖²), written out in fp64, three steps through PipelineOptimizer, clipping too."""
    factors, clip = adapters(torch.float32, 2.0, 0.5), 0.1
    own = named(factors)
    optimizer = PipelineOptimizer(own, inner(kind, factors, RATIO), clip)
    optimizer.before_update.append(lambda: decay_products(factors, LAMBDA, optimizer.inner))
    theta = {name: p.detach().double() for name, p in own.items()}
    m = {name: torch.zeros_like(t) for name, t in theta.items()}
    v = {name: torch.zeros_like(t) for name, t in theta.items()}
    g = torch.Generator().manual_seed(5)
    for step in range(1, 4):
        gradients = {name: torch.randn(p.shape, generator=g) for name, p in own.items()}
        sum(((p * gradients[name]).sum() for name, p in own.items()), torch.zeros(())).backward()
        optimizer.set_lr(LR)
        optimizer.step()
        norm = float(torch.stack([t.double().square().sum() for t in gradients.values()]).sum().sqrt())
        decays: dict[str, Tensor] = {}
        for module, (_, _, s) in factors.items():
            pair = fp64_gradients(theta[f"{module}.A"], theta[f"{module}.B"], s)
            decays |= {f"{module}.{letter}": d for letter, d in zip("AB", pair, strict=True)}
        for name in theta:
            clipped = gradients[name].double() * min(1.0, clip / (norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.99 * v[name] + 0.01 * clipped**2
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-6)
            theta[name] = theta[name] - (LR * RATIO if name.endswith("B") else LR) * (update + LAMBDA * decays[name])
    for name, parameter in own.items():
        rate = LR * RATIO if name.endswith("B") else LR
        # An update of about 1 in some 30 fp32 operations (√v̂ of a small gradient halves v's), a decay of at most 100 in
        # 48 terms, and the weight's own rounding; each three times.
        allowed = 3 * (rate * (30 * UNIT * 10 + LAMBDA * 48 * UNIT * 200) + 2 * UNIT * 4)
        assert (parameter.detach().double() - theta[name]).abs().max() <= allowed, name


# The bound on the norm


def qlora_pipes(A: Tensor, B: Tensor, s: float, largest: float) -> tuple[Tensor, Tensor, bool]:
    """`apply_max_norm_regularization` of qlora-pipe, in fp64, with the product made."""
    norm = (s * (B.double() @ A.double())).norm().clamp(min=largest / 2)
    ratio = torch.clamp(norm, max=largest) / norm
    return A.double() * ratio**0.5, B.double() * ratio**0.5, bool(ratio != 1)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw"])
def test_norms_are_bounded_as_in_qlora_pipe(kind: str, dtype: torch.dtype) -> None:
    factors = adapters(dtype, 4.0, 0.01, -1.0)
    sizes = {module: product_norm(*f) for module, f in factors.items()}
    largest = 20.0
    assert [size > largest for size in sizes.values()] == [True, False, True]
    before = {module: (f.A.detach().clone(), f.B.detach().clone()) for module, f in factors.items()}
    optimizer = inner(kind, factors)
    assert bound_norms(factors, largest, optimizer) == 2
    for module, (A, B, s) in factors.items():
        *expected, scaled = qlora_pipes(*before[module], s, largest)
        assert scaled == (sizes[module] > largest)
        exact = isinstance(optimizer, AdamWKahan)
        for parameter, start, wanted in zip((A, B), before[module], expected, strict=True):
            value = parameter.detach().double()
            if exact:
                value = value + optimizer.state[parameter]["kahan"].double()
            if not scaled:
                assert torch.equal(parameter.detach(), start), "left alone to the last bit"
            # The norm in fp32 Gram matrices, the ratio, one product; bf16 without compensation is rounded to 2⁻⁹ of itself.
            unit = 2**-9 if dtype == BF16 and not exact else (D_OUT + 8) * UNIT
            assert ((value - wanted).abs() <= unit * wanted.abs() * 2).all()
        slack = 2**-7 if dtype == BF16 else 100 * UNIT
        assert product_norm(A, B, s) <= max(largest, sizes[module] if not scaled else 0) * (1 + slack)


def test_nothing_to_bound() -> None:
    """A stage without adapters; adapters that are zero, as at the start."""
    assert bound_norms({}, 1.0, inner("adamw_kahan", {})) == 0
    factors = adapters(torch.float32, 1.0)
    with torch.no_grad():
        factors["m0"].B.zero_()
    before = factors["m0"].A.detach().clone()
    assert bound_norms(factors, 1e-9, inner("adamw_kahan", factors)) == 0
    assert torch.equal(factors["m0"].A, before)


# Which factors a stage has


@pytest.mark.parametrize("kernels", ["none", "all"])
@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, 2.0),
        ({"adapter_type": "lora"}, 2.0),
        ({"adapter_type": "lora", "use_rslora": True}, 4.0),
        ({"adapter_type": "lora", "use_dora": True}, 2.0),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 2.0}}, 2.0),
    ],
    ids=str,
)
def test_factors_of_a_stage(tmp_path: Path, keys: dict[str, Any], scaling: float, kernels: str) -> None:
    """Every trained pair, under its module's name, with the module's own s."""
    save_model(tmp_path, "llama", layers=2)
    config = loading.validate(small(lora_weight_dtype="float32", target_modules=["down_proj"], **keys), "x.toml")
    (stage,) = chain(tmp_path, [0, 2])
    targets = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    families.inject(stage, to_train.adapter_of(config, targets))
    parts.put_kernels(stage, kernels)
    factors = factors_of(stage)
    assert list(factors) == targets
    of_layer_1 = 0.5 if "alpha_pattern" in keys else scaling
    assert [f.scaling for f in factors.values()] == pytest.approx([scaling, of_layer_1])
    trained = trainable(stage)
    assert all(f.A is trained[f"{m}.A"] and f.B is trained[f"{m}.B"] for m, f in factors.items())


def test_a_fully_trained_stage_has_none(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", layers=2)
    (stage,) = chain(tmp_path, [0, 2])
    unfreeze_model(stage, None)
    assert factors_of(stage) == {}
