"""An adapter against a base: which weight each pair belongs to, what kind the adapter is, which layers are taken.

Takes a `Base` and an `Adapter`; gives a `Part`. Every pair of the adapter has exactly one weight, and every shape fits,
or it is refused with the names: also the pairs of layers that are left out.
"""

import difflib
import re
from dataclasses import dataclass

import torch

from pipeline.artifacts.adapter_files import Adapter, Kind, Pair
from pipeline.artifacts.base_files import Base
from pipeline.artifacts.safetensors_stream import StoredTensor
from pipeline.console import UserError
from pipeline.layers import layer_ranges

FOLDABLE = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Part:
    """One adapter's part in a fold: its pairs by module, all to be used, and the modules left out by --layers."""

    adapter: Adapter
    kind: Kind
    scale: float  # --scale, by which every pair's scaling is multiplied
    pairs: dict[str, Pair]
    left_out: tuple[str, ...]

    def scaling(self, module: str) -> float:
        return self.pairs[module].scaling * self.scale


def match(
    base: Base, adapter: Adapter, *, kind: Kind | None, kind_is_meant: bool, scale: float, layers: str | None
) -> Part:
    """Match one adapter with the base. `layers` as '0:38' (both ends included), None for all.

    `kind` is the user's word where the files leave the kind open; with `kind_is_meant` it must also not contradict
    them. Raises UserError where a module or a shape does not fit, or where `layers` leaves nothing.
    """
    weights = _weights(base, adapter)
    possible = possible_kinds(adapter, weights)
    asked = kind if kind_is_meant or len(possible) > 1 else None
    found = resolve_kind(adapter, weights, possible, asked)
    taken = adapter.pairs if layers is None else _within(adapter, base, layers)
    left_out = tuple(module for module in adapter.pairs if module not in taken)
    return Part(adapter, found, scale, taken, left_out)


def _weights(base: Base, adapter: Adapter) -> dict[str, StoredTensor]:
    """{module: its weight}. Names match whole, never in part."""
    missing = [module for module in adapter.pairs if f"{module}.weight" not in base.tensors]
    if missing:
        like = difflib.get_close_matches(f"{missing[0]}.weight", list(base.tensors), n=1)
        raise UserError(
            f"{len(missing)} of the adapter's {len(adapter.pairs)} modules are not in {base.folder}: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. "
            + (f"The nearest tensor there is {like[0]}. " if like else "")
            + f"The adapter was trained on {adapter.base_model or 'a base it does not name'}. Nothing was written."
        )
    weights = {module: base.tensors[f"{module}.weight"] for module in adapter.pairs}
    for module, weight in weights.items():
        if weight.dtype not in FOLDABLE:
            packed = weight.dtype in ("U8", "I8", "I32")
            raise UserError(
                f"{weight.name} is stored as {weight.dtype}{', packed by a quantiser' if packed else ''}. "
                f"A fold needs {', '.join(FOLDABLE)}: use the original 16-bit model."
            )
        if len(weight.shape) != 2:
            raise UserError(f"{weight.name} has shape {weight.shape}; an adapter of {module} needs a matrix.")
    return weights


def possible_kinds(adapter: Adapter, weights: dict[str, StoredTensor]) -> set[Kind]:
    """The kinds an adapter may be: as its files declare, or by the shape of A against its modules' weights [D_out, D_in].

    A is R × D_in in an ordinary LoRA and R × D_out in the founding method's, which also calls itself LORA. All modules
    must agree; where every weight is square the shapes cannot tell.
    """
    possible: set[Kind] = {"lora", "multiplicative_lora"} if adapter.kind is None else {adapter.kind}
    for module, pair in adapter.pairs.items():
        rows, columns = weights[module].shape
        fitting: set[Kind] = set()
        if pair.B.shape[0] == rows:
            fitting |= {"lora"} if pair.A.shape[1] == columns else set()
            fitting |= {"multiplicative_lora"} if pair.A.shape[1] == rows else set()
        if not possible & fitting:
            raise UserError(_misfit(adapter, weights, module, possible, fitting))
        possible &= fitting
    return possible


def resolve_kind(adapter: Adapter, weights: dict[str, StoredTensor], possible: set[Kind], asked: Kind | None) -> Kind:
    """The one kind of `possible`; `asked`, where it is given, must be one of them, and decides where there are two."""
    if asked is not None:
        if asked not in possible:
            raise UserError(f"--kind {asked}: {adapter.folder} is a {'/'.join(possible)} by its files and shapes.")
        return asked
    if len(possible) == 2:
        module, pair = next(iter(adapter.pairs.items()))
        raise UserError(
            f"{adapter.folder} is of type LORA, and A is {_shape(pair.A)} on {module}, whose weight is square "
            f"({_shape(weights[module])}). That fits an ordinary LoRA as well as the founding method's multiplicative "
            "one. Say which it is: --kind lora or --kind multiplicative_lora."
        )
    return next(iter(possible))


def _misfit(
    adapter: Adapter, weights: dict[str, StoredTensor], module: str, possible: set[Kind], fitting: set[Kind]
) -> str:
    pair = adapter.pairs[module]
    shapes = f"A {_shape(pair.A)}, B {_shape(pair.B)} on {module}, whose weight is {_shape(weights[module])}"
    if fitting:
        return (
            f"{adapter.folder}: {shapes}: a {'/'.join(fitting)}, where "
            + ("the adapter's files declare" if adapter.kind else "the modules before it have")
            + f" a {'/'.join(possible)}. All modules must be of one kind."
        )
    return f"{adapter.folder}: {shapes}: the shapes do not fit. Was the adapter trained on another model?"


def _within(adapter: Adapter, base: Base, layers: str) -> dict[str, Pair]:
    """The pairs of the layers that `layers` names."""
    try:
        ranges = layer_ranges(layers)
    except ValueError as error:
        raise UserError(f"--layers '{layers}': {error}.") from None
    last = max((number for name in base.tensors if (number := layer_of(name)) is not None), default=-1)
    if max(high for _, high in ranges) > last:
        raise UserError(
            f"--layers '{layers}': {base.folder} has the layers 0 to {last} (both ends of a range are included)."
        )
    taken = {}
    for module, pair in adapter.pairs.items():
        number = layer_of(module)
        if number is not None and any(low <= number <= high for low, high in ranges):
            taken[module] = pair
    if not taken:
        held = sorted({number for module in adapter.pairs if (number := layer_of(module)) is not None})
        what = f"its layers are {held[0]} to {held[-1]}" if held else "it adapts no numbered layer"
        raise UserError(f"--layers '{layers}' leaves nothing of {adapter.folder}: {what}.")
    return taken


def layer_of(name: str) -> int | None:
    """The layer a module or tensor belongs to: the first number in its name; None for embeddings, head and norm."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def _shape(tensor: torch.Tensor | StoredTensor) -> str:
    return " × ".join(str(n) for n in tensor.shape)
