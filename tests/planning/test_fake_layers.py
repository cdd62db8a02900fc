"""A layer on fake tensors against the same layer of a real model, counted by PyTorch's own means."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage, empty_model
from pipeline.planning.counts.counting import measure
from pipeline.planning.counts.fake_layers import GroupedProductsOfAnyDtype, layer_alone
from tests.helpers.builders import model_config

TOKENS, LAYER, RANK = 24, 1, 4
# Gemma 2's layers 0, 2, … slide: a window shorter than the row, so that its mask is one of its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "llama": {},
    "gemma2": {"sliding_window": 8},
    "mixtral": {},
    "granite": {"embedding_multiplier": 12.0},
    "qwen3_moe": {"moe_intermediate_size": 16},
}


def frozen_with_an_adapter(model: Any, kind: str) -> None:
    """The seed's adapter on down_proj; where experts are one tensor, on the attention's output."""
    model.requires_grad_(False)
    target = "self_attn.o_proj" if kind in ("mixtral", "qwen3_moe") else "mlp.down_proj"
    parent, _, leaf = f"model.layers.{LAYER}.{target}".rpartition(".")
    base = model.get_submodule(f"{parent}.{leaf}")
    device = base.weight.device
    setattr(model.get_submodule(parent), leaf, MultiplicativeLoRA(base, RANK, 1.0, 0.0, torch.float32, device))


def attention(kind: str) -> str:
    return "eager" if kind == "gemma2" else "sdpa"  # sdpa has no soft cap


def real_layer_s_flops_and_saved_bytes(kind: str, layer: int) -> tuple[float, int]:
    """Of a real model's layer as the whole model calls it: products (without fused attention) forward and backward, and
    the storages autograd saves."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(kind, **FAMILIES[kind]), attn_implementation=attention(kind))
    frozen_with_an_adapter(model, kind)
    seen: dict[str, Any] = {}
    module = model.model.layers[layer]
    hook = module.register_forward_pre_hook(lambda _, a, k: seen.update(args=a, kwargs=k), with_kwargs=True)
    model.model(torch.arange(TOKENS)[None], use_cache=False)
    hook.remove()
    (hidden, *others), kwargs = seen["args"], seen["kwargs"]
    hidden = hidden.detach().requires_grad_()

    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = module(hidden, *others, **kwargs)
    for tensor in [*module.parameters(), *tensors_of((others, kwargs))]:
        saved.pop(tensor.untyped_storage()._cdata, None)
    del output
    model.config._experts_implementation = "eager"  # one expert after the other: the counter knows no grouped product
    with FlopCounterMode(display=False) as counter:
        module(hidden, *others, **kwargs).sum().backward()
    return counter.get_total_flops(), sum(saved.values())


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_layer_on_fake_tensors_counts_as_a_real_one(kind: str) -> None:
    flops, saved = real_layer_s_flops_and_saved_bytes(kind, LAYER)
    model = empty_model(model_config(kind, **FAMILIES[kind]), torch.float32, attention(kind))
    frozen_with_an_adapter(model, kind)
    with layer_alone(model, LAYER, TOKENS) as run:
        measured = measure(run)
        assert run().shape == (1, TOKENS, 32)
    config = model.config
    att = 2 * TOKENS * TOKENS * config.num_attention_heads * config.head_dim
    # PyTorch's counter does not know fused attention on the CPU: forward two products, backward five; of half the
    # square, or with the explicit mask of a sliding window of all of it.
    slides = kind == "cohere2"  # its layer 1 slides, as Gemma 2's does not, whose attention is not fused
    fused = 0 if attention(kind) == "eager" else 3.5 * att * (2 if slides else 1)
    assert measured.forward.flops + measured.backward.flops == flops + fused
    assert measured.kept_bytes == saved


@pytest.mark.parametrize("kind", ["cohere", "llama", "gemma2"])
def test_kernels_put_in_before_are_counted(kind: str) -> None:
    """A stage whose layers are fused holds functions of the layer's own modules, so these must be what runs."""
    model = empty_model(model_config(kind), torch.bfloat16, attention(kind))
    stage = Stage(model, LAYER, LAYER + 1)
    frozen_with_an_adapter(model, kind)
    with layer_alone(model, LAYER, TOKENS) as run:
        plain = measure(run)
    assert fusion.apply(stage, frozenset(fusion.KERNELS))
    with layer_alone(model, LAYER, TOKENS) as run:
        fused = measure(run)
    assert fused.kept_bytes < plain.kept_bytes
    assert fused.forward.flops == plain.forward.flops


def test_the_model_is_as_it_was_afterwards() -> None:
    model = empty_model(model_config("llama"), torch.float32, "sdpa")
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    with contextlib.suppress(KeyError), layer_alone(model, LAYER, TOKENS) as run:
        run()
        raise KeyError
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert dict(model.named_modules()) == modules
    assert all(p.is_meta for p in after.values())


def test_where_no_gradient_enters_backward_ends_at_the_adapter() -> None:
    model = empty_model(model_config("cohere"), torch.float32, "sdpa")
    frozen_with_an_adapter(model, "cohere")
    with layer_alone(model, LAYER, TOKENS, gradients_enter=False) as run:
        first = measure(run)
    with layer_alone(model, 2, TOKENS, gradients_enter=False) as run:
        below = measure(run)
    # dB = gᵀ·z, gz = g·B, dA = gzᵀ·h: three products of T·D·R.
    assert first.backward.flops == 3 * 2 * TOKENS * 32 * RANK
    assert below.backward == (0, 0, 0)


def test_the_workaround_for_fake_positions_is_needed() -> None:
    """When this fails, transformers reads fake positions (or asks otherwise) and `_one_document_a_row` can go."""
    from pipeline.planning.counts import fake_layers

    model = empty_model(model_config("llama"), torch.float32, "sdpa")
    with layer_alone(model, LAYER, TOKENS) as run:
        told = measure(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_layers, "_one_document_a_row", contextlib.nullcontext)
        with layer_alone(model, LAYER, TOKENS) as run:
            untold = measure(run)
    assert untold.forward.flops > told.forward.flops


def test_the_workaround_for_grouped_products_is_needed() -> None:
    """When this fails, torch takes fake fp32 rows and `GroupedProductsOfAnyDtype` can go; shapes are those of real ones."""
    rows, experts, ends = torch.ones(24, 16), torch.ones(4, 16, 32), torch.arange(6, 25, 6, dtype=torch.int32)
    calls = [(rows, experts, ends), (rows.T, torch.ones(24, 32), ends), (torch.ones(4, 8, 16), rows.T, ends)]
    real = [torch.nn.functional.grouped_mm(a, b, offs=offs).shape for a, b, offs in calls]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with GroupedProductsOfAnyDtype():
            assert [torch.nn.functional.grouped_mm(a, b, offs=offs).shape for a, b, offs in calls] == real
        with pytest.raises(RuntimeError, match="BF16"):
            torch.nn.functional.grouped_mm(rows, experts, offs=ends)
