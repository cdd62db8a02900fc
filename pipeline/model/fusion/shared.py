"""Linear layers that read one input, in a chain of kernels/shared_input.py.

Takes modules that a model calls one after another with the same tensor; gives the frozen plain ones among them forwards that
hand it from each to the next. Called with another tensor, a layer begins another chain: that the input is one is seen at each
call and is no matter of names, and a layer that is not called is missed by nobody.
"""

import functools
from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.kernels.shared_input import linear_and_input

LACKING = "has fewer than two frozen linear layers without an adapter that read one input"


def put_together(modules: Sequence[nn.Module]) -> bool:
    """Give the frozen plain linear layers of `modules` forwards in a chain; whether there are two or more of them."""
    plain = [m for m in modules if type(m) is nn.Linear and "forward" not in vars(m) and not m.weight.requires_grad]
    plain = [m for m in plain if m.bias is None or not m.bias.requires_grad]
    if len(plain) < 2:
        return False
    chain = _Chain(len(plain))
    for module in plain:
        module.forward = functools.partial(chain.through, module)  # type: ignore[method-assign]
    return True


class _Chain:
    """The input of the layers, as the model has it and as the last layer handed it on, until all layers have read it."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._begin(None)

    def _begin(self, x: Tensor | None) -> None:
        self.x = self.handed_on = x
        self.read = 0

    def through(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """x·Wᵀ + b of `layer`."""
        if x is not self.x:
            self._begin(x)
        y, self.handed_on = linear_and_input(self.handed_on, layer.weight, layer.bias)
        self.read += 1
        if self.read == self.layers:
            self._begin(None)
        return y
