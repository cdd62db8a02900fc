"""Each distance and its gradient against its formula in fp64; what backward keeps; rows that are themselves."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.objectives import distances
from pipeline.objectives.distances import BETWEEN, DISTANCES, Numbers
from tests.helpers import plain_distances

ROWS, TOKENS, WIDTH = 4, 19, 24
NUMBERS = Numbers(plain_distances.ALPHA, plain_distances.THRESHOLD, plain_distances.K)
OF_ROWS = [name for name in DISTANCES if name not in BETWEEN]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block ends within a row."""
    monkeypatch.setattr(distances, "BLOCK", 7)


def drawn(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """States that are alike, as a policy's and its reference's are, and which tokens count: of the last row none."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64) + 0.3
    x = y + torch.randn(y.shape, generator=generator, dtype=torch.float64) * torch.rand(
        ROWS, TOKENS, 1, generator=generator
    )
    mask = torch.rand(ROWS, TOKENS, generator=generator) < 0.7
    mask[-1] = False
    return x.to(dtype).requires_grad_(), y.to(dtype), mask


def ours(name: str, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return distances.of_rows(name, x, y, mask, NUMBERS)[0]


def plain(name: str, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """[ROWS − 1] and a 0, fp64."""
    found = [plain_distances.OF_ROWS[name](a[m], b[m]) for a, b, m in zip(x, y, mask, strict=True) if m.any()]
    return torch.stack([*found, torch.zeros((), dtype=torch.float64)])


def with_gradient(found: Tensor, x: Tensor) -> Tensor:
    """Of a sum in which every row weighs something else."""
    (gradient,) = torch.autograd.grad((found.double() * torch.arange(1, len(found) + 1)).sum(), x)
    return gradient


def test_every_distance_has_its_formula_here() -> None:
    assert set(plain_distances.OF_ROWS) | set(plain_distances.BETWEEN) == set(DISTANCES)


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_distance_and_its_gradient_are_the_formulas(name: str) -> None:
    x, y, mask = drawn(torch.float64)
    found, expected = ours(name, x, y, mask), plain(name, x, y, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(with_gradient(found, x), with_gradient(expected, x), rtol=1e-11, atol=1e-12)
    assert found[-1] == 0


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_it_is_computed_in_fp32_and_its_gradient_rounded_once(name: str, dtype: torch.dtype, off: float) -> None:
    """`off`: of the gradient. A sum of 24 products in fp32 is off by some 24·2⁻²⁴ of them; bf16 rounds by 2⁻⁹."""
    x, y, mask = drawn(dtype)
    exact = x.detach().double().requires_grad_()
    found, expected = ours(name, x, y, mask), plain(name, exact, y.double(), mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    gradient, theirs = with_gradient(found, x), with_gradient(expected, exact)
    assert gradient.dtype == dtype
    assert (gradient.double() - theirs).norm() <= (off + 1e-5) * theirs.norm()


@pytest.mark.parametrize("name", BETWEEN)
def test_a_distance_between_answers_is_the_formula(name: str) -> None:
    x, v, _ = drawn(torch.float64)
    a = x[:, 0]
    found, _ = distances.between(name, a, v[:, 0])
    expected = torch.stack([plain_distances.BETWEEN[name](one, other) for one, other in zip(a, v[:, 0], strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(with_gradient(found, x), with_gradient(expected, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DISTANCES)
def test_a_row_and_itself_are_exactly_alike(name: str, dtype: torch.dtype) -> None:
    """0, or a cosine of 1; and the gradient is 0 or, of a cosine, rounding, but never NaN."""
    x, _, mask = drawn(dtype)
    if name in BETWEEN:
        found, cosine = distances.between(name, x[:, 0].float(), x[:, 0].detach().float())
        assert cosine[:-1].eq(1).all()
    else:
        found, cosine = distances.of_rows(name, x, x.detach(), mask, NUMBERS)
        assert torch.equal(cosine, mask.any(1).float())
    gradient = with_gradient(found, x)
    assert gradient.isfinite().all()
    if name == "projection":
        torch.testing.assert_close(found, -torch.ones(ROWS))
        return
    assert torch.equal(found, mask.any(1).float() if name == "relu_cosine" else torch.zeros(ROWS))
    assert gradient.abs().max() <= 1e-5


def test_masked_mean() -> None:
    x, _, mask = drawn(torch.float64)
    found = distances.masked_mean(x, mask)
    expected = torch.stack([a[m].sum(0) / max(1, int(m.sum())) for a, m in zip(x, mask, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        with_gradient(found.sum(1), x), with_gradient(expected.sum(1), x), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_backward_keeps_the_states_and_a_few_numbers_a_token(name: str) -> None:
    """Of x and y themselves nothing new; no copy of them, which in fp32 would be 4096 bytes a token here."""
    width, tokens = 1024, 2 * 50
    x = torch.randn(2, 50, width, dtype=torch.bfloat16).requires_grad_()
    y, mask = torch.randn(2, 50, width, dtype=torch.bfloat16), torch.ones(2, 50, dtype=torch.bool)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Any:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = ours(name, x, y, mask) if name in OF_ROWS else between(name, x, y, mask)
    assert found.requires_grad
    theirs = {x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()}
    assert name in BETWEEN or theirs & held.keys()
    new = sum(size for place, size in held.items() if place not in theirs)
    of_rows = 2 * 10 * 4 * width if name in BETWEEN else 0  # means of rows, in fp32
    assert new <= tokens * (256 + (4 * NUMBERS.k if name == "top_k" else 0)) + of_rows
    assert new < tokens * 4 * width, "a copy of the states"


def between(name: str, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return distances.between(name, distances.masked_mean(x, mask), distances.masked_mean(y, mask))[0]
