"""Which trained tensors are still what they were: adapters that no gradient reaches, or whose steps are lost in rounding.

Takes what a stage trains and how to read it; remembers a hash of each, and says later which have the same.
"""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

AFTER_STEPS = 10  # that a tensor starts at a stationary point is then over


class Unmoved:
    """`value`: a parameter in fp32, with what its rounding left over (optim/inner.py)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], value: Callable[[nn.Parameter], Tensor]) -> None:
        self._parameters, self._value = parameters, value
        self.count = len(parameters)
        self._before = self._hashes()

    def names(self) -> list[str]:
        """Those that have not moved, in the model's order."""
        return [name for name, found in self._hashes().items() if found == self._before[name]]

    @torch.no_grad()
    def _hashes(self) -> dict[str, bytes]:
        found = {}
        for name, parameter in self._parameters.items():
            # torch takes −0 for 0, and the bytes do not: adding 0 makes them one.
            found[name] = hashlib.sha256((self._value(parameter) + 0.0).cpu().numpy().tobytes()).digest()
        return found


def described(names: list[str], of: int, steps: int) -> str:
    """One sentence for the user."""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"after {steps} steps {len(names)} of {of} trained tensors have not moved: {shown}. No gradient reaches them, or the "
        "learning rate is too small for their dtype"
    )
