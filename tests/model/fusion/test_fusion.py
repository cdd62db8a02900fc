"""Kernels put into stages by structure: the same hidden state and gradients as without, and what took which."""

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from pipeline.model import weights
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.lora import inject_lora
from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.adapters.targets import resolve_targets
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage, empty_model, read_model_config
from tests.helpers.builders import save_model

ALL = frozenset(fusion.KERNELS)
EXPECTED = {  # of 4 layers, the first 3 adapted: what is replaced
    # In a parallel block that takes its kernel the five projections are one group, else they are two.
    "cohere": {"multiplicative": 3, "swiglu": 1, "norm": 5, "rope": 4, "parallel_block": 3, "shared_input": 5},
    "cohere2": {
        "multiplicative": 3,
        "swiglu": 1,
        "norm": 5,
        "rope": 3,
        "parallel_block": 3,
        "shared_input": 5,
    },  # one layer has no RoPE
    "llama": {"multiplicative": 3, "swiglu": 1, "norm": 9, "rope": 4, "shared_input": 8},
    "granite": {"multiplicative": 3, "swiglu": 1, "norm": 9, "rope": 4, "shared_input": 8},
    "gemma2": {"multiplicative": 3, "swiglu": 1, "norm": 17, "rope": 4, "shared_input": 8},
    "mixtral": {"norm": 9, "rope": 4, "shared_input": 4},  # its experts are one tensor, not modules
}
EXPERTS = {"mixtral": {"num_local_experts": 4}}


def stage_of(
    folder: Path, kernels: frozenset[str], dropout: float = 0.0, dtype: Any = torch.float32, loaded: bool = True
) -> tuple[Stage, Any]:
    """The whole model as one stage, with adapters that do something on the first three layers' down_proj.

    Without `loaded` all parameters stay on `meta`, as the planner has them.
    """
    meta_model = empty_model(read_model_config(str(folder)), dtype, None)
    kind = meta_model.config.model_type
    names = ["o_proj"] if kind == "mixtral" else ["down_proj"]
    targets = resolve_targets(meta_model, names, [0, 1, 2])
    stage = Stage(meta_model, 0, 4)
    if loaded:
        weights.load(stage, str(folder), dtype, torch.device("cpu"))
    stage.requires_grad_(False)
    inject_multiplicative(stage, targets, 4, 8, dropout, dtype, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in trainable(stage).items():
        if name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return stage, fusion.apply(stage, kernels)


def gradients(stage: Stage) -> dict[str, Tensor]:
    """Of a random linear function of the hidden state: a norm's own square would be nearly constant."""
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(3))
    hidden = stage.train()((ids, torch.arange(24).expand(2, 24)))
    assert isinstance(hidden, Tensor)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))
    (hidden.float() * weight).sum().backward()
    found = {name: p.grad for name, p in trainable(stage).items() if p.grad is not None}
    return {"hidden": hidden.detach(), **found}


@pytest.mark.parametrize("kind", EXPECTED)
def test_all_kernels_compute_what_none_do(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind, **EXPERTS.get(kind, {}))
    plain, _ = stage_of(tmp_path, frozenset())
    fused, taken = stage_of(tmp_path, ALL)
    assert dict(taken) == EXPECTED[kind]
    expected, found = gradients(plain), gradients(fused)
    assert expected.keys() == found.keys()
    assert len(found) == 7
    for name, tensor in expected.items():
        # fp32: a backward through four layers rounds some hundred times; errors of 2⁻²⁴ add up as their root.
        assert (found[name] - tensor).norm() <= 20 * 2**-24 * tensor.norm(), name


@pytest.mark.parametrize("kind", EXPECTED)
def test_bf16_is_as_close_to_fp32_as_without(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path, kind, **EXPERTS.get(kind, {}))
    truth = gradients(stage_of(tmp_path, frozenset())[0])
    plain = gradients(stage_of(tmp_path, frozenset(), dtype=torch.bfloat16)[0])
    fused = gradients(stage_of(tmp_path, ALL, dtype=torch.bfloat16)[0])
    for name, tensor in truth.items():
        error = (plain[name].float() - tensor).norm()
        assert (fused[name].float() - tensor).norm() <= 1.25 * error + 2**-8 * tensor.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_stage_without_weights_takes_the_same(tmp_path: Path, kind: str, dtype: Any) -> None:
    """The planner counts on a stage on `meta`; what it counts must be what runs."""
    save_model(tmp_path, kind, **EXPERTS.get(kind, {}))
    (real, found), (empty, planned) = (
        stage_of(tmp_path, ALL, dtype=dtype, loaded=with_it) for with_it in (True, False)
    )
    assert all(p.is_meta for p in empty.parameters())
    assert dict(planned) == dict(found) == EXPECTED[kind]
    forwards = [
        {name: description(m.forward) for name, m in stage.named_modules() if "forward" in vars(m)}
        for stage in (real, empty)
    ]
    assert forwards[0] == forwards[1]
    groups = found.pop("shared_input")  # each has a forward for every one of its layers
    alone = [name for name in forwards[0] if not name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]
    assert len(alone) == sum(found.values())
    assert len(forwards[0]) - len(alone) >= 2 * groups


