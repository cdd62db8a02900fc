"""Rotary embedding against complex multiplication in fp64, beside transformers' functions; what it saves."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pipeline.kernels.rope import Rope, rope
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from pipeline.kernels import rope as kernel
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

both_layouts = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])
# B, H, Hk, T, K, rows of the tables. The interpreter takes a program a token at 10 ms each: few tokens there.
FEW = [(1, 1, 1, 1, 2, 1), (2, 3, 1, 4, 4, 1), (2, 5, 5, 7, 10, 2), (1, 31, 2, 3, 128, 1), (1, 1025, 1, 2, 6, 1)]
SHAPES = FEW if INTERPRETED else [*FEW, (2, 3, 1, 47, 4, 2), (1, 4, 2, 123, 128, 1), (1, 1, 1, 1025, 6, 1)]


class Case(NamedTuple):
    """Inputs as attention has them: q and k transposed views, upstream gradients for both."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    d_q: Tensor
    d_k: Tensor


def make(shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool, device: str = "cpu") -> Case:
    """Tables of angles position·θ^(−2i/K), equal within a pair, as the models make them, for shuffled positions."""
    b, h, hk, t, k, rows = shape
    g = torch.Generator().manual_seed(0)
    angle = torch.stack([torch.randperm(4 * t, generator=g)[:t] for _ in range(rows)]).unsqueeze(-1)
    angle = angle * 10000.0 ** (-torch.arange(0, k, 2) / k)
    angle = angle.repeat_interleave(2, -1) if interleaved else angle.repeat(1, 1, 2)
    q, d_q = (torch.randn(b, t, h, k, generator=g).transpose(1, 2) for _ in range(2))
    key, d_k = (torch.randn(b, t, hk, k, generator=g).transpose(1, 2) for _ in range(2))
    return Case(*(tensor.to(dtype).to(device) for tensor in (q, key, angle.cos(), angle.sin(), d_q, d_k)))


def exact(x: Tensor, case: Case, interleaved: bool, backward: bool) -> Tensor:
    """(a + ib)·(cos ± i·sin) in fp64, from the tables as they were rounded to the dtype."""
    x, cos, sin = (t.double().cpu() for t in (x, case.cos, case.sin))

    def as_complex(real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.complex(real.contiguous(), imaginary.contiguous())

    half = x.shape[-1] // 2
    turn = as_complex(cos, -sin if backward else sin).unsqueeze(1)
    if interleaved:
        return torch.view_as_real(as_complex(x[..., ::2], x[..., 1::2]) * turn[..., ::2]).flatten(-2)
    turned = as_complex(x[..., :half], x[..., half:]) * turn[..., :half]
    return torch.cat((turned.real, turned.imag), -1)


def results(function, case: Case) -> tuple[Tensor, ...]:
    """q', k', d_q, d_k of a function of q and k."""
    q, k = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (case.q, case.k))
    out = function(q, k)
    return *(t.detach() for t in out), *torch.autograd.grad(out, (q, k), (case.d_q, case.d_k))


def ours(path: PathUnderTest, case: Case, interleaved: bool) -> tuple[Tensor, ...]:
    """q', k', d_q, d_k on the path under test."""
    return results(lambda q, k: Rope.apply(q, k, case.cos, case.sin, interleaved, path.use_triton), case)


def assert_as_good(found: tuple[Tensor, ...], case: Case, interleaved: bool) -> None:
    """An element is a sum of two products, so has 3 roundings of 2⁻²⁴ of terms no larger than its pair, and one to
    the dtype where that is bf16. transformers' Llama makes 3 roundings to bf16."""
    theirs = results(lambda q, k: (cohere_rope if interleaved else llama_rope)(q, k, case.cos, case.sin), case)
    dtype = case.q.dtype
    inputs = ((case.q, False), (case.k, False), (case.d_q, True), (case.d_k, True))
    for value, other, (x, backward) in zip(found, theirs, inputs, strict=True):
        right = exact(x, case, interleaved, backward)
        assert value.dtype == dtype
        last = 0.0 if dtype == torch.float32 else rounding(dtype)
        # Each of the pair's two elements has terms of |a| + |b| ≤ √2·|pair| between them.
        assert_no_worse(value, other, right, 3 * 2**-24 * 2**0.5 * norm(right) + last * norm(right))


