"""act(gate)·up against fp64, beside transformers' activations in the same dtype; what it saves."""

import math
from pathlib import Path

import pytest
import torch
from pipeline.kernels.swiglu import ACTIVATIONS, GatedProduct, swiglu
from torch import Tensor
from transformers.activations import ACT2FN

from pipeline.kernels import swiglu as kernel
from tests.helpers.kernels import (
    COMPUTE_CAPABILITIES,
    INTERPRETED,
    PathUnderTest,
    assert_compiles_lean,
    assert_fake_tensors_avoid_triton,
    assert_no_worse,
    every_dtype,
    every_path,
    kept_for_backward,
    n_bytes,
    norm,
    once,
    rounding,
    through_interpreter,
    without_triton,
)

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# The interpreter takes a program a row and block at some ms each: few rows there.
FEW = [(1,), (4, 1), (5, 31), (3, 2, 123), (2, 1025), (1, 1, 2049)]
SHAPES = FEW if INTERPRETED else [*FEW, (1025, 31), (3, 47, 123), (123, 4)]
Results = tuple[Tensor, Tensor, Tensor]  # m, d_gate, d_up


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """gate over the range in which the activations bend, up, upstream gradient."""
    g = torch.Generator().manual_seed(0)
    gate, up, d_m = (torch.randn(shape, generator=g) * scale for scale in (3.0, 1.0, 1.0))
    return gate.to(dtype).to(device), up.to(dtype).to(device), d_m.to(dtype).to(device)


def activation_in_fp64(x: Tensor, activation: str) -> Tensor:
    """The definitions, by other functions than the code's where there are any."""
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact(gate: Tensor, up: Tensor, d_m: Tensor, activation: str) -> Results:
    gate, up = (t.detach().double().cpu().requires_grad_() for t in (gate, up))
    m = activation_in_fp64(gate, activation) * up
    return m.detach(), *torch.autograd.grad(m, (gate, up), d_m.double().cpu())


def transformers_result(gate: Tensor, up: Tensor, d_m: Tensor, activation: str) -> Results:
    gate, up = (t.detach().clone().requires_grad_() for t in (gate, up))
    m = ACT2FN[activation](gate) * up
    return m.detach(), *torch.autograd.grad(m, (gate, up), d_m)


def ours(path: PathUnderTest, gate: Tensor, up: Tensor, d_m: Tensor, activation: str) -> Results:
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    m = GatedProduct.apply(gate, up, activation, path.use_triton)
    return m.detach(), *torch.autograd.grad(m, (gate, up), d_m)