def description(forward: Any) -> tuple[Any, ...]:
    """A replaced forward's function and the plain values it was given: its form, its activation, its layout."""
    function = inspect.unwrap(getattr(forward, "func", forward))
    code = getattr(function, "__code__", getattr(getattr(function, "__func__", None), "__code__", None))
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    ours = getattr(function, "__globals__", {}).get("apply_rotary_pos_emb")
    values = [*cells, *getattr(forward, "args", ()), ours]
    plain = [v.keywords if isinstance(v, functools.partial) else v for v in values if not isinstance(v, nn.Module)]
    return code, plain


@pytest.mark.parametrize(
    "wanted",
    [{"norm"}, {"rope"}, {"swiglu"}, {"multiplicative"}, {"norm", "swiglu"}, {"multiplicative", "parallel_block"}],
)
def test_each_can_be_switched_off(tmp_path: Path, wanted: set[str]) -> None:
    save_model(tmp_path)
    _, taken = stage_of(tmp_path, frozenset(wanted))
    assert set(taken) == wanted
    if wanted >= {"swiglu"}:
        assert taken["swiglu"] == 4  # an adapted down_proj stays a module of its own behind the product


def test_dropout_needs_h_so_the_adapter_stays_a_module(tmp_path: Path) -> None:
    save_model(tmp_path)
    _, taken = stage_of(tmp_path, ALL, dropout=0.1)
    assert dict(taken) == {"swiglu": 4, "norm": 5, "rope": 4, "shared_input": 8}


def test_a_module_that_computes_something_else_is_left_alone(tmp_path: Path) -> None:
    """A gated MLP with a clamp, a norm with a twist: the same parts, another function."""
    save_model(tmp_path, "llama")
    meta_model = empty_model(read_model_config(str(tmp_path)), torch.float32, None)
    stage = Stage(meta_model, 0, 4)
    weights.load(stage, str(tmp_path), torch.float32, torch.device("cpu"))

    class Clamped(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(max=0.5))

    layers: Any = stage.model.base_model.layers
    layers[1].mlp = Clamped(layers[1].mlp)
    norm = layers[2].input_layernorm
    plain = norm.forward
    norm.forward = lambda x: plain(x) * 1.01
    taken = fusion.apply(stage, ALL)
    assert dict(taken) == {"swiglu": 3, "norm": 8, "rope": 4, "shared_input": 8}


@pytest.mark.parametrize("act_fn", [nn.ReLU(), nn.Tanh(), nn.Identity(), QuickGELUActivation()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_activation_is_not_taken_for_one_of_ours(tmp_path: Path, act_fn: Any, dtype: Any) -> None:
    """At small weights quick-gelu and even ReLU come within a few percent of SiLU in bf16."""
    save_model(tmp_path, "llama")
    meta_model = empty_model(read_model_config(str(tmp_path)), dtype, None)
    stage = Stage(meta_model, 0, 4)
    weights.load(stage, str(tmp_path), dtype, torch.device("cpu"))
    for layer in stage.layers.values():
        mlp: Any = layer.mlp
        mlp.act_fn = act_fn
        for parameter in mlp.parameters():
            parameter.data.mul_(0.1)
    assert dict(fusion.apply(stage, ALL)) == {"norm": 9, "rope": 4, "shared_input": 8}


@pytest.mark.parametrize("kind", ["cohere", "llama"])
def test_behind_peft_s_lora_on_every_linear_module(tmp_path: Path, kind: str) -> None:
    """The kernels call the modules, whatever wraps them; a layer without our adapter keeps its own sum."""
    save_model(tmp_path, kind)
    found: list[dict[str, Tensor]] = []
    for kernels in (frozenset[str](), ALL):
        meta_model = empty_model(read_model_config(str(tmp_path)), torch.float32, None)
        targets = resolve_targets(meta_model, "all-linear", [0, 1, 2, 3])
        stage = Stage(meta_model, 0, 4)
        weights.load(stage, str(tmp_path), torch.float32, torch.device("cpu"))
        inject_lora(stage, targets, 2, 4, 0.0, torch.float32, seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in trainable(stage).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        taken = fusion.apply(stage, kernels)
        found.append(gradients(stage))
    assert dict(taken) == {"swiglu": 4, "norm": 5 if kind == "cohere" else 9, "rope": 4}
    for name, tensor in found[0].items():
        # fp32: a backward through four layers rounds some hundred times; errors of 2⁻²⁴ add up as their root.
        assert (found[1][name] - tensor).norm() <= 20 * 2**-24 * tensor.norm(), name
