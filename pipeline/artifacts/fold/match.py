"""An adapter against a base: which tensor each part of it changes, what kind it is, which layers are taken.

Takes a `Base` and an `Adapter`; gives a `Part`. Every module of the adapter has exactly one weight, every tensor that was
trained in full replaces exactly one of the base, and every shape fits, or it is refused with the names: also the modules
of layers that are left out.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.artifacts.adapter.adapter import Adapter, Pair
from pipeline.artifacts.adapter.maps import Added, WholeWeight, shape_of
from pipeline.artifacts.adapter.parameters import check_stored, in_stored_tensors
from pipeline.artifacts.adapter.stored_form import as_matrix, in_stored_form, is_transposed, places, stacks
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA, MULTIPLICATIVE, Kind
from pipeline.formats.base_model import Base
from pipeline.formats.dtypes import FOLDABLE
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights, Stack, find_stacks, matrix_of
from pipeline.formats.safetensors import StoredTensor
from pipeline.formats.stored_names import Place, running_parameters
from pipeline.names import layer_of, layer_ranges, layers_of
from pipeline.peft.types import LOCAL


@dataclass(frozen=True)
class Part:
    """One adapter's part in a fold: what is used of it, by the base's own names, and what --layers leaves out.

    `kind`: one of families.SAVED. `left_out`: by the names of the running model.
    `too_wide`: modules whose pair has a higher rank than their weight can have, by the names of the running model.
    """

    adapter: Adapter
    kind: str
    scale: float  # --scale, by which every scaling is multiplied
    modules: tuple[str, ...]
    full: dict[str, torch.Tensor]
    left_out: tuple[str, ...]
    too_wide: tuple[str, ...]

    @property
    def pairs(self) -> dict[str, Pair]:
        return {module: self.adapter.pairs[module] for module in self.modules if module in self.adapter.pairs}

    def scaling(self, module: str) -> float:
        return self.adapter.pairs[module].scaling * self.scale


def match(
    base: Base, adapter: Adapter, *, kind: Kind | None, kind_is_meant: bool, scale: float, layers: str | None
) -> Part:
    """Match one adapter with the base. `layers` as '0:38' (both ends included), None for all.

    `kind` is the user's word where the files leave the kind open; with `kind_is_meant` it must also not contradict
    them. Raises UserError where a module or a shape does not fit, where `layers` leaves nothing, and for a `scale` of
    what has no strength.
    """
    adapter = in_stored_tensors(base, adapter)
    stacked = stacks(base, adapter)
    linear = [f"{module}.weight" for module in adapter.modules if module not in stacked]
    found = places(base, linear + list(adapter.full))
    weights = _weights(base, adapter, found, stacked)
    known: str | None = adapter.family
    if known:
        adapter = _sized(base, adapter, weights)
        if kind is not None and kind_is_meant:
            raise UserError(f"--kind {kind}: {adapter.folder} is a {known} by its files.")
        _check_maps(adapter, weights)
    else:
        known = _pair_kind(base, adapter, weights, kind=kind, kind_is_meant=kind_is_meant)
    _check_full(base, adapter, found)
    names = [*adapter.modules, *adapter.full]
    taken = set(names if layers is None else _within(names, adapter, base, layers))
    stored = in_stored_form(base, _only(adapter, taken), found, stacked, multiplicative=known == MULTIPLICATIVE)
    left_out = tuple(name for name in names if name not in taken)
    part = Part(stored, known, scale, stored.modules, stored.full, left_out, _too_wide(adapter, weights))
    _check_scale(part)
    return part


def pair_kind(base: Base, adapter: Adapter, *, kind: Kind | None, kind_is_meant: bool) -> Kind:
    """The kind of an adapter that is pairs, by its files, its shapes, and the user's word. Raises as `match`."""
    stacked = stacks(base, adapter)
    linear = [f"{module}.weight" for module in adapter.modules if module not in stacked]
    weights = _weights(base, adapter, places(base, linear), stacked)
    return _pair_kind(base, adapter, weights, kind=kind, kind_is_meant=kind_is_meant)


