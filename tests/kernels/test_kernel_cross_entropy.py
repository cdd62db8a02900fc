"""The head's kernel: a block of logits against fp64 on every path, weights.

tests/kernels/test_cross_entropy.py has the head as a whole on the CPU's path; here Triton runs too, through its interpreter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pipeline.kernels.cross_entropy import IGNORED, LogitTransform, linear_cross_entropy
from torch import Tensor

from pipeline.kernels import cross_entropy_block as kernel
from tests.helpers import kernels as helpers
from tests.helpers.kernels import PATHS, PathUnderTest, norm, once, rounding

CAPPED = LogitTransform(before=0.5, cap=3.0, after=0.9)
TRANSFORMS = {"plain": LogitTransform(), "scale": LogitTransform(before=0.0625, after=2), "cap": CAPPED}
every_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
every_dtype = pytest.mark.parametrize("dtype", [*helpers.DTYPES, torch.float16], ids=str)
# [n, V]: one token, V below, at and beyond a Triton program's tile of 4096, V that nothing divides.
every_shape = pytest.mark.parametrize(("n", "v"), [(1, 1), (7, 31), (6, 199), (2, 4096), (3, 4099), (2, 9001)])


@pytest.fixture(params=PATHS, ids=str)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PathUnderTest:
    """The path that the public functions take, too: in the interpreter Triton's, on CPU tensors."""
    monkeypatch.setattr(kernel, "takes_triton", lambda *x: request.param.use_triton)
    return request.param


