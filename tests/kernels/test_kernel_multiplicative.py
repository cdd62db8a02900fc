"""The MLP's end with a multiplicative adapter: against fp64, against autograd's own error, and what it saves."""

import pytest
import torch
from pipeline.kernels.multiplicative import gated_down_proj, reference
from torch import Tensor

from pipeline.kernels import multiplicative as kernel

S = 0.5


def product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def tensors(n: int, d: int, f: int, r: int, dtype: torch.dtype, adapter: torch.dtype) -> list[Tensor]:
    """gate, up, W, A, B; leaves that ask for gradients, but for the frozen W."""
    generator = torch.Generator().manual_seed(n + d + f + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = [normal(n, f), normal(n, f), normal(d, f) / f**0.5, normal(r, d) / d**0.5, normal(d, r) / r**0.5]
    dtypes = [dtype, dtype, dtype, adapter, adapter]
    return [t.to(k).requires_grad_(i != 2) for i, (t, k) in enumerate(zip(made, dtypes, strict=True))]


def gradients(function: object, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """y and the gradients of gate, up, A, B."""
    y = function(*given, S, product)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t.requires_grad], upstream.to(y.dtype))]


SHAPES = [(1, 4, 7, 1), (47, 31, 123, 4), (130, 64, 96, 16), (1025, 16, 8, 3), (3, 1030, 8, 2)]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_error_is_no_larger_than_autograd_s(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given = tensors(*shape, *dtypes)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    upstream = torch.randn(shape[0], shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(dtypes[0]).double()
    truth = gradients(reference, exact, upstream)
    theirs, ours = gradients(reference, given, upstream), gradients(gated_down_proj, given, upstream)
    for name, t, a, b in zip(("y", "gate", "up", "A", "B"), truth, theirs, ours, strict=True):
        size = t.norm()
        # Both round each factor and each product once or twice; one more unit of the dtype is the margin.
        margin = 2 * torch.finfo(b.dtype).eps
        assert (b.double() - t).norm() / size <= (a.double() - t).norm() / size * 1.25 + margin, name


def test_an_fp32_factor_is_the_sum_of_three_in_bf16() -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 40)
    parts = kernel.in_three(x)
    assert all(part.dtype is torch.bfloat16 for part in parts)
    assert torch.equal(sum(part.double() for part in parts), x.double())


@pytest.mark.parametrize("adapter", [torch.bfloat16, torch.float32])
def test_bf16_factors_as_they_lie_are_as_accurate_as_fp32_copies(
    adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, with a product of bf16 into fp32 in place of cuBLAS' one, which the CPU does not have."""
    given = tensors(130, 64, 96, 16, torch.bfloat16, adapter)
    upstream = torch.randn(130, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    copies = gradients(gated_down_proj, given, upstream)[3]
    calls, mm = [], torch.mm

    def into_fp32(x: Tensor, y: Tensor, **options: torch.dtype) -> Tensor:
        if not options:
            return mm(x, y)
        calls.append((x.dtype, y.dtype, options))
        return mm(x.float(), y.float())

    monkeypatch.setattr(kernel, "_multiplies_into_fp32", lambda y: y.dtype is torch.bfloat16)
    monkeypatch.setattr(torch, "mm", into_fp32)
    as_they_lie = gradients(gated_down_proj, given, upstream)[3]
    assert calls == [(torch.bfloat16, torch.bfloat16, {"out_dtype": torch.float32})] * 2
    # fp32 sums in another order, and then one rounding to the adapter's dtype.
    close = 2 * torch.finfo(adapter).eps if adapter is torch.bfloat16 else 130 * 2**-24
    assert (as_they_lie.double() - copies.double()).norm() <= close * copies.double().norm()


def test_gradcheck() -> None:
    given = tensors(5, 4, 6, 2, torch.float64, torch.float64)

    def flat(gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return gated_down_proj(gate, up, given[2], A, B, S, product)

    inputs = [t for t in given if t.requires_grad]
    # dA goes through fp32 by design, so the check of it is to fp32's accuracy.
    assert torch.autograd.gradcheck(flat, inputs, eps=1e-4, atol=1e-5, rtol=1e-4)


def test_saves_gate_up_and_z_and_nothing_else() -> None:
    n, d, f, r = 64, 96, 128, 4
    given = tensors(n, d, f, r, torch.bfloat16, torch.bfloat16)
    weights = {t.data_ptr() for t in given[2:]}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = gated_down_proj(*given, S, product)
    assert sum(saved.values()) == n * (2 * f + r) * 2
    y.sum().backward()


def test_rows_and_batches_and_nothing() -> None:
    given = tensors(12, 8, 16, 2, torch.float32, torch.float32)
    batched = [given[0].view(3, 4, 16), given[1].view(3, 4, 16), *given[2:]]
    assert torch.equal(gated_down_proj(*batched, S, product), gated_down_proj(*given, S, product).view(3, 4, 8))
    empty = tensors(0, 8, 16, 2, torch.float32, torch.float32)
    assert gated_down_proj(*empty, S, product).shape == (0, 8)


def test_frozen_adapter_or_frozen_input() -> None:
    """Below the first adapter nothing asks for gate's gradient; a frozen adapter asks for none of its own."""
    given = tensors(6, 8, 16, 2, torch.float32, torch.float32)
    for index in (0, 1):
        given[index].requires_grad_(False)
    gated_down_proj(*given, S, product).sum().backward()
    assert given[0].grad is None
    assert given[3].grad is not None
    assert given[4].grad is not None
