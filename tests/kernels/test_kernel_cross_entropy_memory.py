"""Peak memory of the head, flat in the vocabulary: counted on meta tensors at Command-R's dimensions.

The count is of what is alive between any two operations; what an operation of PyTorch takes for itself is not in it.
"""

from typing import Any, NamedTuple

import pytest
import torch
from pipeline.kernels.cross_entropy import BLOCK_BYTES, LogitTransform, linear_cross_entropy, tokens_per_block
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.kernels import cross_entropy_block as kernel
from tests.helpers import kernels as helpers
from tests.helpers.kernels import PathUnderTest, once

CAPPED = LogitTransform(before=0.5, cap=3.0, after=0.9)


class Peak(TorchDispatchMode):
    """`bytes`: the most that storages made under it took together; those of `inputs` do not count."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


D = 8192  # Command-R's, in bf16
VOCABULARIES = [8192, 32_000, 131_072, 256_000]
ROWS = 4 * kernel.ROWS_ELEMENTS * 4  # of the PyTorch path: four tensors of some rows in fp32


class Layout(NamedTuple):
    """Tokens counted, and what the block's kernel takes beside the block."""

    tokens: int
    rows_bytes: int


@pytest.fixture(params=["pytorch", "triton"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """On meta tensors. Triton's kernel takes nothing beside the block and nll, which a test below measures.

    Counting the PyTorch path's many small operations takes time: two and a half blocks of tokens then do.
    """
    if request.param == "triton":
        stand_in = lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32)  # noqa: E731
        monkeypatch.setattr(kernel.LOSS, "pytorch", stand_in)
        return Layout(8192, 0)
    return Layout(2560, ROWS)


def meta_head(v: int, tokens: int, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (torch.empty(n, D, dtype=torch.bfloat16, device="meta") for n in (tokens, v))
    labels = torch.zeros(tokens, dtype=torch.int64, device="meta")
    return hidden.requires_grad_(), weight.requires_grad_(trained), labels


@once
@pytest.mark.parametrize("v", VOCABULARIES)
def test_a_frozen_head_takes_one_block_of_logits(v: int, layout: Layout) -> None:
    """Flat from 8 k to 256 k: one block of at most 512 MiB, and 16 bytes a token (nll, and labels of a block)."""
    hidden, weight, labels = meta_head(v, layout.tokens, trained=False)
    one_block = tokens_per_block(v, weight.dtype) * v * 2
    assert one_block <= BLOCK_BYTES
    with Peak(hidden, weight, labels) as forward:
        losses = linear_cross_entropy(hidden, weight, None, labels, CAPPED)
    beyond = forward.bytes - hidden.nbytes  # the gradient of the hidden state
    assert one_block <= beyond <= one_block + 16 * len(labels) + layout.rows_bytes
    assert forward.bytes + hidden.nbytes <= 1.3e9  # with the hidden state itself: performance.md's bound
    with Peak(hidden, weight, labels) as backward:
        losses.sum().backward()
    # The saved gradient, and the one that is returned.
    assert 0 <= backward.bytes - 2 * hidden.nbytes <= 16 * len(labels)


@once
@pytest.mark.parametrize("v", [8192, 256_000])
def test_a_trained_head_takes_a_block_a_product_and_the_gradient(v: int, layout: Layout) -> None:
    hidden, weight, labels = meta_head(v, layout.tokens, trained=True)
    one_block = tokens_per_block(v, weight.dtype) * v * 2
    with Peak(hidden, weight, labels) as forward:
        losses = linear_cross_entropy(hidden, weight, None, labels)
    assert forward.bytes <= one_block + 16 * len(labels) + layout.rows_bytes
    with Peak(hidden, weight, labels) as backward:
        losses.sum().backward()
    # In fp32, and at the end once more in bf16, which is less than block and product for a small vocabulary only.
    last = max(one_block * 2, v * D * 2)
    assert backward.bytes <= hidden.nbytes + v * D * 4 + last + 16 * len(labels) + layout.rows_bytes


@once
def test_evaluation_takes_one_block_too() -> None:
    hidden, weight, labels = meta_head(32_000, 2560, trained=False)
    one_block = tokens_per_block(32_000, weight.dtype) * 32_000 * 2
    with torch.no_grad(), Peak(hidden, weight, labels) as evaluation:
        linear_cross_entropy(hidden, weight, None, labels)
    assert one_block <= evaluation.bytes <= one_block + ROWS + 16 * len(labels)


@pytest.mark.parametrize("path", helpers.PATHS, ids=str)
def test_triton_allocates_nothing_but_the_losses(path: PathUnderTest) -> None:
    if not path.use_triton:
        pytest.skip("of the Triton path")
    raw = torch.randn(5, 199, device=path.device, dtype=torch.bfloat16)
    labels, scale = torch.arange(5, device=path.device), torch.ones(5, device=path.device)
    with Peak(raw, labels, scale) as peak:
        nll = kernel.triton_loss(raw, labels, CAPPED, scale, True)
    assert peak.bytes == nll.numel() * 4


@pytest.mark.slow
@once
def test_the_triton_path_through_the_interpreter() -> None:
    helpers.through_interpreter("tests/kernels/test_kernel_cross_entropy_memory.py")