@every_path
@both_layouts
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(path: PathUnderTest, interleaved: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = make(shape, dtype, interleaved, path.device)
    found = ours(path, case, interleaved)
    assert_as_good(found, case, interleaved)
    if path.use_triton and dtype == torch.float32:  # the same products; a GPU may fuse one of them with the sum
        reference = ours(path._replace(use_triton=False), case, interleaved)
        for a, b in zip(found, reference, strict=True):
            assert norm(a - b) <= 3 * 2**-24 * 2**0.5 * norm(b)


@once
@both_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_is_transformers_to_the_bit(interleaved: bool, shape: tuple[int, ...]) -> None:
    case = make(shape, torch.float32, interleaved)
    theirs = (cohere_rope if interleaved else llama_rope)(case.q, case.k, case.cos, case.sin)
    for a, b in zip(rope(case.q, case.k, case.cos, case.sin, interleaved), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@once
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cohere_in_bf16_is_transformers_to_the_bit(shape: tuple[int, ...]) -> None:
    case = make(shape, torch.bfloat16, True)
    theirs = cohere_rope(case.q, case.k, case.cos, case.sin)
    for a, b in zip(rope(case.q, case.k, case.cos, case.sin, True), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_path
@both_layouts
def test_fp32_tables_over_bf16_heads_keep_the_heads_dtype(path: PathUnderTest, interleaved: bool) -> None:
    case = make((2, 3, 1, 5, 16, 1), torch.bfloat16, interleaved, path.device)
    wide = make((2, 3, 1, 5, 16, 1), torch.float32, interleaved, path.device)
    mixed = case._replace(cos=wide.cos, sin=wide.sin)
    inputs = ((case.q, False), (case.k, False), (case.d_q, True), (case.d_k, True))
    for value, (x, backward) in zip(ours(path, mixed, interleaved), inputs, strict=True):
        right = exact(x, mixed, interleaved, backward)
        assert value.dtype == torch.bfloat16
        assert norm(value.double().cpu() - right) <= (rounding(torch.bfloat16) + 2**-22) * norm(right)


@every_path
@both_layouts
@every_dtype
def test_any_strides_in_and_the_same_layout_out(path: PathUnderTest, interleaved: bool, dtype: torch.dtype) -> None:
    """Transposed views keep their layout; slices of a wider tensor and strided last dimensions are read as they are."""
    case = make((2, 3, 1, 3, 10, 2), dtype, interleaved, path.device)
    found = ours(path, case, interleaved)
    assert found[0].stride() == case.q.stride()
    assert found[0].transpose(1, 2).is_contiguous()
    every_second = torch.stack((case.q, case.q * 2), -1)[..., 0]
    part = torch.cat((case.q, case.q), -1)[..., :10]
    tables = [torch.stack((t, t), 0)[1] for t in (case.cos, case.sin)]
    for q in (every_second, part, case.q.contiguous()):
        out, _ = Rope.apply(
            q, case.k, tables[0].transpose(0, 1).contiguous().transpose(0, 1), tables[1], interleaved, path.use_triton
        )
        torch.testing.assert_close(out, found[0], rtol=0, atol=0)
    q = case.q.detach().requires_grad_()
    out, _ = Rope.apply(q, case.k, case.cos, case.sin, interleaved, path.use_triton)
    (d_q,) = torch.autograd.grad(out, q, case.d_q[:, :, :1].expand_as(q))
    dense = case._replace(d_q=case.d_q[:, :, :1].expand_as(q).contiguous())
    torch.testing.assert_close(d_q, ours(path, dense, interleaved)[2], rtol=0, atol=0)


@every_path
@both_layouts
@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 4, 1), (2, 2, 1, 0, 4, 1)], ids=str)
def test_no_rows_and_no_tokens(path: PathUnderTest, interleaved: bool, shape: tuple[int, ...]) -> None:
    case = make(shape, torch.bfloat16, interleaved, path.device)
    for found, x in zip(ours(path, case, interleaved), (case.q, case.k, case.q, case.k), strict=True):
        assert found.shape == x.shape


@every_path
@both_layouts
def test_a_gradient_for_one_of_the_two(path: PathUnderTest, interleaved: bool) -> None:
    """k frozen, or its output not used: q's gradient is what it is with both."""
    case = make((2, 3, 1, 5, 4, 1), torch.float32, interleaved, path.device)
    expected = ours(path, case, interleaved)[2]
    for k_trained in (False, True):
        q, k = case.q.detach().requires_grad_(), case.k.detach().requires_grad_(k_trained)
        out, _ = Rope.apply(q, k, case.cos, case.sin, interleaved, path.use_triton)
        out.backward(case.d_q)
        assert q.grad is not None
        assert k.grad is None
        torch.testing.assert_close(q.grad, expected, rtol=0, atol=0)


