"""What a layer of Command-R 35B keeps for backward, computes and moves, counted at the real dimensions on fake tensors.

Nothing is allocated or computed: shapes and dtypes flow through transformers' own layer, our adapter and our kernels, put
in as a run puts them in. The figures are those that docs/performance.md quotes; the formulas beside them are worked out
from the operations by hand.
"""

import functools

import pytest
import torch
from pipeline.kernels.cross_entropy import linear_cross_entropy
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CohereConfig

from pipeline.model.adapters.multiplicative import inject_multiplicative
from pipeline.model.fusion import apply as fusion
from pipeline.model.stage import Stage, empty_model
from pipeline.planning.counts.counting import Measured, measure
from pipeline.planning.counts.fake_layers import layer_alone

T, RANK = 8192, 64
D, F, V, L, HEADS, K = 8192, 22528, 256000, 40, 64, 128
P_LAYER = 2 * D * D + 2 * D * D + 3 * D * F  # weights of a layer: q and o, k and v (64 heads of 128), the MLP
ATTENTION = 2 * T * D  # causal, forward, per token
TD, TF = 2 * T * D, 2 * T * F  # bytes of a hidden state, and of gate, up or m, in bf16

TABLES = 2 * 2 * (2 * T * K)  # cos and sin in bf16, read for q and for k
SMALL = 2 * D  # a norm's weight


@functools.cache
def counted(kernels: frozenset[str]) -> Measured:
    """A layer in the middle of the model with an adapter of rank 64, all in bf16; our kernels as on a GPU."""
    config = CohereConfig(num_hidden_layers=3)  # transformers' defaults are Command-R's dimensions
    model = empty_model(config, torch.bfloat16, "sdpa").requires_grad_(False)
    stage = Stage(model, 1, 2)
    inject_multiplicative(stage, ["model.layers.1.mlp.down_proj"], RANK, RANK, 0.0, torch.bfloat16, seed=0)
    taken = fusion.apply(stage, kernels)
    assert len(taken) == (5 if kernels else 0), taken  # the adapted MLP takes SwiGLU in
    with layer_alone(model, 1, T) as run:
        return measure(run, on_gpu=True)


def hugging_face() -> Measured:
    return counted(frozenset())


def ours() -> Measured:
    return counted(frozenset(fusion.KERNELS))


def test_hugging_face_s_layer_keeps_283_kb_a_token() -> None:
    assert hugging_face().kept_bytes / T == pytest.approx(283.5e3, rel=0.01)


def test_with_the_kernels_a_layer_keeps_the_exact_minimum() -> None:
    """172.4 KB: x and its statistics; q, k, v; attention's output and log-sum-exp; gate and up; z."""
    minimum = 2 * D + 8 + 3 * 2 * D + 2 * D + 4 * HEADS + 2 * 2 * F + 2 * RANK
    assert minimum == pytest.approx(172.4e3, rel=0.001)
    assert ours().kept_bytes == minimum * T


@pytest.mark.slow
def test_a_step_without_recomputation_executes_157_gflop_a_token() -> None:
    """Forward through 40 layers, backward through 39 (the first adapted layer's ends at its adapter), the head's two products."""
    forward, backward = ours().forward.flops / T, ours().backward.flops / T
    assert forward == 2 * P_LAYER + ATTENTION + 4 * D * RANK
    # Backward: dX of every product; g·B, gᵀ·z and gz·A; gzᵀ·m and, once for all tokens, (gzᵀ·m)·Wᵀ in three parts.
    adapter = 6 * D * RANK + 2 * RANK * F + 3 * 2 * RANK * F * D / T
    assert backward == pytest.approx(2 * P_LAYER + 2.5 * ATTENTION + adapter, rel=1e-9)

    with FakeTensorMode():
        weight = torch.empty(V, D, dtype=torch.bfloat16)
        hidden = torch.empty(T, D, dtype=torch.bfloat16).requires_grad_()
        labels = torch.zeros(T, dtype=torch.long)
        head = measure(lambda: linear_cross_entropy(hidden, weight, None, labels).sum())
    head_flops = (head.forward.flops + head.backward.flops) / T
    assert head_flops == 2 * 2 * V * D  # two products, not three

    assert L * forward + (L - 1) * backward + head_flops == pytest.approx(157.2e9, rel=0.01)


