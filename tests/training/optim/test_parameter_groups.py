"""LoRA+'s groups by name, and their rates under a schedule. Oracle: PEFT's own helper, on matrices alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.console import UserError
from pipeline.training.optim.inner import add, make_inner, value
from pipeline.training.optim.lr_schedule import learning_rate
from pipeline.training.optim.parameter_groups import ParamGroupOverride, build, check, is_fast
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.run.folder import check_continues

KINDS = ["adamw_kahan", "adamw", "adamw8bit"]
LAMBDA = 16.0
MODULES = ("model.layers.0.mlp.down_proj", "model.layers.7.self_attn.B.proj")
# Name → shape, and whether LoRA+ gives it the higher rate.
FAST = {
    **{f"{module}.B": (8, 2) for module in MODULES},
    "model.layers.1.mlp.down_proj.M": (2, 2),
    "model.layers.1.mlp.down_proj.lora_B.default.weight": (8, 2),
}
SLOW = {
    **{f"{module}.A": (2, 8) for module in MODULES},
    "model.layers.1.mlp.down_proj.lora_A.default.weight": (2, 8),
    "model.layers.1.mlp.down_proj.magnitude": (8,),
    "model.layers.1.mlp.down_proj.lora_B.default.bias": (8,),
    "model.layers.1.mlp.down_proj.B": (8,),  # a vector, whatever its name
    "model.layers.2.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "model.embed_tokens.weight": (10, 8),
    "model.layers.3.self_attn.q_proj.weight": (8, 8),
}


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_what_is_fast(name: str) -> None:
    shape = {**FAST, **SLOW}[name]
    assert is_fast(name, nn.Parameter(torch.zeros(shape))) == (name in FAST)


@pytest.mark.parametrize("kind", ["adamw_kahan", "adamw", "adamw8bit"])
@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_rates_are_lambda_apart_at_every_step(kind: str, shape: str) -> None:
    """Through warmup and to lr_min: B's step is λ·lr(t). With Adam's first steps on a constant gradient it is seen."""
    own = parameters({"x.A": (2, 8), "x.B": (8, 2), "norm.weight": (8,)})
    groups = build(own, fast_ratio=LAMBDA, weight_decay=0.0)
    optimizer = PipelineOptimizer(
        own, make_inner(kind, groups, lr=1e-4, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.0), 0.0
    )
    for step in range(12):
        rate = learning_rate(step, peak=1e-4, warmup=4, total=12, shape=shape, lowest=1e-5)
        before = {name: p.detach().double() for name, p in own.items()}
        optimizer.set_lr(rate)
        sum((p.sum() for p in own.values()), torch.zeros(())).backward()
        optimizer.step()
        for name, p in own.items():
            expected = rate * (LAMBDA if name == "x.B" else 1)
            # The moments of a constant gradient of 1 are 1 to some fp32 roundings; so is their quotient.
            moved = (before[name] - p.detach().double()).mean()
            assert float(moved) == pytest.approx(expected, rel=1e-4), (step, name)


def test_matrices_are_grouped_as_by_pefts_helper() -> None:
    """PEFT's groups are told apart by their rate; of one-dimensional parameters, which it gets wrong, there are none."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 8)

    model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["first", "second"]))  # type: ignore[arg-type]
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=LAMBDA)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = build(trained, fast_ratio=LAMBDA, weight_decay=0.0)
    rate_of = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    assert len(trained) == 4
    assert {id(p): group["lr_factor"] for group in ours for p in group["params"]} == rate_of


def test_each_parameter_is_in_one_group_with_its_decay() -> None:
    own = parameters({**FAST, **SLOW})
    undecayed = {f"{MODULES[0]}.A", f"{MODULES[0]}.B"}
    groups = build(own, fast_ratio=LAMBDA, weight_decay=0.1, undecayed=undecayed)
    found = [(id(p), group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]]
    expected = {
        (id(p), LAMBDA if is_fast(name, p) else 1.0, 0.0 if name in undecayed else 0.1) for name, p in own.items()
    }
    assert len(found) == len(own)
    assert set(found) == expected


def test_one_group_without_loraplus_and_on_a_stage_that_trains_nothing() -> None:
    own = parameters(FAST)
    (group,) = build(own, fast_ratio=1.0, weight_decay=0.1)
    assert group["params"] == list(own.values())
    assert group["lr_factor"] == 1.0
    (nothing,) = build({}, fast_ratio=LAMBDA, weight_decay=0.1)
    assert nothing["params"] == []


# Groups by name


