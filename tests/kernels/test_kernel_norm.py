"""LayerNorm and RMSNorm against fp64, beside transformers' own modules in the same dtype; what they save."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pipeline.kernels.norm import Norm, NormForm, layer_norm, rms_norm
from torch import Tensor
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from pipeline.kernels import norm as kernel
from tests.helpers import kernels as helpers
from tests.helpers.kernels import PathUnderTest, every_dtype, every_path, kept_for_backward, norm, once, rounding

Shape = tuple[int, ...]


class Kind(NamedTuple):
    """A form, transformers' module of it, and our public function for it."""

    form: NormForm
    module: type[torch.nn.Module]
    public: Callable[[Tensor, Tensor], Tensor]


EPS = 1e-5
KINDS = {
    "cohere": Kind(NormForm(EPS, True), CohereLayerNorm, partial(layer_norm, eps=EPS)),
    "llama": Kind(NormForm(EPS, False, False, True), LlamaRMSNorm, partial(rms_norm, eps=EPS)),
    "gemma2": Kind(NormForm(EPS, False, True), Gemma2RMSNorm, partial(rms_norm, eps=EPS, plus_one=True)),
    "olmo2": Kind(NormForm(EPS, False), Olmo2RMSNorm, partial(rms_norm, eps=EPS, cast_before_weight=False)),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
# x's shape, and how many of its last dimensions the weight has.
SHAPES = [((1, 4), 1), ((6, 1), 1), ((47, 31), 1), ((1025, 31), 1), ((5, 1025), 1), ((3, 47, 123), 1)]
SHAPES += [((2, 7, 4, 31), 2)]  # per head
every_shape = pytest.mark.parametrize(("shape", "weight_dims"), SHAPES, ids=str)


def make(shape: Shape, weight_dims: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, weight, upstream gradient. The rows of x differ in scale and have a mean."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g) * torch.rand(*shape[:-1], 1, generator=g).add(0.2) + 0.5
    weight = torch.randn(shape[-weight_dims:], generator=g)
    return tuple(t.to(dtype).to(device) for t in (x, weight, torch.randn(shape, generator=g)))


def exact(x: Tensor, weight: Tensor, d_y: Tensor, form: NormForm) -> tuple[Tensor, Tensor, Tensor]:
    """y, d_x, d_weight by PyTorch's own norms and autograd in fp64."""
    x, weight = (t.detach().double().cpu().requires_grad_() for t in (x, weight))
    function = torch.nn.functional.layer_norm if form.centred else torch.nn.functional.rms_norm
    y = function(x, x.shape[-1:], eps=form.eps) * (1 + weight if form.plus_one else weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), d_y.double().cpu())


def transformers_result(kind: Kind, x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, d_x, d_weight of transformers' module in the inputs' dtypes."""
    module = kind.module(tuple(weight.shape), eps=EPS).to(x.device, weight.dtype)
    module.weight.data.copy_(weight)
    x = x.detach().clone().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, module.weight), d_y.to(y.dtype))


def ours(path: PathUnderTest, form: NormForm, x: Tensor, weight: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, d_x, d_weight on the path under test."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = Norm.apply(x, weight, form, path.use_triton)
    return y.detach(), *torch.autograd.grad(y, (x, weight), d_y.to(y.dtype))


def margins(x: Tensor, weight: Tensor, d_y: Tensor, right: tuple[Tensor, ...], form: NormForm) -> list[float]:
    """How much farther than transformers' from fp64 y, d_x and d_weight may be: roundings made at other places.

    fp32: y is a product of three factors, each with a statistic summed over K, under 16 roundings of 2⁻²⁴ in all. Each
    element of d_x is a difference of terms as large as w·d_y/σ, which is what its roundings are relative to; the
    weight's gradient is a sum of |d_y·x̂|. bf16: one rounding of the result more, two where the value is rounded
    before the weight.
    """
    x, weight, d_y = (t.double().cpu() for t in (x, weight, d_y))
    w = 1 + weight if form.plus_one else weight
    sigma = (x.var(-1, correction=0, keepdim=True) if form.centred else x.square().mean(-1, keepdim=True)) + form.eps
    return [norm(right[0]), norm(w * d_y / sigma.sqrt()), norm((d_y * x / sigma.sqrt()).abs().sum_to_size(w.shape))]


def assert_as_good(found: tuple[Tensor, ...], kind: Kind, x: Tensor, weight: Tensor, d_y: Tensor) -> None:
    right, theirs = exact(x, weight, d_y, kind.form), transformers_result(kind, x, weight, d_y)
    terms = margins(x, weight, d_y, right, kind.form)
    dtypes = (x.dtype, x.dtype, weight.dtype)
    for value, other, gold, term, dtype in zip(found, theirs, right, terms, dtypes, strict=True):
        assert value.dtype == other.dtype
        once_more = 0.0 if dtype == torch.float32 else (1 + kind.form.cast_before_weight) * rounding(dtype)
        helpers.assert_no_worse(value, other, gold, 16 * 2**-24 * term + once_more * norm(gold))


@every_path
@every_kind
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 under fp32 weights"])
@every_shape
def test_against_fp64(path: PathUnderTest, kind: Kind, dtypes: str, shape: Shape, weight_dims: int) -> None:
    """Under trained weights of fp32, Llama's norm returns fp32, the others x's dtype; `assert_as_good` compares dtypes."""
    x, weight, d_y = make(shape, weight_dims, torch.float32 if dtypes == "fp32" else torch.bfloat16, path.device)
    weight = weight.float() if "fp32" in dtypes else weight
    found = ours(path, kind.form, x, weight, d_y)
    assert_as_good(found, kind, x, weight, d_y)
    if path.use_triton and dtypes == "fp32":  # kernel and reference: the same formulas, sums in another order
        terms = margins(x, weight, d_y, exact(x, weight, d_y, kind.form), kind.form)
        reference = ours(path._replace(use_triton=False), kind.form, x, weight, d_y)
        for a, b, term in zip(found, reference, terms, strict=True):
            assert norm(a - b) <= 16 * 2**-24 * term


@once
@every_kind
@every_dtype
@every_shape
def test_public_functions_are_transformers(kind: Kind, dtype: torch.dtype, shape: Shape, weight_dims: int) -> None:
    """To the bit, also under fp32 weights that bf16 does not hold."""
    x, weight, d_y = make(shape, weight_dims, dtype)
    for w in (weight, weight.float() * 1.001):
        torch.testing.assert_close(kind.public(x, w), transformers_result(kind, x, w, d_y)[0], rtol=0, atol=0)


@every_path
@every_kind
def test_a_mean_far_from_zero(path: PathUnderTest, kind: Kind) -> None:
    """Mean 1e4, deviation 1, fp32: a variance by E[x²] − E[x]² would be off by 1e8·2⁻²⁴ = 6."""
    x, weight, d_y = make((47, 123), 1, torch.float32, path.device)
    x = x + 1e4
    found, right = ours(path, kind.form, x, weight, d_y), exact(x, weight, d_y, kind.form)
    # x itself and the mean are exact to 2⁻²⁴·1e4, and the smallest deviation made here is about 0.2.
    lost = 4 * 2**-24 * 1e4 / 0.2 if kind.form.centred else 16 * 2**-24
    assert norm(found[0].cpu().double() - right[0]) <= lost * norm(right[0])


@every_path
@every_kind
@every_dtype
def test_rows_of_zeros_and_no_rows(path: PathUnderTest, kind: Kind, dtype: torch.dtype) -> None:
    x, weight, d_y = make((3, 47), 1, dtype, path.device)
    found, right = ours(path, kind.form, x * 0, weight, d_y), exact(x * 0, weight, d_y, kind.form)
    assert not found[0].any()
    assert not found[2].any()
    # w·d_y/√eps, centred: three roundings of fp32 and one of the dtype, of terms as large as the largest.
    bound = (4 * 2**-24 + rounding(dtype)) * float(right[1].abs().max())
    torch.testing.assert_close(found[1].double().cpu(), right[1], rtol=0, atol=bound)
    for shape in ((0, 47), (2, 0, 47)):
        x, weight, d_y = make(shape, 1, dtype, path.device)
        y, d_x, d_weight = ours(path, kind.form, x, weight, d_y)
        assert y.shape == d_x.shape == shape
        assert d_weight.shape == (47,)
        assert not d_weight.any()


@every_path
@every_kind
@every_dtype
def test_non_contiguous_inputs(path: PathUnderTest, kind: Kind, dtype: torch.dtype) -> None:
    """Transposed x, every second column, an expanded upstream gradient."""
    x, weight, d_y = make((5, 6, 47), 1, dtype, path.device)
    wide = torch.stack((x, x * 3), -1).flatten(-2)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::2]):
        assert not strided.is_contiguous()
        for upstream in (d_y.transpose(0, 1).contiguous().transpose(0, 1), d_y[:1].expand_as(d_y)):
            found = ours(path, kind.form, strided, weight, upstream)
            assert_as_good(found, kind, strided.contiguous(), weight, upstream.contiguous())


@every_path
@every_kind
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)], ids=str)
def test_frozen_and_trained_weights(path: PathUnderTest, kind: Kind, trained: tuple[bool, bool]) -> None:
    x, weight, d_y = make((3, 7, 123), 1, torch.float32, path.device)
    both = ours(path, kind.form, x, weight, d_y)[1:]
    x.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    Norm.apply(x, weight, kind.form, path.use_triton).backward(d_y)
    for tensor, expected, wanted in zip((x, weight), both, trained, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=0)


@every_path
def test_weight_gradient_is_summed_in_fp32(path: PathUnderTest) -> None:
    """Rows of ±1 are their own normed values: 4096 equal contributions, where a bf16 sum stops growing at 256."""
    n = 4096
    x = torch.tensor([1.0, -1.0], dtype=torch.bfloat16, device=path.device).repeat(n, 1)
    ones = torch.ones(n, 2, dtype=torch.bfloat16, device=path.device)
    found = ours(path, NormForm(0.0, centred=True), x, ones[0], ones)
    assert found[2].tolist() == [n, -n]


@every_path
@every_kind
def test_a_weight_gradient_of_few_programs(path: PathUnderTest, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows are many, a program takes several tiles of them; the last one fewer than the others, or none."""
    monkeypatch.setattr(kernel, "WEIGHT_GRADIENT_PROGRAMS", 6)
    for shape, weight_dims in (((521, 31), 1), ((85, 2, 123), 2)):
        x, weight, d_y = make(shape, weight_dims, torch.float32, path.device)
        assert_as_good(ours(path, kind.form, x, weight, d_y), kind, x, weight, d_y)


@every_path
def test_llama_rounds_before_the_weight_and_the_others_do_not(path: PathUnderTest) -> None:
    """A weight of fp32 ones shows what is multiplied: bf16 numbers, returned in fp32."""
    x, weight, _ = make((3, 47), 1, torch.bfloat16, path.device)
    y = Norm.apply(x, torch.ones_like(weight, dtype=torch.float32), KINDS["llama"].form, path.use_triton)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.bfloat16().float(), y, rtol=0, atol=0)
    for kind in ("cohere", "olmo2"):
        # One rounding: each of 141 elements within it. Two would put some element outside.
        weight = torch.full_like(weight, 1.01, dtype=torch.float32)
        found = Norm.apply(x, weight, KINDS[kind].form, path.use_triton)
        right = exact(x, weight, x, KINDS[kind].form)[0]
        allowed = rounding(torch.bfloat16) * right.abs() + 2**-20  # 16 roundings of 2⁻²⁴ before it, of numbers of 1
        assert ((found.double().cpu() - right).abs() <= allowed).all()


@every_path
@every_kind
def test_backward_twice_gives_the_same_and_a_second_derivative_is_refused(path: PathUnderTest, kind: Kind) -> None:
    x, weight, d_y = make((5, 31), 1, torch.float32, path.device)
    x.requires_grad_()
    y = Norm.apply(x, weight, kind.form, path.use_triton)
    first, second = (torch.autograd.grad(y, x, d_y, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (slope,) = torch.autograd.grad(y, x, d_y.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@once
@every_kind
@pytest.mark.parametrize("weight_shape", [(5,), (2, 5)], ids=str)
def test_gradcheck(kind: Kind, weight_shape: Shape) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(weight_shape, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(kind.public, (x, weight))


# Triton without a GPU


@pytest.mark.slow
@once
def test_triton_kernels_through_the_interpreter() -> None:
    helpers.through_interpreter("tests/kernels/test_kernel_norm.py")


@pytest.mark.slow
@once
@pytest.mark.parametrize("capability", helpers.COMPUTE_CAPABILITIES)
def test_kernels_compile_without_spilling(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At Command-R's K = 8192, at a query-key norm's (16 rows of 128 a program) and, frozen, at the longest row."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bf16 = dict.fromkeys(("x", "weight", "y", "d_y", "d_x"), "*bf16")
    fp32 = dict.fromkeys(("mean", "scale", "d_weight"), "*fp32")
    types = {**bf16, **fp32, **dict.fromkeys(("n_groups", "n_heads", "K"), "i32"), "eps": "fp32"}
    longest = kernel.MAX_TRITON_K
    for x_shape, weight_shape in (((4096, 8192), (8192,)), ((4096, 64, 128), (64, 128)), ((4096, longest), (longest,))):
        launch = kernel._Launch.over(torch.empty(x_shape, device="meta"), torch.empty(weight_shape, device="meta"))
        tile = {"ROWS": launch.rows, "BLOCK": launch.block, "CENTRED": True, "PLUS_ONE": False}
        constants = {**tile, "CAST_FIRST": True}
        helpers.assert_compiles_lean(capability, kernel._forward_kernel, types, constants, launch.warps)
        for trained in {False, weight_shape != (longest,)}:
            constants = {**tile, "WEIGHT_GRADIENT": trained}
            helpers.assert_compiles_lean(capability, kernel._backward_kernel, types, constants, launch.warps)


@once
def test_the_pytorch_path_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = helpers.without_triton("norm", monkeypatch)
    x, weight, _ = make((3, 47), 1, torch.float32)
    assert module.triton is None
    assert not module.takes_triton(x)
    torch.testing.assert_close(module.layer_norm(x, weight, EPS), layer_norm(x, weight, EPS), rtol=0, atol=0)
    helpers.assert_fake_tensors_avoid_triton(kernel)


# What is kept for backward


@every_path
@every_kind
@every_dtype
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_saves_input_and_statistics(path: PathUnderTest, kind: Kind, dtype: torch.dtype, trained: bool) -> None:
    x, weight, _ = make((3, 47, 123), 1, dtype, path.device)
    strided = torch.cat((x, x), -1)[..., :123].requires_grad_()
    assert kept_for_backward(lambda: Norm.apply(x, weight, kind.form, path.use_triton)) == []  # evaluation
    weight.requires_grad_(trained)
    statistics = 3 * 47 * (8 if kind.form.centred else 4)
    for taken in (x.requires_grad_(), strided):
        kept = kept_for_backward(lambda taken=taken: Norm.apply(taken, weight, kind.form, path.use_triton))
        assert helpers.n_bytes(kept, apart_from=(taken, weight)) == statistics
        assert all(t.dtype == torch.float32 for t in kept[2:])
        assert len(kept) == (4 if kind.form.centred else 3)


@once
def test_bytes_a_token_at_command_r_are_those_of_the_header() -> None:
    """16 392 bytes with x, 8 without; transformers' module keeps two fp32 tensors of x's size."""
    tokens, k = 8192, 8192
    x = torch.empty(1, tokens, k, dtype=torch.bfloat16, device="meta", requires_grad=True)
    module = CohereLayerNorm(k, eps=EPS).to("meta", torch.bfloat16).requires_grad_(False)
    kept = kept_for_backward(lambda: layer_norm(x, module.weight, EPS))
    assert helpers.n_bytes(kept, apart_from=(module.weight,)) == tokens * 16_392
    assert helpers.n_bytes(kept, apart_from=(module.weight, x)) == tokens * 8
    theirs = kept_for_backward(lambda: module(x))
    assert helpers.n_bytes(theirs, apart_from=(module.weight,)) == tokens * (8 * k + 8)


# Bad input


@once
def test_shapes_and_forms_that_no_model_has_are_refused() -> None:
    x = torch.zeros(2, 4, 8)
    for weight in (torch.ones(4), torch.ones(2, 8), torch.ones(()), torch.ones(2, 4, 8)):
        with pytest.raises(ValueError, match="does not fit x"):
            layer_norm(x, weight, EPS)
    with pytest.raises(ValueError, match="plus_one"):
        rms_norm(x, torch.ones(8), EPS, plus_one=True, cast_before_weight=True)
