"""The base under the adapters, while they stay where they are: what the model said before it was trained.

Takes a stage with adapters of any family; inside a block each of its modules computes what it did without one. What is
trained in full beside the adapters stays as it is: of that there is no copy.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.multiplicative import MultiplicativeLoRA
from pipeline.model.stage import Stage


@contextmanager
def adapters_off(stage: Stage) -> Iterator[None]:
    """Inside, the adapters of `stage` do nothing; not for a forward whose backward is to come.

    Not by PEFT's own switch, which also says that nothing trains any more (0.21, `enable_adapters`).
    """
    adapters = [m for m in stage.modules() if isinstance(getattr(m, "base_layer", None), nn.Module)]
    # A kernel reads a multiplicative adapter's A, B and s past its forward; with s = 0 it gives h, to the bit.
    scalings = {m: m.scaling for m in adapters if isinstance(m, MultiplicativeLoRA)}
    for module in adapters:
        base: Any = module.base_layer
        module.forward = base.__call__  # type: ignore[method-assign]
    for module in scalings:
        module.scaling = 0.0
    try:
        yield
    finally:
        for module in adapters:
            del module.forward
        for module, scaling in scalings.items():
            module.scaling = scaling


@contextmanager
def holding(stage: Stage, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, what is trained of `stage` has other values, given by global name; not for a forward whose backward is to come.

    Tensors are exchanged, not written to, so what autograd holds of another micro-batch stays as it was.
    """
    trained = trainable(stage)
    own = {name: parameter.data for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in trained.items():
            parameter.data = own[name]