def test_first_group_that_names_a_parameter_has_it() -> None:
    own = parameters({**FAST, **SLOW})
    specials = [
        ParamGroupOverride(["down_proj.A"], {"lr_factor": 0.5, "weight_decay": 0.0}),
        ParamGroupOverride([r"layers\.[01]\..*", "norm.weight"], {"eps": 1e-3}),
        ParamGroupOverride([".*"], {"betas": (0.5, 0.5)}),
    ]
    groups = build(own, fast_ratio=LAMBDA, weight_decay=0.1, specials=specials)
    names = {id(p): name for name, p in own.items()}
    found = {
        names[id(p)]: {k: v for k, v in group.items() if k != "params"} for group in groups for p in group["params"]
    }
    assert len(found) == len(own) == sum(len(group["params"]) for group in groups)
    assert found["model.layers.0.mlp.down_proj.A"] == {"lr_factor": 0.5, "weight_decay": 0.0}
    assert found["model.layers.0.mlp.down_proj.B"] == {"lr_factor": LAMBDA, "weight_decay": 0.1, "eps": 1e-3}
    assert found["model.norm.weight"] == {"lr_factor": 1.0, "weight_decay": 0.1, "eps": 1e-3}
    assert found["model.layers.2.input_layernorm.weight"] == {
        "lr_factor": 1.0,
        "weight_decay": 0.1,
        "betas": (0.5, 0.5),
    }
    assert found["model.embed_tokens.weight"]["betas"] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("kind", "other"), [*((k, k) for k in KINDS), ("adamw_kahan", "adamw"), ("adamw8bit", "adamw_kahan")]
)
def test_groups_learn_as_optimizers_of_their_own(kind: str, other: str) -> None:
    """Two parameters in one optimizer with groups, bit-equal to each alone with the group's values and type."""
    values = {"first": {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}}
    values["second"] = {"lr": 3e-2, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0}
    special = ParamGroupOverride(
        ["second"], {"type": other, "lr_factor": 3.0, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0}
    )
    start = {name: torch.randn(70, 70, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(values)}

    def run(own: dict[str, nn.Parameter], optimizer: PipelineOptimizer, lr: float) -> None:
        for step in range(3):
            for name, p in own.items():
                g = torch.Generator().manual_seed(10 * step + (name == "second"))
                (p * torch.randn(p.shape, generator=g)).sum().backward()
            optimizer.set_lr(lr)
            optimizer.step()

    together = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    groups = build(together, fast_ratio=1.0, weight_decay=0.1, specials=[special])
    run(together, PipelineOptimizer(together, make_inner(kind, groups, **values["first"]), 0.0), 1e-2)  # type: ignore[arg-type]
    for name in values:
        alone = {name: nn.Parameter(start[name].clone())}
        own = kind if name == "first" else other
        inner = make_inner(own, [{"params": list(alone.values())}], **values[name])  # type: ignore[arg-type]
        run(alone, PipelineOptimizer(alone, inner, 0.0), values[name]["lr"])  # type: ignore[arg-type]
        assert torch.equal(alone[name], together[name])
        assert not torch.equal(alone[name], start[name])


def test_pattern_that_names_nothing() -> None:
    check([ParamGroupOverride(["A", r"layers\.0\..*"], {})], [*FAST, *SLOW])
    with pytest.raises(UserError, match=r"optimizer\.groups: 'lora_Z' names no parameter that is trained"):
        check([ParamGroupOverride(["A", "lora_Z"], {})], [*FAST, *SLOW])


def test_optimizers_of_several_types_are_seen_as_one() -> None:
    """Rates, states and the compensated sum are found by parameter, whichever optimizer has it."""
    first, second = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    special = ParamGroupOverride(["second"], {"type": "adamw", "lr_factor": 2.0})
    groups = build({"first": first, "second": second}, fast_ratio=1.0, weight_decay=0.0, specials=[special])
    inner = make_inner("adamw_kahan", groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
    optimizer = PipelineOptimizer({"first": first, "second": second}, inner, 0.0)
    optimizer.set_lr(1e-3)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-3, 2e-3]
    (first.sum() + second.sum()).backward()
    optimizer.step()
    assert "kahan" in inner.state[first]
    assert "exp_avg" in inner.state[second]
    assert len(inner.state) == 2
    before = {p: value(inner, p) for p in (first, second)}
    for p in (first, second):
        add(inner, p, torch.full_like(p, 2.0**-13, dtype=torch.float32))  # far below half a unit in the last place
    assert torch.equal(value(inner, first), before[first] + 2.0**-13)
    assert torch.equal(value(inner, second), before[second])


def test_a_groups_type_is_said_where_a_checkpoint_has_another() -> None:
    group = {"names": ["B"], "type": "adamw"}
    saved = {"optimizer": {"type": "adamw_kahan", "groups": []}}
    config = {"optimizer": {"type": "adamw_kahan", "groups": [group]}, "load_optimizer_states": True}
    manifest = {"config": saved, "trained": ["m.A", "m.B"]}
    with pytest.raises(UserError, match=r"optimizer is adamw_kahan, this run's adamw_kahan, adamw for B: of m\.B"):
        check_continues(manifest, config, {"m.A", "m.B"}, {})
    check_continues(manifest, {**config, "load_optimizer_states": False}, {"m.A", "m.B"}, {})
    check_continues({**manifest, "trained": ["m.A"]}, config, {"m.A"}, {})


def test_a_groups_type_is_that_of_the_first_that_names_the_parameter() -> None:
    """However the groups are written: what counts is each parameter's optimizer. A tied head has its embedding's."""
    typed, faster = {"names": ["B", "embed"], "type": "adamw"}, {"names": ["B"], "lr_ratio": 2.0}
    apart = [{**typed, "names": [name]} for name in ("embed", "B")]

    def continues(before: list[Any], now: list[Any], names: set[str]) -> None:
        saved, config = ({"optimizer": {"type": "adamw_kahan", "groups": groups}} for groups in (before, now))
        manifest = {"config": saved, "trained": sorted(names)}
        check_continues(manifest, {**config, "load_optimizer_states": True}, names, {"lm_head": "embed"})

    continues([typed], apart, {"m.A", "m.B", "embed", "lm_head"})
    continues([typed], [*apart, faster], {"m.A", "m.B"})
    with pytest.raises(UserError, match=r"of m\.B their states do not fit"):
        continues([typed], [faster, typed], {"m.A", "m.B"})
    with pytest.raises(UserError, match="of lm_head their states do not fit"):
        continues([typed], apart[1:], {"m.A", "lm_head"})