def check_names(
    base: Base,
    modules: Collection[str],
    full: Collection[str],
    experts: Mapping[str, ExpertWeights] = NO_EXPERTS,
    width: int = 0,
    parameters: Collection[str] = (),
) -> None:
    """Raise UserError, before anything is trained, where a module's weight, or a tensor to be trained in full, is not one
    that a fold into `base` can change. Names are the running model's; `full`: of tensors; `experts`: those of the modules
    that are a layer's experts, which write `width` numbers; `parameters`: those of the modules that are parameters."""
    check_stored(base, list(parameters))
    for stack in find_stacks(base, dict(experts), dict.fromkeys(experts, width)).values() if experts else ():
        _check_weight(matrix_of(base, stack), stack.weights[0])
    modules = [module for module in modules if module not in experts and module not in parameters]
    found = places(base, [f"{module}.weight" for module in modules] + list(full))
    lost = [name for name in [*(f"{module}.weight" for module in modules), *full] if name not in found]
    lost += [name for name, place in found.items() if name not in full and not place.tensor.endswith(".weight")]
    if lost:
        raise UserError(
            f"{base.folder} stores {lost[0]} in another form than the model runs"
            + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "")
            + ", which no fold can change."
        )
    for module in modules:
        _check_weight(as_matrix(base, found[f"{module}.weight"], module), module)


def _pair_kind(
    base: Base, adapter: Adapter, weights: dict[str, StoredTensor], *, kind: Kind | None, kind_is_meant: bool
) -> Kind:
    possible = possible_kinds(adapter, weights)
    if LORA in possible and any(is_transposed(base, module) for module in adapter.modules):
        possible = {LORA}  # the founding method's adapters were on no such model
    return resolve_kind(adapter, weights, possible, kind if kind_is_meant or len(possible) > 1 else None)


def _only(adapter: Adapter, names: Collection[str]) -> Adapter:
    """The adapter's modules and full tensors of these names."""
    return replace(
        adapter,
        pairs={module: pair for module, pair in adapter.pairs.items() if module in names},
        experts={module: form for module, form in adapter.experts.items() if module in names},
        maps={module: maps for module, maps in adapter.maps.items() if module in names},
        full={name: tensor for name, tensor in adapter.full.items() if name in names},
    )


def _sized(base: Base, adapter: Adapter, weights: Mapping[str, StoredTensor]) -> Adapter:
    """With what PEFT's layers, where it has such, need to know of its modules: the shapes of all, in the model's order where that
    says something, and which have a bias."""
    whole = [one for maps in adapter.maps.values() for one in maps if isinstance(one, WholeWeight)]
    if not whole:
        return adapter
    names = list(adapter.maps)
    if LOCAL[whole[0].peft_type].shared:
        order = [name.removesuffix(".weight") for name in running_parameters(base)]
        if set(names) - set(order):
            raise UserError(
                f"{adapter.folder}: this transformers cannot build {base.folder}, and its order of modules is needed."
            )
        names = [name for name in order if name in adapter.maps]
    shapes = {name: (weights[name].shape[0], weights[name].shape[1]) for name in names}
    biased = places(base, [f"{module}.bias" for module in adapter.maps])
    maps = {
        module: tuple(
            replace(one, shapes=shapes, biased=f"{module}.bias" in biased) if isinstance(one, WholeWeight) else one
            for one in maps
        )
        for module, maps in adapter.maps.items()
    }
    return replace(adapter, maps=maps)


def _check_maps(adapter: Adapter, weights: dict[str, StoredTensor]) -> None:
    for module, maps in adapter.maps.items():
        for one in maps:
            if found := one.misfit(*weights[module].shape):
                raise UserError(
                    f"{adapter.folder}: {found} on {module}, whose weight is {_shape(weights[module])}: the shapes do "
                    "not fit. Was the adapter trained on another model?"
                )


