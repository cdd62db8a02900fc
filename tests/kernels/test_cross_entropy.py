"""The chunked head against fp64 arithmetic, beside PyTorch's own error with full logits in the same dtype."""

import math
from typing import NamedTuple

import pytest
import torch
from pipeline.kernels.cross_entropy import IGNORED, LogitTransform, linear_cross_entropy, reference
from torch import Tensor

Result = tuple[Tensor, list[Tensor]]  # loss per token; gradients of hidden, weight, bias
D = 48
DTYPES = [torch.float32, torch.bfloat16]
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(before=0.0625),
    "cap": LogitTransform(cap=5.0),
    "train scale": LogitTransform(after=1.1),
    "all": LogitTransform(before=0.5, cap=3.0, after=0.9),
}


class Case(NamedTuple):
    """Inputs of the head, and the weight each token's loss has in what is differentiated."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    upstream: Tensor


def make(n: int, v: int, dtype: torch.dtype, bias: bool = True, ignored: float = 0.25, seed: int = 0) -> Case:
    """Random inputs with logits of a few units, a share of ignored labels, upstream weights of both signs and zero."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < ignored] = IGNORED
    upstream = torch.randn(n, generator=g)
    upstream[torch.rand(n, generator=g) < 0.1] = 0.0
    hidden = torch.randn(n, D, generator=g).to(dtype)
    weight = (torch.randn(v, D, generator=g) * 3 / math.sqrt(D)).to(dtype)
    return Case(hidden, weight, torch.randn(v, generator=g).to(dtype) if bias else None, labels, upstream)


def exact(case: Case, transform: LogitTransform) -> Result:
    """Loss per token and gradients by autograd in fp64, from formulas of its own."""
    hidden, weight = (t.double().requires_grad_() for t in case[:2])
    bias = None if case.bias is None else case.bias.double().requires_grad_()
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = z * transform.before
    if transform.cap is not None:
        z = transform.cap * torch.tanh(z / transform.cap)
    log_p = torch.log_softmax(z * transform.after, dim=1)
    counted = case.labels != IGNORED
    nll = -log_p.gather(1, case.labels.clamp_min(0).unsqueeze(1)).squeeze(1) * counted
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    return nll.detach(), list(torch.autograd.grad(nll @ case.upstream.double(), inputs))


def pytorch(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: LogitTransform) -> Tensor:
    """Loss per token as anyone would write it: all logits, in the inputs' dtype, then fp32."""
    z = torch.nn.functional.linear(hidden, weight, bias).float() * transform.before
    if transform.cap is not None:
        z = torch.tanh(z / transform.cap) * transform.cap
    return torch.nn.functional.cross_entropy(z * transform.after, labels, reduction="none", ignore_index=IGNORED)


def run(function, case: Case, *args, frozen: bool = False) -> Result:
    """Loss per token and gradients of `function` in the case's own dtype; of hidden alone if the head is frozen."""
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(not frozen)
    bias = None if case.bias is None else case.bias.clone().requires_grad_(not frozen)
    nll = function(hidden, weight, bias, case.labels, *args)
    inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
    return nll.detach(), list(torch.autograd.grad(nll @ case.upstream, inputs))


