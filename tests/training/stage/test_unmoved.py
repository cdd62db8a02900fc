"""Which trained tensors have not moved: by what they are worth, with what rounding left over."""

from functools import partial

import torch
from torch import nn

from pipeline.training.optim.inner import make_inner, value
from pipeline.training.stage.unmoved import Unmoved, described


def test_what_gets_no_gradient_has_not_moved() -> None:
    """A bf16 weight whose steps are too small for its dtype has, in its compensated sum; a zero whose sign changed has not."""
    named = {
        name: nn.Parameter(torch.full((4, 3), at, dtype=torch.bfloat16))
        for name, at in (("a", 1.0), ("b", 1.0), ("c", 0.0))
    }
    inner = make_inner(
        "adamw_kahan", [{"params": list(named.values())}], lr=1e-5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    unmoved = Unmoved(named, partial(value, inner))
    assert unmoved.names() == ["a", "b", "c"]
    for _ in range(3):
        named["a"].grad = torch.ones_like(named["a"])
        named["c"].grad = torch.zeros_like(named["c"])
        inner.step()
    named["c"].data.neg_()
    assert torch.equal(named["a"], torch.ones_like(named["a"])), "in bf16 nothing is seen of it"
    assert unmoved.names() == ["b", "c"]
    assert unmoved.count == 3


def test_what_is_said_names_a_few() -> None:
    said = described([f"layers.{n}.mlp.down_proj.B" for n in range(9)], 40, 10)
    assert said.startswith("after 10 steps 9 of 40 trained tensors have not moved: layers.0.mlp.down_proj.B, ")
    assert "and 3 more. No gradient reaches them" in said
