"""The epilogue of an MLP with a multiplicative adapter, alone and in a parallel block: against fp64, beside PyTorch."""

from pathlib import Path

import pytest
import torch
from pipeline.kernels.multiplicative import gated_down_proj, pytorch_epilogue, reference, triton_epilogue
from torch import Tensor
from torch.nn.functional import linear

from pipeline.kernels import multiplicative as kernel
from tests.helpers.kernels import (
    COMPUTE_CAPABILITIES,
    PathUnderTest,
    assert_compiles_lean,
    assert_fake_tensors_avoid_triton,
    assert_no_worse,
    every_path,
    kept_for_backward,
    n_bytes,
    norm,
    once,
    rounding,
    through_interpreter,
    without_triton,
)

S = 0.625
# N, D, R: more and less than a tile of 64 × 128 and 32 ranks, and nothing like a multiple of one.
SHAPES = [(1, 1, 1), (47, 31, 3), (65, 129, 33), (130, 8, 100), (3, 300, 16)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Of h and of the adapter.
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
every_pair = pytest.mark.parametrize("dtypes", DTYPES, ids=str)
summed = pytest.mark.parametrize("block", [False, True], ids=["MLP alone", "parallel block"])


def make(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], device: str = "cpu") -> list[Tensor]:
    """h, z, B, residual, attention."""
    n, d, r = shape
    g = torch.Generator().manual_seed(n + d + r)
    sizes = [(n, d), (n, r), (d, r), (n, d), (n, d)]
    kinds = [dtypes[0], dtypes[1], dtypes[1], dtypes[0], dtypes[0]]
    return [torch.randn(s, generator=g).to(kind).to(device) for s, kind in zip(sizes, kinds, strict=True)]


def modules(h: Tensor, z: Tensor, B: Tensor, residual: Tensor | None, attention: Tensor | None) -> Tensor:
    """As the modules compute it: each operation in the dtype of its inputs."""
    y = (h + linear(z, B) * S).to(h.dtype)
    return y if residual is None else residual + attention + y


@every_path
@every_shape
@every_pair
@summed
def test_epilogue_against_fp64(
    path: PathUnderTest, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], block: bool
) -> None:
    h, z, B, residual, attention = make(shape, dtypes, path.device)
    others = (residual, attention) if block else (None, None)
    found = (triton_epilogue if path.use_triton else pytorch_epilogue)(h, z, B, S, *others)
    wide = [t.double() if t is not None else None for t in (h, z, B, *others)]
    right = modules(*wide)  # type: ignore[arg-type]
    # R products and four terms are summed in fp32, each sum relative to what it adds, and the result is rounded once.
    terms = norm(h.abs() + linear(z.abs(), B.abs()) * S + residual.abs() + attention.abs())
    margin = (shape[2] + 4) * 2**-24 * terms + (0 if h.dtype == torch.float32 else rounding(h.dtype) * norm(right))
    assert found.dtype == h.dtype
    assert norm(found.double() - right) <= margin
    assert_no_worse(found, modules(h, z, B, *others), right, margin / 2)


