"""Linear layers that read one input: to the bit what `linear` gives, one gradient, which is no worse than autograd's sum."""

import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from pipeline.kernels.shared_input import linear_and_input
from torch import Tensor, nn
from torch.nn.functional import linear

from pipeline.model.fusion.shared import put_together
from tests.helpers.kernels import kept_for_backward

WIDTHS = (12, 4, 4, 24, 24)


def make(dtype: torch.dtype, biased: bool) -> tuple[Tensor, list[Tensor], list[Tensor | None], list[Tensor]]:
    """x [2, 500, 16], weights, biases, upstream gradients."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x = draw(2, 500, 16).to(dtype).requires_grad_()
    weights = [draw(n, 16).to(dtype) for n in WIDTHS]
    biases = [draw(n).to(dtype) if biased else None for n in WIDTHS]
    return x, weights, biases, [draw(2, 500, n).to(dtype) for n in WIDTHS]


def chained(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    ys = []
    for weight, bias in zip(weights, biases, strict=True):
        y, x = linear_and_input(x, weight, bias)
        ys.append(y)
    return ys


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_are_linear_s_and_the_gradient_is_no_worse_than_autograd_s(dtype: torch.dtype, biased: bool) -> None:
    x, weights, biases, upstream = make(dtype, biased)
    ours = chained(x, weights, biases)
    theirs = [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    assert all(map(torch.equal, ours, theirs))
    exact = sum(g.double() @ w.double() for g, w in zip(upstream, weights, strict=True))
    (found,), (summed,) = (torch.autograd.grad(list(ys), x, upstream) for ys in (ours, theirs))
    assert found.dtype == dtype
    # Each added product is rounded once, to the dtype: five roundings of partial sums no larger than the terms together.
    terms = sum(g.double().abs() @ w.double().abs() for g, w in zip(upstream, weights, strict=True))
    assert ((found.double() - exact).abs() <= 6 * torch.finfo(dtype).eps * terms).all()
    if dtype is torch.bfloat16:
        assert (found.double() - exact).norm() <= (summed.double() - exact).norm()


def test_results_that_nobody_uses_add_nothing() -> None:
    x, weights, biases, upstream = make(torch.float64, False)
    ys = chained(x, weights, biases)
    (found,) = torch.autograd.grad([ys[1], ys[3]], x, [upstream[1], upstream[3]])
    torch.testing.assert_close(found, upstream[1] @ weights[1] + upstream[3] @ weights[3])


def test_the_input_may_be_read_elsewhere_too() -> None:
    """A residual's gradient is autograd's to add, and is not written to."""
    x, weights, biases, upstream = make(torch.float64, False)
    residual = torch.ones_like(x)
    (found,) = torch.autograd.grad([*chained(x, weights, biases), x * 1], x, [*upstream, residual])
    torch.testing.assert_close(found, 1 + sum(g @ w for g, w in zip(upstream, weights, strict=True)))
    assert torch.equal(residual, torch.ones_like(x))


def test_it_keeps_nothing_but_the_weights() -> None:
    x, weights, _, _ = make(torch.float32, False)
    kept = kept_for_backward(lambda: linear_and_input(x, weights[0], None))
    assert [t.data_ptr() for t in kept] == [weights[0].data_ptr()]


def layers() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(16, n).requires_grad_(False) for n in WIDTHS]


def test_layers_in_a_chain_give_what_they_gave_in_any_order_and_hold_nothing() -> None:
    plain, modules, x = layers(), layers(), torch.randn(3, 16, requires_grad=True)
    assert put_together(modules)
    for order in ((0, 1, 2, 3, 4), (2, 0, 1, 4, 3)):
        read = x * 2
        ours, theirs = ([m[at](read) for at in order] for m in (modules, plain))
        assert all(map(torch.equal, ours, theirs))
        one, other = (
            torch.autograd.grad(sum(y.square().sum() for y in ys), x, retain_graph=True)[0] for ys in (ours, theirs)
        )
        torch.testing.assert_close(one, other)
        gone = weakref.ref(read)
        del read, ours, theirs
        gc.collect()
        assert gone() is None


def test_another_input_begins_another_chain() -> None:
    plain, modules = layers(), layers()
    assert put_together(modules)
    x, y = (torch.randn(3, 16, requires_grad=True) for _ in range(2))

    def loss(of: list[nn.Linear]) -> Any:
        return (of[0](x) * of[1](y)[:, :1]).sum() + of[0](y).sum() + of[2](x).square().sum()

    ours, theirs = (torch.autograd.grad(loss(of), (x, y)) for of in (modules, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_frozen_plain_layers_are_put_together() -> None:
    class Own(nn.Linear):
        """Any other linear layer."""

    modules = [nn.Linear(4, 4), Own(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False)]
    assert not put_together(modules)
    assert not any("forward" in vars(m) for m in modules)
    modules[2].bias.requires_grad_(True)
    assert not put_together([*modules, nn.Linear(4, 4).requires_grad_(False)])
