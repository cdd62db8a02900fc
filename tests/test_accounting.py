"""What a layer of Command-R 35B keeps for backward and what it computes, counted at the real dimensions on fake tensors.

Nothing is allocated or computed: shapes and dtypes flow through transformers' own layer and our kernels. The figures are
those that docs/performance.md quotes, in bytes and floating-point operations per token.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pipeline.kernels.cross_entropy import linear_cross_entropy
from pipeline.kernels.norm import layer_norm
from pipeline.kernels.swiglu import swiglu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CohereConfig
from transformers.models.cohere import modeling_cohere

from pipeline.model import fusion
from pipeline.model.adapters import MultiplicativeLoRA

T, RANK = 8192, 64
D, F, V, L = 8192, 22528, 256000, 40
P_LAYER = 2 * D * D + 2 * D * D + 3 * D * F  # weights of a layer: q and o, k and v (64 heads of 128), the MLP
ATTENTION = 2 * T * D  # causal, forward, per token


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def layer(kernels: bool) -> Any:
    """A decoder layer of Command-R with a multiplicative adapter of rank 64 in bf16, with our kernels or as it is."""
    config = CohereConfig(num_hidden_layers=1)  # transformers' defaults are Command-R's dimensions
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = modeling_cohere.CohereDecoderLayer(config, 0).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    made.rotary = [modeling_cohere.CohereRotaryEmbedding(config)]  # in a list: no part of the layer
    made.mlp.down_proj = MultiplicativeLoRA(made.mlp.down_proj, RANK, RANK, 0.0, torch.bfloat16, torch.device("cpu"))
    if kernels:  # as fusion.apply does, which compares values and so needs real ones
        norm = made.input_layernorm
        norm.forward = lambda x: layer_norm(x, norm.weight, norm.variance_epsilon)
        made.mlp.forward = functools.partial(
            fusion._adapted_mlp, made.mlp, functools.partial(swiglu, activation="silu")
        )
    return made


def forward(made: Any, tokens: int = T) -> tuple[Tensor, set[int]]:
    """The layer's output, and the storages of the RoPE tables, which all layers share."""
    x = torch.empty(1, tokens, D, dtype=torch.bfloat16).requires_grad_()
    tables = made.rotary[0](x, torch.arange(tokens)[None])
    y = made(x, position_embeddings=tables, attention_mask=None)
    return y, {id_of(t) for t in tables}


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def saved_bytes_per_token(made: Any, tokens: int = 64) -> float:
    """Storages kept for backward, each once, without weights and tables."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _, tables = forward(made, tokens)
    weights = {id_of(p) for p in made.parameters()}
    return sum(size for key, size in kept.items() if key not in weights | tables) / tokens


def linear_flops_per_token(run: Callable[[], object]) -> float:
    """Products only; the fake CPU attention is not counted, its causal cost is added by formula."""
    with FlopCounterMode(display=False) as counter:
        run()
    assert not any("attention" in str(op) for op in counter.get_flop_counts()["Global"])
    return counter.get_total_flops() / T


def test_hugging_face_s_layer_keeps_283_kb_a_token() -> None:
    assert saved_bytes_per_token(layer(kernels=False)) == pytest.approx(283.5e3, rel=0.01)


def test_with_the_kernels_a_layer_keeps_the_exact_minimum() -> None:
    """172.4 KB: x and its statistics; q, k, v; attention's output and log-sum-exp; gate and up; z."""
    minimum = 2 * D + 8 + 3 * 2 * D + 2 * D + 4 * 64 + 2 * 2 * F + 2 * RANK
    assert minimum == pytest.approx(172.4e3, rel=0.001)
    assert saved_bytes_per_token(layer(kernels=True)) == minimum


def test_a_step_without_recomputation_executes_157_gflop_a_token() -> None:
    """Forward through 40 layers, backward through 39 (the first adapted layer's ends at its adapter), the head's two products."""
    made = layer(kernels=True)
    forward_flops = linear_flops_per_token(lambda: forward(made))
    both = linear_flops_per_token(lambda: forward(made)[0].backward(torch.empty(1, T, D, dtype=torch.bfloat16)))
    adapter = 4 * D * RANK
    assert forward_flops == 2 * P_LAYER + adapter
    # Backward: dX of every product; g·B, gᵀ·z and gz·A; gzᵀ·m and, once for all tokens, (gzᵀ·m)·Wᵀ.
    extra = 6 * D * RANK + 2 * RANK * F + 2 * RANK * F * D / T
    assert both - forward_flops == pytest.approx(2 * P_LAYER + extra, rel=1e-6)

    weight = torch.empty(V, D, dtype=torch.bfloat16)
    hidden = torch.empty(T, D, dtype=torch.bfloat16).requires_grad_()
    labels = torch.zeros(T, dtype=torch.long)
    head = linear_flops_per_token(lambda: linear_cross_entropy(hidden, weight, None, labels).sum().backward())
    assert head == 2 * 2 * V * D  # two products, not three

    backward = both - forward_flops
    total = L * (forward_flops + ATTENTION) + (L - 1) * (backward + 2.5 * ATTENTION) + head
    assert total == pytest.approx(157.2e9, rel=0.01)
