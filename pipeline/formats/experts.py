"""Where the experts of a mixture lie: in the running model as one tensor a layer, in its folder in any of three ways.

Takes the name of a running module of experts and what it is made of; gives the tensors of a base's folder that hold what
its experts write with, W_e [D, I] of each expert e, and b_e [D]:

    one by one      `experts.3.w2.weight` [D, I], or [I, D], a tensor for each expert
    together        one tensor [E, D, I]
    transposed      one tensor [E, I, D] (gpt_oss, llama4, aria)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from pipeline.console import UserError
from pipeline.formats.base_model import Base
from pipeline.formats.safetensors import StoredTensor
from pipeline.formats.stored_names import stacked_names


class ExpertWeights(NamedTuple):
    """What a running module of experts writes with, by the names within it: `weight` [E, D, I], or [E, I, D] where
    `transposed`, and `bias` [E, D] or [D], if any."""

    weight: str
    bias: str | None
    transposed: bool


NO_EXPERTS: Mapping[str, ExpertWeights] = MappingProxyType({})


@dataclass(frozen=True)
class Stack:
    """The same in a folder: tensors of the experts in order, or one of all. `transposed`: as [.., I, D]."""

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    transposed: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.weights, *self.biases)


def find_stacks(base: Base, experts: Mapping[str, ExpertWeights], widths: Mapping[str, int]) -> dict[str, Stack]:
    """{module of experts: where its experts lie}. `widths`: D of each.

    Raises UserError for a module of which the folder has no such tensors, or in other shapes.
    """
    names = [f"{m}.{own}" for m, form in experts.items() for own in (form.weight, form.bias) if own]
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in names if name in base.tensors}
    if len(found) < len(names):
        elsewhere = stacked_names(base)
        found |= {name: elsewhere[name] for name in names if name not in found and name in elsewhere}
    if lost := [name for name in names if name not in found]:
        raise UserError(
            f"{base.folder} lacks tensors of the experts in {lost[0]}"
            + (f" (and in {len(lost) - 1} more)" if len(lost) > 1 else "")
            + ", or holds them in a form that no fold can change. Was the adapter trained on another model?"
        )
    return {module: _stack(base, module, form, widths[module], found) for module, form in experts.items()}


def _stack(base: Base, module: str, form: ExpertWeights, width: int, found: dict[str, tuple[str, ...]]) -> Stack:
    weights = found[f"{module}.{form.weight}"]
    biases = found[f"{module}.{form.bias}"] if form.bias else ()
    shapes = {base.tensors[name].shape for name in weights}
    sizes = shapes.pop()
    if shapes or len(sizes) != (3 if len(weights) == 1 else 2) or width not in sizes[-2:]:
        raise UserError(
            f"{base.folder}: {weights[0]} is {' × '.join(map(str, sizes))}, and the experts of {module} write {width} "
            "numbers. Was the adapter trained on another model?"
        )
    rows, columns = sizes[-2:]
    # A checkpoint may hold them the other way round than they run; where both sides are as long it is as transformers takes it.
    transposed = form.transposed if rows == columns else columns == width
    return Stack(weights, biases, transposed)


def matrix_of(base: Base, stack: Stack) -> StoredTensor:
    """The first expert's W_e, by its own shape [D, I]: for shapes and dtypes, not to be read."""
    tensor = base.tensors[stack.weights[0]]
    rows, columns = tensor.shape[-2:]
    shape = (columns, rows) if stack.transposed else (rows, columns)
    n_bytes = tensor.n_bytes // (tensor.shape[0] if len(tensor.shape) == 3 else 1)
    return StoredTensor(tensor.name, tensor.dtype, shape, tensor.file, tensor.start, n_bytes)
