"""Adapters switched off: the base to the bit, and the same adapters afterwards; every family, with and without kernels."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.families import CONFIGURED
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage
from pipeline.training.stage import families
from pipeline.training.start import resolve
from tests.helpers.quick import only
from tests.helpers.stages import build, hidden, token_ids
from tests.model.test_every_family import config_of

OF_FAMILY: dict[str, dict[str, Any]] = {
    "ia3": {"lora_rank": None, "lora_alpha": None},
    "oft": {"lora_rank": None, "lora_alpha": None, "oft_block_size": 8},
    "boft": {"lora_rank": None, "lora_alpha": None, "boft_block_size": 8},
    "hra": {"lora_alpha": None},
    "control_adapter": {"lora_alpha": None},
    "peft": {"lora_rank": None, "lora_alpha": None, "peft": {"type": "LOHA", "r": 4}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"adapter_type": "lora", "use_dora": True},
    "pissa": {"adapter_type": "lora", "init_lora_weights": "pissa"},
}
CASES = {name: {"adapter_type": name, **OF_FAMILY.get(name, {})} for name in CONFIGURED} | VARIANTS


def adapted(base: Path, changes: dict[str, Any]) -> Stage:
    """The whole model as one stage with an adapter that is away from its start."""
    plan = resolve.resolve(config_of(base, 1, **changes))
    stage = build(base, 0, 4)
    assert plan.trained.adapter is not None
    families.inject(stage, plan.trained.adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(stage).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return stage.eval()


@torch.no_grad()
def output(stage: Stage) -> Tensor:
    return hidden([stage], token_ids())


@pytest.mark.parametrize("case", CASES)
def test_off_is_the_base_and_on_again_the_adapter(base: Path, case: str) -> None:
    right, stage = output(build(base, 0, 4)), adapted(base, CASES[case])
    before = output(stage)
    assert not torch.equal(before, right)
    trained = {name: parameter.requires_grad for name, parameter in stage.named_parameters()}
    with adapters_off(stage):
        assert torch.equal(output(stage), right)
    assert torch.equal(output(stage), before)
    assert {name: parameter.requires_grad for name, parameter in stage.named_parameters()} == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_off_through_the_kernels(base: Path, dtype: torch.dtype) -> None:
    """The MLP's kernel reads A and B itself. Its sum of a parallel block is rounded once, where the base's is twice."""
    plan = resolve.resolve(config_of(base, 1, lora_weight_dtype="float32"))
    assert plan.trained.adapter is not None
    stage = build(base, 0, 4, dtype)
    families.inject(stage, plan.trained.adapter)
    taken = fusion.apply(stage, frozenset(fusion.KERNELS))
    assert taken["multiplicative"]
    assert taken["parallel_block"]
    right = output(stage)  # B is zero
    with torch.no_grad():
        for name, parameter in trainable(stage).items():
            if name.endswith(".B"):
                parameter.fill_(0.05)
    assert not torch.equal(output(stage), right)
    with adapters_off(stage):
        assert torch.equal(output(stage), right)


KERNEL_SETS = [*((name,) for name in fusion.KERNELS), fusion.KERNELS]


@pytest.mark.parametrize("kernels", only([fusion.KERNELS], KERNEL_SETS), ids=lambda names: "+".join(names))
@pytest.mark.parametrize("case", CASES)
def test_off_is_the_base_with_the_same_kernels(llama: Path, case: str, kernels: tuple[str, ...]) -> None:
    """What a reference in every step relies on, and the adapters are there again afterwards."""
    base, stage = build(llama, 0, 4), adapted(llama, CASES[case])
    fusion.apply(base, frozenset(kernels))
    fusion.apply(stage, frozenset(kernels))
    right, before = output(base), output(stage)
    assert not torch.equal(before, right)
    with adapters_off(stage):
        assert torch.equal(output(stage), right)
    assert torch.equal(output(stage), before)