@every_path
@every_pair
def test_a_transposed_factor_as_backward_has_it(path: PathUnderTest, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    h, z, B, *_ = make((65, 129, 33), dtypes, path.device)
    function = triton_epilogue if path.use_triton else pytorch_epilogue
    A_T = B.T.contiguous().T
    assert A_T.stride() != B.stride()
    torch.testing.assert_close(function(h, z, A_T, 1.0, None, None), function(h, z, B, 1.0, None, None))


@every_path
def test_views_and_nothing(path: PathUnderTest) -> None:
    function = triton_epilogue if path.use_triton else pytorch_epilogue
    h, z, B, residual, attention = make((30, 40, 5), DTYPES[0], path.device)
    expected = function(h[::2].contiguous(), z[::2].contiguous(), B, S, residual[::2].contiguous(), attention[:15])
    torch.testing.assert_close(function(h[::2], z[::2], B, S, residual[::2], attention[:15]), expected)
    assert function(h[:0], z[:0], B, S, residual[:0], attention[:0]).shape == (0, 40)


# The whole tail of a parallel block


def product(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def tail(n: int, d: int, f: int, r: int, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """gate, up, W, A, B, residual, attention; leaves that ask for gradients, but for the frozen W."""
    g = torch.Generator().manual_seed(n + d + f + r)
    sizes = [(n, f), (n, f), (d, f), (r, d), (d, r), (n, d), (n, d)]
    scales = [1, 1, f**-0.5, d**-0.5, r**-0.5, 1, 1]
    made = [torch.randn(size, generator=g, dtype=torch.float64) * s for size, s in zip(sizes, scales, strict=True)]
    return [t.to(dtypes[i in (3, 4)]).requires_grad_(i != 2) for i, t in enumerate(made)]


def gradients(function: object, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """y and the gradients of gate, up, A, B, residual, attention."""
    y = function(*given[:5], S, product, *given[5:])  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, [t for t in given if t.requires_grad], upstream.to(y.dtype))]


@once
@pytest.mark.parametrize("shape", [(1, 4, 7, 1), (47, 31, 123, 4), (130, 64, 96, 16)], ids=str)
@every_pair
def test_gradients_are_no_worse_than_autograd_s(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    given = tail(*shape, dtypes)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in given]
    upstream = torch.randn(shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(dtypes[0]).double()
    truth = gradients(reference, exact, upstream)
    theirs, ours = gradients(reference, given, upstream), gradients(gated_down_proj, given, upstream)
    names = ("y", "gate", "up", "A", "B", "residual", "attention")
    for name, right, other, found in zip(names, truth, theirs, ours, strict=True):
        # Each factor and each product is rounded once or twice; one more unit of the dtype is the margin.
        assert_no_worse(found, other, right, 2 * torch.finfo(found.dtype).eps * norm(right)), name
    assert torch.equal(ours[-1].double(), upstream)
    assert torch.equal(ours[-2].double(), upstream)


@once
def test_gradcheck() -> None:
    given = tail(5, 4, 6, 2, (torch.float64, torch.float64))

    def function(gate: Tensor, up: Tensor, A: Tensor, B: Tensor, residual: Tensor, attention: Tensor) -> Tensor:
        return gated_down_proj(gate, up, given[2], A, B, S, product, residual, attention)

    # dA goes through fp32 by design, so the check of it is to fp32's accuracy.
    inputs = [t for t in given if t.requires_grad]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-4, atol=1e-5, rtol=1e-4)


@once
def test_only_what_asks_for_a_gradient_gets_one() -> None:
    """Below the first adapter the hidden state asks for none; attention and residual may differ in it."""
    for asking in range(5, 7):
        given = [t.detach() for t in tail(6, 8, 16, 2, DTYPES[0])]
        given[asking].requires_grad_()
        gated_down_proj(*given[:5], S, product, *given[5:]).sum().backward()
        assert [t.grad is not None for t in given] == [i == asking for i in range(7)]


@once
def test_saves_gate_up_and_z_and_nothing_else() -> None:
    n, d, f, r = 64, 96, 128, 4
    given = tail(n, d, f, r, DTYPES[1])
    kept = kept_for_backward(lambda: gated_down_proj(*given[:5], S, product, *given[5:]))
    assert n_bytes(kept, apart_from=tuple(given[2:5])) == n * (2 * f + r) * 2


@once
def test_rows_of_a_batch() -> None:
    given = tail(12, 8, 16, 2, DTYPES[0])
    flat = gated_down_proj(*given[:5], S, product, *given[5:])
    batched = [t.view(3, 4, -1) if i not in (2, 3, 4) else t for i, t in enumerate(given)]
    assert torch.equal(gated_down_proj(*batched[:5], S, product, *batched[5:]), flat.view(3, 4, 8))


@once
def test_what_does_not_fit_is_refused() -> None:
    given = tail(6, 8, 16, 2, DTYPES[0])
    first, (residual, attention) = (*given[:5], S, product), given[5:]
    for others in [(residual, None), (None, attention), (residual[:5], attention), (residual, attention.bfloat16())]:
        with pytest.raises(ValueError, match="want residual and attention"):
            gated_down_proj(*first, *others)


# Triton without a GPU


@pytest.mark.slow
@once
def test_triton_kernel_through_the_interpreter() -> None:
    through_interpreter("tests/kernels/test_kernel_parallel_block.py")


@pytest.mark.slow
@once
@summed
@pytest.mark.parametrize("adapter", ["*bf16", "*fp32"])
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
def test_kernel_compiles_without_spilling(
    capability: int, adapter: str, block: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With B as it is stored, its rank the inner dimension."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = kernel._epilogue_kernel
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(("h", "residual", "attention", "y"), "*bf16")
    types |= {"z": adapter, "B": adapter, "scaling": "fp32"}
    constants = {
        "BLOCK_SUM": block,
        "PRECISION": "tf32" if adapter == "*bf16" else "ieee",
        "TILE_N": kernel.TILE_N,
        "TILE_D": kernel.TILE_D,
        "TILE_R": kernel.TILE_R,
        "B_column": 1,
    }
    assert_compiles_lean(capability, function, types, constants, kernel.WARPS)


@once
def test_the_pytorch_path_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without_triton("multiplicative", monkeypatch)
    given = tail(5, 4, 6, 2, DTYPES[0])
    assert module.triton is None
    assert not module.takes_triton(given[0])
    both = (f(*given[:5], S, product, *given[5:]) for f in (module.gated_down_proj, gated_down_proj))
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert_fake_tensors_avoid_triton(kernel)