def test_hugging_face_s_layer_moves_14_gb_forward_and_24_gb_backward() -> None:
    """Elementwise traffic: each operation that is no product reads its distinct tensor arguments and writes its results,
    views are free, SiLU's backward is one operation. By this convention the figures of performance.md come out."""
    forward, backward = hugging_face().forward, hugging_face().backward
    assert forward.elementwise_bytes == pytest.approx(14.3e9, rel=0.005)
    assert backward.elementwise_bytes == pytest.approx(24.3e9, rel=0.005)
    assert (forward.kernels, backward.kernels) == (42, 63)
    # Forward in hidden states of bf16: LayerNorm through fp32 30, and its statistics and weight; RoPE through fp32 26 each
    # for q and k; the adapter's scale and sum 5; two residual sums 6. SwiGLU: five tensors of width F.
    norm = 30 * TD + 9 * 4 * T + (2 + 4 + 4) * D
    assert forward.elementwise_bytes == norm + 2 * 26 * TD + TABLES + 5 * TD + 6 * TD + 5 * TF


def test_with_the_kernels_a_layer_moves_2_5_gb_forward() -> None:
    """performance.md's 2.6 GB: norm reads and writes a hidden state, RoPE two, the epilogue reads three and writes one;
    SwiGLU reads two tensors of width F and writes one. Eight products of 14 kernels, attention among them."""
    epilogue = 4 * TD + 2 * T * RANK + 2 * D * RANK
    expected = (2 * TD + SMALL + 8 * T) + (4 * TD + TABLES) + 3 * TF + epilogue
    assert ours().forward.elementwise_bytes == expected
    assert ours().forward.kernels == 1 + 2 + 1 + 1 + (7 + 1 + 1)


def test_what_the_layer_moves_backward() -> None:
    """4.6 GB in the kernels and the residual's sum, which are performance.md's 4.5 GB, and 0.1 GB for what is small in dA.

    No gradient of the five projections' input is summed in a pass of its own, and nothing of m or W is copied to fp32.
    """
    z, adapter = 2 * T * RANK, 2 * D * RANK
    kernels = (3 * TD + SMALL + 8 * T) + (4 * TD + TABLES) + (3 + 5) * TF + (2 * TD + z + adapter)
    residual, scales = 3 * TD, 2 * z + 2 * adapter
    assert kernels + residual + scales == pytest.approx(4.5e9, rel=0.02)
    # gzᵀ·m [R, F] in fp32 as three in bf16: read and rounded, then less that, twice; the three joined. dA: three added, rounded.
    in_three = (4 + 2) + (4 + 2 + 4) + (4 + 2) + (4 + 2 + 4) + (4 + 2) + (6 + 6)
    assert (
        ours().backward.elementwise_bytes
        == kernels + residual + scales + in_three * RANK * F + (12 + 4 + 4 + 2) * RANK * D
    )
    assert ours().backward.elementwise_bytes < 0.2 * hugging_face().backward.elementwise_bytes


def test_peaks_hold_what_is_kept_and_what_is_worked_with() -> None:
    """Forward at down_proj; backward where the gradients of gate and up are made."""
    kept, z = ours().kept_bytes, 2 * T * RANK
    normed, attention, h, m = TD, TD, TD, TF
    assert ours().forward_peak_bytes == kept - z + normed + attention + m + h
    g, gz, gh, dm, d_gate, d_up, d_adapter = TD, z, TD, TF, TF, TF, 2 * (2 * D * RANK)
    assert ours().backward_peak_bytes == kept + g + gz + gh + m + dm + d_gate + d_up + d_adapter