def _too_wide(adapter: Adapter, weights: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    pairs = [(module, pair.A.shape[-2]) for module, pair in adapter.pairs.items()]
    pairs += [(m, one.A.shape[0]) for m, maps in adapter.maps.items() for one in maps if isinstance(one, Added)]
    return tuple(module for module, rank in pairs if rank > min(weights[module].shape))


def _check_scale(part: Part) -> None:
    """Raise UserError where a strength other than the training's has no meaning."""
    if part.scale == 1.0:
        return
    if not FAMILIES[part.kind].has_strength and part.modules:
        raise UserError(
            f"--scale {part.scale:g}: {part.adapter.folder} is a {part.kind} adapter: it rotates or multiplies the weight "
            "and has no strength s. Fold it with --scale 1."
        )
    if part.full:
        raise UserError(
            f"--scale {part.scale:g}: {part.adapter.folder} has {next(iter(part.full))}, which was trained in full: it "
            "takes the place of the base's and has no strength. Fold it with --scale 1, or leave it out with --layers."
        )


def _check_full(base: Base, adapter: Adapter, found: Mapping[str, Place]) -> None:
    """Raise UserError where a tensor that was trained in full takes the place of none of the base's."""
    for name, tensor in adapter.full.items():
        if name not in found:
            raise UserError(f"{adapter.folder}: {name} was trained in full, and {base.folder} has no such tensor.")
        stored = base.tensors[found[name].tensor]
        if found[name].n_rows is None and (stored.shape != tuple(tensor.shape) or stored.dtype not in FOLDABLE):
            raise UserError(
                f"{adapter.folder}: {name} was trained in full as {shape_of(tensor)}; {base.folder} has it as "
                f"{stored.dtype} {_shape(stored)}. Was the vocabulary changed, or the adapter trained on another model?"
            )


def _weights(
    base: Base, adapter: Adapter, found: Mapping[str, Place], stacked: Mapping[str, Stack]
) -> dict[str, StoredTensor]:
    """{module: its weight [D_out, D_in]}; of experts, the first one's. Names match whole, never in part."""
    modules = [module for module in adapter.modules if module not in stacked]
    missing = [module for module in modules if f"{module}.weight" not in found]
    if missing:
        like = difflib.get_close_matches(f"{missing[0]}.weight", list(base.tensors), n=1)
        raise UserError(
            f"{len(missing)} of the adapter's {len(modules)} modules are not in {base.folder}: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. "
            + (f"The nearest tensor there is {like[0]}. " if like else "")
            + f"The adapter was trained on {adapter.base_model or 'a base it does not name'}. Nothing was written."
        )
    weights = {module: as_matrix(base, found[f"{module}.weight"], module) for module in modules}
    weights |= {module: matrix_of(base, stack) for module, stack in stacked.items()}
    for module, weight in weights.items():
        _check_weight(weight, module)
    return weights


def _check_weight(weight: StoredTensor, module: str) -> None:
    """Raise UserError where a module's weight is no matrix that a fold can change."""
    if weight.dtype not in FOLDABLE:
        packed = weight.dtype in ("U8", "I8", "I32")
        raise UserError(
            f"{weight.name} is stored as {weight.dtype}{', packed by a quantiser' if packed else ''}. "
            f"A fold needs {', '.join(FOLDABLE)}: use the original 16-bit model."
        )
    if len(weight.shape) != 2:
        raise UserError(f"{weight.name} has shape {weight.shape}; an adapter of {module} needs a matrix.")


def possible_kinds(adapter: Adapter, weights: dict[str, StoredTensor]) -> set[Kind]:
    """The kinds an adapter may be: as its files declare, or by the shape of A against its modules' weights [D_out, D_in].

    A is R × D_in in an ordinary LoRA and R × D_out in the founding method's, which also calls itself LORA. All modules
    must agree; where every weight is square the shapes cannot tell.
    """
    possible: set[Kind] = {LORA, MULTIPLICATIVE} if adapter.kind is None else {adapter.kind}
    for module, pair in adapter.pairs.items():
        rows, columns = weights[module].shape
        fitting: set[Kind] = set()
        if pair.B.shape[-2] == rows:
            fitting |= {LORA} if pair.A.shape[-1] == columns else set()
            fitting |= {MULTIPLICATIVE} if pair.A.shape[-1] == rows else set()
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


def _within(names: Collection[str], adapter: Adapter, base: Base, layers: str) -> list[str]:
    """Those modules and tensors that lie in the layers that `layers` names."""
    try:
        ranges = layer_ranges(layers)
    except ValueError as error:
        raise UserError(f"--layers '{layers}': {error}.") from None
    last = max(layers_of(base.tensors), default=-1)
    if max(high for _, high in ranges) > last:
        raise UserError(
            f"--layers '{layers}': {base.folder} has the layers 0 to {last} (both ends of a range are included)."
        )
    numbers = {name: layer_of(name) for name in names}
    taken = [name for name, n in numbers.items() if n is not None and any(low <= n <= high for low, high in ranges)]
    if not taken:
        held = sorted({number for number in numbers.values() if number is not None})
        what = f"its layers are {held[0]} to {held[-1]}" if held else "it adapts no numbered layer"
        raise UserError(f"--layers '{layers}' leaves nothing of {adapter.folder}: {what}.")
    return taken


def _shape(tensor: torch.Tensor | StoredTensor) -> str:
    return " × ".join(str(n) for n in tensor.shape)
