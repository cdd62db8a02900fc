"""Counting against figures worked out by hand, on real and on fake tensors."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import grouped_mm, linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from pipeline.kernels import dispatch, norm, rope, swiglu
from pipeline.planning.counts.counting import Counter, Counts, measure, received
from tests.helpers.paths import ROOT


@pytest.fixture(params=["real", "fake"], autouse=True)
def tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every figure holds for both."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield


def counts(run: Callable[[], object], on_gpu: bool = False) -> Counts:
    counter = Counter()
    with counter, dispatch.watched(counter.one_kernel) if on_gpu else contextlib.nullcontext():
        run()
        return counter.take()[0]


@pytest.mark.parametrize(
    ("product", "shapes", "flops"),
    [
        (torch.mm, [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (torch.addmm, [(5,), (2, 3), (3, 5)], 2 * 2 * 3 * 5),
        (torch.bmm, [(4, 2, 3), (4, 3, 5)], 4 * 2 * 2 * 3 * 5),
        (torch.baddbmm, [(4, 2, 5), (4, 2, 3), (4, 3, 5)], 4 * 2 * 2 * 3 * 5),
        (linear, [(1, 7, 3), (5, 3)], 2 * 7 * 3 * 5),
        (torch.mv, [(2, 3), (3,)], 2 * 2 * 3),
    ],
)
def test_a_product_counts_its_flops_and_no_bytes(product: Any, shapes: list[tuple[int, ...]], flops: int) -> None:
    arguments = [torch.ones(shape) for shape in shapes]
    assert counts(lambda: product(*arguments)) == Counts(flops, 0, 1)


def test_in_inference_mode_too() -> None:
    """There a linear layer arrives whole."""
    with torch.inference_mode():
        x, weight = torch.ones(1, 7, 3), torch.ones(5, 3)
        assert counts(lambda: linear(x, weight)) == Counts(2 * 7 * 3 * 5, 0, 1)


def test_a_grouped_product_counts_each_row_once() -> None:
    """Whatever expert a row goes to, it meets one matrix; backward has a product for the rows and one for the weights."""
    rows = torch.ones(24, 16, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(4, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.arange(6, 25, 6, dtype=torch.int32)
    measured = measure(lambda: grouped_mm(rows, weights, offs=ends))
    assert measured.forward == Counts(2 * 24 * 16 * 32, 0, 1)
    assert measured.backward.flops == 2 * measured.forward.flops


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_two_products_forward_and_five_backward(causal: bool) -> None:
    """Causal: half of the square, 2·T·D a token forward and 2.5 times that backward."""
    heads, tokens, width = 3, 16, 8
    q, k, v = (torch.ones(1, heads, tokens, width, requires_grad=True) for _ in range(3))
    measured = measure(lambda: scaled_dot_product_attention(q, k, v, is_causal=causal))
    att = 2 * tokens * (heads * width) * tokens * (1 if causal else 2)
    assert measured.forward.flops == att
    assert measured.backward.flops == 2.5 * att
    # Kept: the output and one fp32 log-sum-exp a head and token.
    assert measured.kept_bytes == 4 * heads * tokens * (width + 1)


N = 100


@pytest.mark.parametrize(
    ("run", "elements", "kernels"),
    [
        (lambda a, b, i: a + b, 3 * N, 1),
        (lambda a, b, i: a * a, 2 * N, 1),  # one tensor is read once
        (lambda a, b, i: a.add_(b), 3 * N, 1),
        (lambda a, b, i: a.copy_(b), 2 * N, 1),  # what is overwritten is not read
        (lambda a, b, i: torch.add(a, b, out=b), 3 * N, 1),
        (lambda a, b, i: a.zero_(), N, 1),
        (lambda a, b, i: torch.zeros(N), N, 1),
        (lambda a, b, i: torch.empty(N), 0, 0),
        (lambda a, b, i: a.view(10, 10).t()[2:4], 0, 0),
        (lambda a, b, i: a.view(10, 10).t().contiguous(), 2 * N, 1),
        (lambda a, b, i: a.detach(), 0, 0),
        (lambda a, b, i: a[:10] + b[:1].expand(10), 10 + 1 + 10, 1),  # an expanded element is one in memory
        (lambda a, b, i: a.sum(), N + 1, 1),
        (lambda a, b, i: a.exp().sin(), 4 * N, 2),
        (lambda a, b, i: a[i], 5 * 2 + 2 * 5, 1),  # five int64 indices, five elements read and written
        (lambda a, b, i: a.index_add_(0, i, b[:5]), 5 * 2 + 5 + 2 * 5, 1),
    ],
)
def test_everything_else_counts_what_it_reads_and_writes(run: Any, elements: int, kernels: int) -> None:
    a, b, indices = torch.ones(N), torch.ones(N), torch.arange(5)
    assert counts(lambda: run(a, b, indices)) == Counts(0, 4 * elements, kernels)


def test_what_is_kept_and_alive_at_once() -> None:
    """exp keeps its result and sin its argument: one tensor. Sizes in units of the input's 4·N bytes."""
    unit = 4 * N

    def forward() -> Tensor:
        return received((N,), torch.float32).exp().sin()

    measured = measure(forward)
    assert measured.kept_bytes == unit  # exp's result; neither the input nor the output is held
    # exp: input and result (the input is an unnamed temporary, gone when sin runs); sin: argument and result.
    assert measured.forward_peak_bytes == 2 * unit
    # cos(kept) and the gradient to it: kept, gradient, cosine, product.
    assert measured.backward_peak_bytes == 4 * unit
    assert measured.backward.elementwise_bytes == (2 + 3 + 3) * unit


