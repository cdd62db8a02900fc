"""The gated product of an MLP: m = act(gate) · up, for SwiGLU and GeGLU.

Takes gate and up [..., F] of one dtype; gives m of the same shape and dtype, the input of down_proj.

Saves gate and up, nothing else: in bf16 4·F bytes a token (90 112 for F = 22528), where autograd through
transformers' `act_fn(gate) * up` saves act(gate) as well. Price in memory traffic: forward reads gate and up and writes
m (3·F elements); backward reads d_m, gate and up and writes both gradients in one pass (5·F).
The Triton kernels compute in fp32 and round once. The PyTorch path runs PyTorch's own operations in the inputs' dtype:
to the bit what transformers computes, forward and backward.

Activations by transformers' names, with x = gate, s(·) the logistic function, Φ and φ the normal distribution:
    silu                x·s(x)                                        derivative  s·(1 + x·(1 − s))
    gelu                x·Φ(x)                                                    Φ(x) + x·φ(x)
    gelu_pytorch_tanh   x·½(1 + tanh u) = x·s(2u), u = √(2/π)(x + 0.044715·x³)    s(2u) + x·s(2u)·s(−2u)·2u′

Source: Shazeer 2020 (arXiv:2002.05202); Hendrycks & Gimpel 2016 (arXiv:1606.08415). The idea of recomputing the
activation in backward: Liger-Kernel's swiglu and geglu (BSD-2).

Letter: F feed-forward dimension.
"""

from typing import Any

import torch
from pipeline.kernels.dispatch import Kernel, takes_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path serves every device
    triton = None

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
BLOCK = 1024  # elements of a row a program takes


def swiglu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """m = act(gate) · up, both [..., F] of one dtype; differentiable in both.

    Raises ValueError where shapes or dtypes differ, or for an activation that is not one of ACTIVATIONS.
    """
    _check(gate, up, activation)
    return GatedProduct.apply(gate, up, activation, takes_triton(gate, up))


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype} differ")
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")


class GatedProduct(torch.autograd.Function):
    """Saves gate and up, nothing else. `use_triton` is an argument for the tests' sake."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, use_triton: bool) -> Tensor:
        ctx.activation, ctx.use_triton = activation, use_triton
        ctx.save_for_backward(gate, up)
        return PRODUCT(use_triton, gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_m: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = GRADIENTS(ctx.use_triton, d_m, gate, up, ctx.activation)
        wants_gate, wants_up = ctx.needs_input_grad[:2]
        return (d_gate if wants_gate else None), (d_up if wants_up else None), None, None


# PyTorch: the reference, and the path of the CPU


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="none" if activation == "gelu" else "tanh")


def pytorch_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up."""
    return _activate(gate, activation).mul_(up)


def pytorch_gradients(d_m: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up) by PyTorch's own derivatives of the activations."""
    d_up, d_activation = _activate(gate, activation).mul_(d_m), d_m * up
    if activation == "silu":
        return torch.ops.aten.silu_backward.grad_input(d_activation, gate, grad_input=d_activation), d_up
    approximate = "none" if activation == "gelu" else "tanh"
    backward = torch.ops.aten.gelu_backward.grad_input
    return backward(d_activation, gate, approximate=approximate, grad_input=d_activation), d_up


# Triton

if triton is not None:
    _SQRT_HALF = tl.constexpr(0.7071067811865476)
    _DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1/√(2π)
    _TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)  # 2·√(2/π)

    @triton.jit
    def _act(x, ACTIVATION: tl.constexpr) -> tuple:
        """act(x) and its derivative, fp32. What is not used the compiler drops."""
        if ACTIVATION == "silu":
            s = 1.0 / (1.0 + tl.exp(-x))
            value = x * s
            slope = s * (1.0 + x * (1.0 - s))
        elif ACTIVATION == "gelu":
            cumulative = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
            value = x * cumulative
            slope = cumulative + x * tl.exp(-0.5 * x * x) * _DENSITY_AT_0
        else:
            two_u = _TWO_SQRT_2_PI * (x + 0.044715 * x * x * x)
            s = 1.0 / (1.0 + tl.exp(-two_u))
            value = x * s
            # s(−2u), not 1 − s(2u): no cancellation.
            slope = s + x * s * _TWO_SQRT_2_PI * (1.0 + 0.134145 * x * x) / (1.0 + tl.exp(two_u))
        return value, slope

    @triton.jit
    def _product_kernel(gate, up, m, F, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr) -> None:
        """Program (row, block of the row); gate_row and up_row are elements from row to row, m is dense."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        value, _ = _act(g, ACTIVATION)
        tl.store(m + row * F + column, (value * u).to(m.dtype.element_ty), mask=inside)

    @triton.jit
    def _gradients_kernel(
        d_m, gate, up, d_gate, d_up, F, d_m_row, gate_row, up_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        upstream = tl.load(d_m + row * d_m_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
        value, slope = _act(g, ACTIVATION)
        at = row * F + column
        tl.store(d_gate + at, (upstream * u * slope).to(d_gate.dtype.element_ty), mask=inside)
        tl.store(d_up + at, (upstream * value).to(d_up.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """x as [N, F] with a dense last dimension: a view where x allows it (halves of one product do), else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def triton_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Like `pytorch_product`, in one kernel, rounded once."""
    m = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if m.numel():
        g, u = _rows(gate), _rows(up)
        with torch.cuda.device_of(m):
            _product_kernel[len(g), triton.cdiv(g.shape[1], BLOCK)](
                g, u, m, g.shape[1], g.stride(0), u.stride(0), ACTIVATION=activation, BLOCK=BLOCK
            )
    return m


def triton_gradients(d_m: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Like `pytorch_gradients`, in one kernel, each rounded once."""
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_up = torch.empty_like(d_gate)
    if d_gate.numel():
        d, g, u = _rows(d_m), _rows(gate), _rows(up)
        with torch.cuda.device_of(d_gate):
            _gradients_kernel[len(g), triton.cdiv(g.shape[1], BLOCK)](
                d,
                g,
                u,
                d_gate,
                d_up,
                g.shape[1],
                d.stride(0),
                g.stride(0),
                u.stride(0),
                ACTIVATION=activation,
                BLOCK=BLOCK,
            )
    return d_gate, d_up


PRODUCT, GRADIENTS = Kernel(pytorch_product, triton_product), Kernel(pytorch_gradients, triton_gradients)