def margin(right: Tensor, gate: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """What a result may be off beside transformers' own error.

    fp32: exp and erf are good to 2 units of 2⁻²³, their argument's rounding costs |argument|·2⁻²⁴ more, of which the
    value keeps at most a unit; about 8 further operations. The derivative is a sum of terms up to 1.2, relative to
    which its roundings count, so relative to ‖d_m·up‖. bf16: one rounding of the result.
    """
    last = 0.0 if dtype == torch.float32 else rounding(dtype) * norm(right)
    return 16 * 2**-24 * (norm(right) + 1.2 * norm(other)) + last


def assert_as_good(found: Results, gate: Tensor, up: Tensor, d_m: Tensor, activation: str) -> None:
    right, theirs = exact(gate, up, d_m, activation), transformers_result(gate, up, d_m, activation)
    scales = (right[0], d_m.double() * up.double(), right[2])
    for value, other, gold, scale in zip(found, theirs, right, scales, strict=True):
        assert value.dtype == gate.dtype
        assert_no_worse(value, other, gold, margin(gold, gate, scale, gate.dtype))


@every_path
@every_activation
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(path: PathUnderTest, activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, d_m = make(shape, dtype, path.device)
    found = ours(path, gate, up, d_m, activation)
    assert_as_good(found, gate, up, d_m, activation)
    if path.use_triton and dtype == torch.float32:
        reference = ours(path._replace(use_triton=False), gate, up, d_m, activation)
        for a, b, scale in zip(found, reference, (reference[0], d_m * up, reference[2]), strict=True):
            assert norm(a - b) <= margin(b, gate, scale, dtype)


@once
@every_activation
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_path_is_transformers_to_the_bit(activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up, d_m = make(shape, dtype)
    theirs = transformers_result(gate, up, d_m, activation)
    gate.requires_grad_()
    up.requires_grad_()
    m = swiglu(gate, up, activation)
    for a, b in zip((m, *torch.autograd.grad(m, (gate, up), d_m)), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_path
@every_activation
@every_dtype
def test_halves_of_one_product_and_other_strides(path: PathUnderTest, activation: str, dtype: torch.dtype) -> None:
    """gate and up as views of one [.., 2F] product (a fused gate_up_proj), transposed, every second column."""
    gate, up, d_m = make((3, 2, 31), dtype, path.device)
    halves = torch.cat((gate, up), -1).chunk(2, -1)
    columns = tuple(torch.stack((t, t * 2), -1)[..., 0] for t in (gate, up))
    transposed = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (gate, up))
    for g, u in (halves, columns, transposed, (halves[0], up), (gate, halves[1])):
        assert not (g.is_contiguous() and u.is_contiguous())
        for upstream in (d_m, d_m[:1].expand_as(d_m), d_m.transpose(0, 1).contiguous().transpose(0, 1)):
            assert_as_good(ours(path, g, u, upstream, activation), gate, up, upstream.contiguous(), activation)


@every_path
@every_activation
@pytest.mark.parametrize("shape", [(0, 31), (3, 0, 31)], ids=str)
def test_no_rows(path: PathUnderTest, activation: str, shape: tuple[int, ...]) -> None:
    assert all(t.shape == shape for t in ours(path, *make(shape, torch.bfloat16, path.device), activation))


@every_path
@every_activation
@every_dtype
def test_large_gates_saturate(path: PathUnderTest, activation: str, dtype: torch.dtype) -> None:
    """Where exp overflows: act(x) is x or 0, its derivative 1 or 0, to the bit."""
    gate = torch.tensor([1e4, 200.0, 0.0, -200.0, -1e4], dtype=dtype, device=path.device)
    ones = torch.ones_like(gate)
    m, d_gate, d_up = ours(path, gate, ones, ones, activation)
    expected = gate.clamp_min(0)
    torch.testing.assert_close(m, expected, rtol=0, atol=0)
    torch.testing.assert_close(d_up, expected, rtol=0, atol=0)
    assert d_gate.tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


@every_path
def test_slope_of_the_tanh_form_just_before_it_saturates(path: PathUnderTest) -> None:
    """1 − s(2u) loses digits there and is multiplied by up to 35. The kernel takes s(−2u): 4 roundings of 1; PyTorch's
    own derivative has the 35."""
    gate = torch.linspace(3, 6, 201, device=path.device)
    ones = torch.ones_like(gate)
    found = ours(path, gate, ones, ones, "gelu_pytorch_tanh")[1]
    right = exact(gate, ones, ones, "gelu_pytorch_tanh")[1]
    assert float((found.double().cpu() - right).abs().max()) <= (4 if path.use_triton else 36) * 2**-24


@every_path
@every_activation
@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=str)
def test_a_gradient_for_one_of_the_two(path: PathUnderTest, activation: str, trained: tuple[bool, bool]) -> None:
    gate, up, d_m = make((3, 31), torch.float32, path.device)
    both = ours(path, gate, up, d_m, activation)[1:]
    gate.requires_grad_(trained[0])
    up.requires_grad_(trained[1])
    GatedProduct.apply(gate, up, activation, path.use_triton).backward(d_m)
    for tensor, expected, wanted in zip((gate, up), both, trained, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=0)


@every_path
@every_activation
def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused(path: PathUnderTest, activation: str) -> None:
    gate, up, d_m = make((3, 31), torch.float32, path.device)
    m = GatedProduct.apply(gate.requires_grad_(), up, activation, path.use_triton)
    first, second = (torch.autograd.grad(m, gate, d_m, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(m, gate, d_m.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@once
@every_activation
def test_gradcheck(activation: str) -> None:
    gate, up, _ = make((3, 5), torch.float64)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, activation), (gate, up))


# Triton without a GPU


@pytest.mark.slow
@once
def test_triton_kernels_through_the_interpreter() -> None:
    through_interpreter("tests/kernels/test_kernel_swiglu.py")


@once
@every_activation
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
def test_kernels_compile_without_spilling(
    capability: int, activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for function in (kernel._product_kernel, kernel._gradients_kernel):
        tensors = ("gate", "up", "m", "d_m", "d_gate", "d_up")
        types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(tensors, "*bf16")
        assert_compiles_lean(capability, function, types, {"ACTIVATION": activation, "BLOCK": kernel.BLOCK}, 4)


@once
def test_the_pytorch_path_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without_triton("swiglu", monkeypatch)
    gate, up, _ = make((3, 31), torch.float32)
    assert module.triton is None
    assert not module.takes_triton(gate)
    torch.testing.assert_close(module.swiglu(gate, up), swiglu(gate, up), rtol=0, atol=0)
    assert_fake_tensors_avoid_triton(kernel)


# What is kept for backward


@every_path
@every_activation
@every_dtype
def test_saves_gate_and_up(path: PathUnderTest, activation: str, dtype: torch.dtype) -> None:
    gate, up, _ = make((3, 2, 31), dtype, path.device)
    halves = torch.cat((gate, up), -1).requires_grad_().chunk(2, -1)
    for g, u in ((gate.requires_grad_(), up.requires_grad_()), halves):
        kept = kept_for_backward(lambda g=g, u=u: GatedProduct.apply(g, u, activation, path.use_triton))
        assert n_bytes(kept, apart_from=(g, u)) == 0
        assert len(kept) == 2


@once
@every_activation
def test_bytes_a_token_at_command_r_are_those_of_the_header(activation: str) -> None:
    """90 112 bytes, where transformers' own keeps 6·F."""
    tokens, f = 8192, 22528
    gate, up = (torch.empty(1, tokens, f, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    assert n_bytes(kept_for_backward(lambda: swiglu(gate, up, activation))) == tokens * 90_112
    assert n_bytes(kept_for_backward(lambda: ACT2FN[activation](gate) * up)) == tokens * 6 * f


@once
def test_evaluation_keeps_nothing() -> None:
    gate, up, _ = make((3, 31), torch.float32)
    assert kept_for_backward(lambda: swiglu(gate, up)) == []


# Bad input


@once
def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="differ"):
        swiglu(x, x[:, :3], "silu")
    with pytest.raises(ValueError, match="differ"):
        swiglu(x, x.bfloat16(), "silu")
    with pytest.raises(ValueError, match="not one of"):
        swiglu(x, x, "relu")