def test_an_input_that_is_kept_counts_and_a_weight_does_not() -> None:
    weight = torch.ones(5, 3, requires_grad=True)

    def forward() -> Tensor:
        return linear(received((7, 3), torch.float32), weight)

    measured = measure(forward)
    assert measured.kept_bytes == 4 * 7 * 3
    assert measured.forward_peak_bytes == 4 * 7 * (3 + 5)
    # The kept input, the output's gradient, the input's gradient or the weight's, which stays.
    assert measured.backward_peak_bytes == 4 * (7 * 3 + 7 * 5 + 5 * 3 + 7 * 3)


def test_what_an_object_of_ours_holds_is_kept() -> None:
    held: list[Tensor] = []
    x = torch.ones(N)

    def forward() -> Tensor:
        held.append(x + 1)
        held.append(held[0].view(10, 10))  # a view of the same storage
        return held[0] * 2

    measured = measure(forward)
    assert measured.kept_bytes == 4 * N
    assert measured.backward == Counts(0, 0, 0)


def test_excluded_storages_do_not_count() -> None:
    table = torch.ones(N)
    held = []
    with Counter([table]) as counter:
        held.append(table.exp())
        assert counter.alive_bytes() == 4 * N
        table.view(10, 10)
        assert counter.alive_bytes() == 4 * N


def test_recomputation_keeps_the_input_and_runs_the_products_again() -> None:
    one, two = (torch.ones(8, 8, requires_grad=True) for _ in range(2))

    def block(x: Tensor) -> Tensor:
        return linear(linear(x, one).exp(), two)

    plain = measure(lambda: block(received((16, 8), torch.float32)))
    again = measure(lambda: checkpoint(block, received((16, 8), torch.float32), use_reentrant=False))
    product, size = 2 * 16 * 8 * 8, 4 * 16 * 8
    assert plain.forward == again.forward == Counts(2 * product, 2 * size, 3)
    assert (plain.kept_bytes, again.kept_bytes) == (2 * size, size)  # the input and exp's result; the input
    assert plain.backward.flops == 4 * product
    # Early stopping ends the second run when its last saved tensor is there: before the second product.
    assert again.backward.flops == 5 * product
    assert again.backward.elementwise_bytes == plain.backward.elementwise_bytes + 2 * size