def block(n: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Raw logits of a few units, labels of which some are ignored, a scale of both signs and zero."""
    g = torch.Generator().manual_seed(n + v)
    labels = torch.randint(v, (n,), generator=g)
    labels[1::4] = IGNORED
    scale = torch.randn(n, generator=g)
    scale[2::5] = 0.0
    return (torch.randn(n, v, generator=g) * 4).to(device, dtype), labels.to(device), scale.to(device)


def exact_logits(raw: Tensor, transform: LogitTransform) -> Tensor:
    z = raw.double() * transform.before
    return (z if transform.cap is None else transform.cap * torch.tanh(z / transform.cap)) * transform.after


def exact_block(raw: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """nll and the gradient of its sum by autograd in fp64."""
    raw = raw.detach().cpu().double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(exact_logits(raw, transform), labels.cpu(), reduction="none")
    return nll.detach(), torch.autograd.grad(nll.sum(), raw)[0]


def pytorch_block(raw: Tensor, labels: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """The same as anyone would write it: an fp32 copy, its gradient rounded to the dtype of the logits."""
    raw = raw.detach().clone().requires_grad_()
    z = raw.float() * transform.before
    if transform.cap is not None:
        z = torch.tanh(z / transform.cap) * transform.cap
    nll = torch.nn.functional.cross_entropy(z * transform.after, labels, reduction="none", ignore_index=IGNORED)
    return nll.detach(), torch.autograd.grad(nll.sum(), raw)[0]


def logit_error(raw: Tensor, transform: LogitTransform) -> float:
    """Absolute error of a transformed logit or a log-sum-exp in fp32: 8 roundings of the largest number in it.

    The transform makes up to four (of numbers as large as the cap, where tanh comes from exp), the difference to the
    maximum, the sum, its logarithm and the last difference the rest.
    """
    largest = float(exact_logits(raw, transform).abs().max()) + float(torch.tensor(2.0 * raw.shape[1]).log())
    return 8 * 2**-24 * max(largest, transform.cap or 0.0, 1.0)


@every_transform
@every_dtype
@every_shape
def test_a_block_against_fp64(
    path: PathUnderTest, n: int, v: int, dtype: torch.dtype, transform: LogitTransform
) -> None:
    raw, labels, scale = block(n, v, dtype, path.device)
    right, theirs, margin = exact_block(raw, labels, transform), pytorch_block(raw, labels, transform), 0.0
    for factor in (None, scale):
        logits = raw.clone()
        nll = kernel.loss(logits, labels, transform, factor, True)
        margin = logit_error(raw, transform)
        assert nll.dtype == torch.float32
        assert not nll[labels == IGNORED].any()
        assert not logits[labels == IGNORED].any()
        helpers.assert_no_worse(nll, theirs[0], right[0], margin * n**0.5)
        # exp turns the logits' absolute error into a relative one, of p and of the cap's slope: three factors of it.
        # fp16 has no numbers between its least, 2⁻²⁴, and 0: half of that an element.
        times = 1.0 if factor is None else factor.cpu().double().unsqueeze(1)
        gold = right[1] * times
        other = theirs[1].cpu().double() * times  # the scale by fp64: their error is then that of d nll alone
        least = 2**-25 * (n * v) ** 0.5 * (dtype == torch.float16)
        terms = (3 * margin + (rounding(dtype) if dtype != torch.float32 else 0)) * norm(gold)
        # As 1 − one-hot cancels, errors at the label are relative to 1, not to the difference.
        at_label = 3 * margin * norm(torch.ones(n) * times)
        helpers.assert_no_worse(logits, other, gold, terms + at_label + least)
    torch.testing.assert_close(kernel.loss(raw.clone(), labels, transform, None, False), nll, rtol=0, atol=0)


@every_transform
@every_shape
def test_triton_is_the_reference(path: PathUnderTest, n: int, v: int, transform: LogitTransform) -> None:
    """The same formulas in fp32, with sums in another order and tanh from exp; bf16 logits give bf16 gradients."""
    if not path.use_triton:
        pytest.skip("compares Triton with the PyTorch path")
    for dtype in (torch.float32, torch.bfloat16):
        raw, labels, scale = block(n, v, dtype, path.device)
        margin, ours, theirs = logit_error(raw, transform), raw.clone(), raw.clone()
        a = kernel.triton_loss(ours, labels, transform, scale, True)
        b = kernel.pytorch_loss(theirs, labels, transform, scale, True)
        assert float((a - b).abs().max()) <= 2 * margin
        rounded = 0.0 if dtype == torch.float32 else 2 * rounding(dtype)
        slope, size = max(1.0, abs(transform.before * transform.after)), scale.abs().unsqueeze(1)
        assert ((ours - theirs).abs() <= 6 * margin * slope * size + rounded * theirs.abs()).all()


def test_a_wrong_label_does_not_pass_unseen(path: PathUnderTest) -> None:
    """An exception on the CPU, NaN from a GPU, where looking would wait for it."""
    for label in (-1, 31):
        labels = torch.tensor([0, label], device=path.device)
        if path.use_triton:
            nll = kernel.loss(torch.zeros(2, 31, device=path.device), labels, CAPPED, None, False)
            assert nll.isnan().tolist() == [False, True]
        else:
            with pytest.raises(RuntimeError, match="out of bounds"):
                kernel.loss(torch.zeros(2, 31), labels, CAPPED, None, False)


def test_ignored_rows_may_hold_anything(path: PathUnderTest) -> None:
    raw = torch.full((2, 31), float("nan"), device=path.device)
    raw[0] = 0.0
    nll = kernel.loss(raw, torch.tensor([3, IGNORED], device=path.device), CAPPED, None, True)
    assert nll[1] == 0
    assert not raw[1].any()
    assert not nll.isnan().any()
    assert raw[0].any()


# The head on every path: loss, gradients, weights


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    token_weights: Tensor


def head(n: int, v: int, dtype: torch.dtype, device: str = "cpu", d: int = 24) -> Case:
    g = torch.Generator().manual_seed(v)
    labels, token_weights = torch.randint(v, (n,), generator=g), torch.randn(n, generator=g)
    labels[1::4], token_weights[2::5] = IGNORED, 0.0
    made = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g) * 0.6, torch.randn(v, generator=g)
    return Case(*(t.to(device, dtype) for t in made), labels.to(device), token_weights.to(device))


def gradients(case: Case, transform: LogitTransform, train: int, function: Callable[..., Tensor]) -> list[Tensor]:
    """Losses, then the gradients of their sum for the first `train` of hidden, weight, bias."""
    inputs = [t.detach().clone().requires_grad_(i < train) for i, t in enumerate(case[:3])]
    losses = function(Case(*inputs, *case[3:]), transform)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), inputs[:train])]


def ours(case: Case, transform: LogitTransform, block_tokens: int | None = 5) -> Tensor:
    return linear_cross_entropy(*case[:4], transform, block_tokens) * case.token_weights


def theirs(case: Case, transform: LogitTransform) -> Tensor:
    z = transform.apply(torch.nn.functional.linear(*case[:3]))
    return torch.nn.functional.cross_entropy(z, case.labels, reduction="none") * case.token_weights


@pytest.mark.parametrize("train", [1, 3], ids=["frozen", "trainable"])
@every_transform
@every_dtype
def test_weighted_losses_against_fp64(
    path: PathUnderTest, dtype: torch.dtype, transform: LogitTransform, train: int
) -> None:
    """Frozen and trained, in blocks that do not divide N, beside PyTorch's logits in the same dtype.

    What is allowed beyond PyTorch's error: that of the loss as above; of the gradients one more rounding of the dtype
    (the scaled hidden gradient; the sum over blocks) and a quarter of theirs, as roundings fall at other places.
    """
    case = head(13, 199, dtype, path.device)
    wide = Case(*(t.cpu().double() for t in case[:3]), case.labels.cpu(), case.token_weights.cpu().double())
    right, other = gradients(wide, transform, train, theirs), gradients(case, transform, train, theirs)
    found = gradients(case, transform, train, ours)
    margin = logit_error(wide.hidden @ wide.weight.T + 4, transform)  # 4: the bias
    allowed = [margin * norm(wide.token_weights)]
    allowed += [(2 * rounding(dtype) + 4 * margin) * norm(g) for g in right[1:]]
    for a, b, gold, more in zip(found, other, right, allowed, strict=True):
        helpers.assert_no_worse(a, b, gold, more + 0.25 * norm(b.cpu().double() - gold))
    none = (case.labels == IGNORED) | (case.token_weights == 0)
    assert none.any()
    assert not found[0][none].any()
    assert not found[1][none].any()


@pytest.mark.parametrize("train", [1, 3], ids=["frozen", "trainable"])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_token_and_none_that_counts(path: PathUnderTest, n: int, train: int) -> None:
    for labels, weight in ((IGNORED, 1.0), (0, 0.0)):
        case = head(n, 31, torch.bfloat16, path.device)
        case.labels.fill_(labels), case.token_weights.fill_(weight)
        found = gradients(case, CAPPED, train, ours)
        assert found[0].shape == (n,)
        assert not any(t.any() for t in found)


def test_two_runs_are_equal_to_the_bit(path: PathUnderTest) -> None:
    case = head(13, 199, torch.bfloat16, path.device)
    for a, b in zip(*(gradients(case, CAPPED, 3, ours) for _ in range(2)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@once
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@every_transform
def test_gradcheck(transform: LogitTransform, frozen: bool) -> None:
    case = head(5, 7, torch.float64, d=3)
    inputs = tuple(t.requires_grad_(not (frozen and i)) for i, t in enumerate(case[:3]))
    assert torch.autograd.gradcheck(lambda h, w, b: linear_cross_entropy(h, w, b, case.labels, transform, 2), inputs)


@once
def test_what_does_not_fit_is_refused() -> None:
    case = head(5, 31, torch.float32)
    hidden, weight, bias, labels, _ = case
    with pytest.raises(ValueError, match="of one dtype"):
        linear_cross_entropy(hidden.bfloat16(), weight, bias, labels)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(hidden, weight, bias, labels[1:])
    with pytest.raises(ValueError, match="at least 1"):
        linear_cross_entropy(hidden, weight, bias, labels, block_tokens=0)


# Triton without a GPU


@once
@pytest.mark.slow
def test_triton_kernels_through_the_interpreter() -> None:
    helpers.through_interpreter("tests/kernels/test_kernel_cross_entropy.py")


@once
@pytest.mark.parametrize("capability", helpers.COMPUTE_CAPABILITIES)
def test_kernels_compile_without_spilling(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fp32 = dict.fromkeys(("scale", "nll"), "*fp32") | dict.fromkeys(("before", "cap", "after"), "fp32")
    types = {"logits": "*bf16", "labels": "*i64", "V": "i32", **fp32}
    _, tiles = kernel._tiles(torch.empty(1024, 256_000, device="meta"), CAPPED)
    warps = tiles.pop("num_warps")
    tiles |= {"SCALED": True, "GRADIENT": True}
    for capped in (False, True):
        helpers.assert_compiles_lean(capability, kernel._loss_kernel, types, tiles | {"CAPPED": capped}, warps)


@once
def test_the_pytorch_path_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    module = helpers.without_triton("cross_entropy_block", monkeypatch)
    raw, labels, _ = block(5, 31, torch.bfloat16, "cpu")
    assert module.triton is None
    assert not module.takes_triton(raw)
    a, b = (m.loss(raw.clone(), labels, m.LogitTransform(), None, True) for m in (module, kernel))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    helpers.assert_fake_tensors_avoid_triton(kernel)