@once
@both_layouts
def test_gradcheck_with_tables_that_are_no_rotation(interleaved: bool) -> None:
    """The backward is the transpose, not the inverse: right for scaled tables and for pairs of unequal entries."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, h, 3, 6, generator=g, dtype=torch.float64).requires_grad_() for h in (2, 1))
    cos, sin = (torch.randn(1, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved), (q, k))


@every_path
@both_layouts
def test_unequal_tables_are_transposed_on_every_path(path: PathUnderTest, interleaved: bool) -> None:
    """⟨R·q, u⟩ = ⟨q, Rᵀ·u⟩ for arbitrary tables: 2·9·5·4 products with 4 roundings of 2⁻²⁴ each."""
    case = make((2, 9, 1, 5, 4, 1), torch.float32, interleaved, path.device)
    g = torch.Generator().manual_seed(2)
    cos, sin = (torch.randn(1, 5, 4, generator=g).to(path.device) for _ in range(2))
    q, _, d_q, _ = (t.double() for t in ours(path, case._replace(cos=cos, sin=sin), interleaved))
    bound = 4 * 2**-24 * float(q.norm() * case.d_q.norm() + d_q.norm() * case.q.norm())
    assert abs(float((q * case.d_q).sum() - (d_q * case.q).sum())) <= bound


# Triton without a GPU


@pytest.mark.slow
@once
def test_triton_kernels_through_the_interpreter() -> None:
    through_interpreter("tests/kernels/test_kernel_rope.py")


@once
@both_layouts
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES)
def test_kernel_compiles_without_spilling(
    capability: int, interleaved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Command-R's dimensions, 64 heads of 128."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = dict.fromkeys(kernel._rotate_kernel.arg_names, "i32") | dict.fromkeys(("x", "out", "cos", "sin"), "*bf16")
    for transposed in (False, True):
        tile = {"TRANSPOSED": transposed, "INTERLEAVED": interleaved, "HEADS": 64, "HALF": 64}
        assert_compiles_lean(capability, kernel._rotate_kernel, types, tile, 8)


@once
def test_the_pytorch_path_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = without_triton("rope", monkeypatch)
    case = make((2, 3, 1, 5, 4, 1), torch.float32, True)
    assert module.triton is None
    assert not module.takes_triton(case.q)
    for a, b in zip(module.rope(*case[:4], True), rope(*case[:4], True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert_fake_tensors_avoid_triton(kernel)


# What is kept for backward


@every_path
@both_layouts
@every_dtype
def test_saves_nothing_but_the_tables(path: PathUnderTest, interleaved: bool, dtype: torch.dtype) -> None:
    case = make((2, 3, 1, 5, 4, 1), dtype, interleaved, path.device)
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    kept = kept_for_backward(lambda: Rope.apply(q, k, case.cos, case.sin, interleaved, path.use_triton))
    assert n_bytes(kept, apart_from=(case.cos, case.sin)) == 0
    assert len(kept) == 2


@once
@both_layouts
def test_bytes_a_token_at_command_r_are_those_of_the_header(interleaved: bool) -> None:
    q = torch.empty(1, 8192, 64, 128, dtype=torch.bfloat16, device="meta", requires_grad=True).transpose(1, 2)
    cos, sin = (torch.empty(1, 8192, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    kept = kept_for_backward(lambda: rope(q, q, cos, sin, interleaved))
    assert n_bytes(kept, apart_from=(cos, sin)) == 0
    assert n_bytes(kept) == 2 * 8192 * 128 * 2


@once
def test_evaluation_keeps_nothing() -> None:
    case = make((2, 3, 1, 5, 4, 1), torch.float32, True)
    assert kept_for_backward(lambda: rope(*case[:4], True)) == []


# Bad input


@once
def test_shapes_that_do_not_fit_are_refused() -> None:
    q, cos = torch.zeros(2, 3, 5, 8), torch.zeros(1, 5, 8)
    wrong = [
        (q, q, cos[..., :4], cos),  # a table of half the head: partial rotation is the caller's to cut out
        (q, q, cos, cos[:, :4]),
        (q, q[:, :, :4], cos, cos),
        (q, q, cos.expand(3, 5, 8), cos),
        (q[..., :7], q[..., :7], cos[..., :7], cos[..., :7]),
        (q[0], q[0], cos, cos),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            rope(*arguments, interleaved=True)
    with pytest.raises(ValueError, match="gradient is not computed"):
        rope(q, q, cos.clone().requires_grad_(), cos, interleaved=True)