def test_gradients_of_leaves_are_as_before_and_a_second_count_is_the_same() -> None:
    weight = torch.ones(5, 3, requires_grad=True)
    before = weight.grad = torch.ones(5, 3)
    first, second = (measure(lambda: linear(received((7, 3), torch.float32), weight)) for _ in range(2))
    assert weight.grad is before
    assert first == second


K = 64


def test_each_kernel_counts_as_what_its_file_promises() -> None:
    """norm: x read, y and two statistics a row written; with the gradient, 5·K elements in all. swiglu: 3·F and 5·F."""
    weight = torch.ones(K)
    x, gate, up = (torch.ones(16, K, requires_grad=True) for _ in range(3))
    normed = measure(lambda: norm.layer_norm(x, weight, 1e-5), on_gpu=True)
    product = measure(lambda: swiglu.swiglu(gate, up), on_gpu=True)
    row, statistics = 4 * K, 8
    assert normed.forward == Counts(0, 16 * (2 * row + statistics) + row, 1)
    assert normed.backward == Counts(0, 16 * (3 * row + statistics) + row, 1)
    assert normed.kept_bytes == 16 * statistics
    assert normed.forward_peak_bytes == 16 * (row + statistics)  # none of what PyTorch makes in between
    assert product.forward == Counts(0, 16 * 3 * row, 1)
    assert product.backward == Counts(0, 16 * 5 * row, 1)
    assert product.backward_peak_bytes == 16 * 3 * row  # the gradients of m, gate and up


def test_outside_it_counts_what_the_cpu_does() -> None:
    weight, x = torch.ones(K), torch.ones(16, K)
    on_a_gpu = measure(lambda: norm.layer_norm(x, weight, 1e-5), on_gpu=True)
    here = measure(lambda: norm.layer_norm(x, weight, 1e-5))
    assert here.forward.kernels > on_a_gpu.forward.kernels == 1
    assert here.forward.elementwise_bytes > on_a_gpu.forward.elementwise_bytes
    assert here.forward_peak_bytes > on_a_gpu.forward_peak_bytes


def test_a_kernel_s_products_and_what_it_changes_in_place() -> None:
    """As cross-entropy's: the block of logits is read and written where it is, and a product within still has FLOPs."""

    def shift(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2).add_(1)
        return (x @ y).exp()

    kernel = dispatch.Kernel(pytorch=shift, triton=shift)
    x, y = torch.ones(4, 3), torch.ones(3, 5)
    assert counts(lambda: kernel(False, x, y), on_gpu=True) == Counts(2 * 4 * 3 * 5, 4 * (12 + 15 + 12 + 20), 1)
    assert counts(lambda: shift(x, y), on_gpu=True).kernels == counts(lambda: kernel(False, x, y)).kernels == 4


def test_rope_reads_and_writes_q_and_k() -> None:
    q, k, table = torch.ones(1, 4, 16, 8), torch.ones(1, 2, 16, 8), torch.ones(1, 16, 8)
    counted = counts(lambda: rope.rope(q, k, table, table.clone(), True), on_gpu=True)
    clone = 2 * 4 * 16 * 8
    assert counted == Counts(0, clone + 4 * 16 * 8 * (2 * 4 + 2 * 2 + 2 * 2), 3)


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_every_form_is_one_of_a_kernel(file: Path) -> None:
    """A Triton form that stood alone would be counted as PyTorch's operations, on a GPU too."""
    module = importlib.import_module(f"pipeline.kernels.{file.stem}")
    kernels = [value for value in vars(module).values() if isinstance(value, dispatch.Kernel)]
    for form in ("triton", "pytorch"):
        forms = {value for name, value in vars(module).items() if name.startswith(f"{form}_")}
        assert forms == {getattr(kernel, form) for kernel in kernels}