def error(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ / ‖right‖, 0 where both are zero."""
    return float((found.double() - right).norm() / right.norm().clamp_min(1e-300))


def assert_as_good(ours: Result, theirs: Result, right: Result, case: Case, transform: LogitTransform) -> None:
    """Errors against fp64 no larger than those of PyTorch with full logits, but for roundings made at other places.

    Loss: nll = logsumexp − logit has two fp32 numbers as large as the logits, each rounded by at most 2⁻²⁴; PyTorch
    subtracts the maximum first. Gradients: the same fp32 error rounded once to the dtype, then one product; ours is
    multiplied by the upstream weight after the product and rounded once more (eps/2 of the dtype), and its roundings
    are others, so that their sum may come out a quarter larger.
    """
    z = transform.before * (case.hidden.double() @ case.weight.double().T)
    largest = float(z.abs().max()) + 4 + math.log(len(case.weight))  # 4: the bias, a unit normal
    assert ours[0].dtype == torch.float32
    per_token = 4 * 2**-24 * largest
    assert error(ours[0], right[0]) <= 1.25 * error(theirs[0], right[0]) + per_token * len(right[0]) ** 0.5 / float(
        right[0].norm().clamp_min(1e-300)
    )
    unit = torch.finfo(case.hidden.dtype).eps / 2
    for found, other, gradient in zip(ours[1], theirs[1], right[1][: len(ours[1])], strict=True):
        assert found.dtype == case.hidden.dtype
        assert found.shape == gradient.shape
        # fp32: softmax = exp(logit − logsumexp) carries the loss's absolute error as a relative one.
        assert error(found, gradient) <= 1.25 * error(other, gradient) + unit + per_token


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 31), (47, 31), (47, 199), (1025, 199)])
def test_loss_and_gradients_against_fp64(n: int, v: int, dtype: torch.dtype, frozen: bool) -> None:
    case, transform = make(n, v, dtype, ignored=0.25 if n > 1 else 0), LogitTransform()
    right = exact(case, transform)
    ours = run(linear_cross_entropy, case, transform, frozen=frozen)
    assert_as_good(ours, run(pytorch, case, transform, frozen=frozen), right, case, transform)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_what_models_do_to_their_logits(transform: LogitTransform, dtype: torch.dtype, frozen: bool) -> None:
    case = make(47, 199, dtype, bias=False)
    right = exact(case, transform)
    ours = run(linear_cross_entropy, case, transform, frozen=frozen)
    assert_as_good(ours, run(pytorch, case, transform, frozen=frozen), right, case, transform)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("block_tokens", [1, 7, 46, 47, 48, 1024])
def test_blocks_that_do_not_divide(block_tokens: int, frozen: bool) -> None:
    case, transform = make(47, 31, torch.float32), TRANSFORMS["all"]
    right = exact(case, transform)
    ours = run(linear_cross_entropy, case, transform, block_tokens, frozen=frozen)
    assert_as_good(ours, run(pytorch, case, transform, frozen=frozen), right, case, transform)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_the_reference_for_kernels_is_right(transform: LogitTransform) -> None:
    case = make(47, 31, torch.float32)
    ours, theirs = run(reference, case, transform), run(pytorch, case, transform)
    assert_as_good(ours, theirs, exact(case, transform), case, transform)


def test_extreme_logits_stay_finite_and_right() -> None:
    """Logits of ±10⁴: exp overflows fp32 unless the maximum is taken out; the loss is exact to 2⁻²⁴ of the logit."""
    hidden = torch.tensor([[1e4], [-1e4], [1e4]]).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    nll = linear_cross_entropy(hidden, weight, None, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(nll.detach(), torch.tensor([0.0, 2e4, 2e4]), rtol=2**-23, atol=0)
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    torch.testing.assert_close(gradient, torch.tensor([[0.0], [-2.0], [2.0]]), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_ignored_labels_cost_nothing_and_move_nothing(frozen: bool) -> None:
    case = make(47, 31, torch.float32)
    ignored = case.labels == IGNORED
    nll, gradients = run(linear_cross_entropy, case, frozen=frozen)
    assert ignored.any()
    assert not nll[ignored].any()
    assert (nll[~ignored] > 0).all()
    assert not gradients[0][ignored].any()
    assert gradients[0][~ignored].any()
    # Garbage in ignored rows reaches no weight's gradient.
    spoiled = case._replace(hidden=torch.where(ignored.unsqueeze(1), 1e3, case.hidden))
    for changed, same in zip(run(linear_cross_entropy, spoiled, frozen=frozen)[1][1:], gradients[1:], strict=True):
        torch.testing.assert_close(changed, same, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_token_and_no_counted_token(n: int, frozen: bool) -> None:
    nll, gradients = run(linear_cross_entropy, make(n, 31, torch.bfloat16, ignored=2.0), frozen=frozen)
    assert nll.shape == (n,)
    assert not nll.any()
    assert all(not g.any() for g in gradients)


def test_weight_gradient_is_summed_in_fp32() -> None:
    """4096 equal contributions in blocks of 1: a bf16 sum would stop growing at 256 of them."""
    n = 4096
    hidden, weight = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    nll = linear_cross_entropy(hidden, weight, None, torch.zeros(n, dtype=torch.int64), LogitTransform(), 1)
    (gradient,) = torch.autograd.grad(nll.sum(), weight)
    assert gradient.tolist() == [[-n / 2], [n / 2]]  # softmax − one-hot = ∓1/2, exact in bf16


# What is kept for backward


def saved_bytes(case: Case, transform: LogitTransform, train: tuple[bool, bool, bool]) -> tuple[int, list[Tensor]]:
    """Bytes saved for backward that are not inputs, and everything saved."""
    inputs = [t for t in case[:4] if t is not None]
    for tensor, wanted in zip((case.hidden, case.weight, case.bias), train, strict=True):
        if tensor is not None:
            tensor.requires_grad_(wanted)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nll = linear_cross_entropy(*case[:4], transform, 16)
    if nll.grad_fn is not None:
        assert not [v for v in vars(nll.grad_fn).values() if isinstance(v, Tensor)], "tensors beside the saved ones"
    own = {t.data_ptr() for t in inputs}
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in own), kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_head_keeps_one_gradient_of_the_hidden_state(dtype: torch.dtype) -> None:
    case = make(47, 199, dtype)
    n_bytes, kept = saved_bytes(case, TRANSFORMS["all"], (True, False, False))
    assert n_bytes == 47 * D * case.hidden.element_size()
    assert [t.shape for t in kept] == [(47, D)]


def test_trainable_head_keeps_nothing_but_its_inputs() -> None:
    assert saved_bytes(make(47, 199, torch.bfloat16), TRANSFORMS["all"], (True, True, True))[0] == 0


def test_evaluation_keeps_nothing() -> None:
    case = make(47, 199, torch.float32)
    assert saved_bytes(case, LogitTransform(), (False, False, False)) == (0, [])
    with torch.no_grad():
        assert saved_bytes(case, LogitTransform(), (True, True, True)) == (0, [])


def test_backward_twice_is_possible_where_autograd_allows_it() -> None:
    """The saved gradient is scaled into a new tensor, not in place."""
    case = make(5, 31, torch.float32, ignored=0)
    hidden = case.hidden.requires_grad_()
    nll = linear_cross_entropy(hidden, case.weight, None, case.labels).sum()
    first, second = (torch.autograd.grad(3 * nll, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [(False, True, False), (False, False, True), (True, False, True)])
def test_parts_of_the_head_are_trained_alone(trained: tuple[bool, bool, bool]) -> None:
    case, transform = make(47, 31, torch.float32), LogitTransform()
    right = exact(case, transform)[1]
    for tensor, wanted in zip((case.hidden, case.weight, case.bias), trained, strict=True):
        assert tensor is not None
        tensor.requires_grad_(wanted)
    nll = linear_cross_entropy(*case[:4], transform)
    wanted_inputs = [t for t, w in zip(case[:3], trained, strict=True) if w]
    found = torch.autograd.grad(nll @ case.upstream, wanted_inputs)
    for gradient, expected in zip(found, [g for g, w in zip(right, trained, strict=True) if w], strict=True):
        assert error(gradient, expected) < 1e-5  # fp32: sums of 47 products with errors of 2⁻²⁴
