"""An adapter as its base stores what it changes: under other names, transposed, or several weights in one tensor.

Takes a `Base` and an `Adapter` whose modules are the running model's; gives where each weight lies, and the same adapter in
terms of the stored tensors. GPT-2 and its like hold a linear layer as [D_in, D_out] (transformers' Conv1D): there
W = Sᵀ, and W' = W + s·B·A is S' = S + s·Aᵀ·Bᵀ; a multiplicative pair is S' = S·(I + s·B·A)ᵀ, as of a transposed tensor of
experts. Pairs of modules that lie one below the other in one tensor become one pair of
that tensor, with zeros where a pair has no rows: of B, and, where the adapter is multiplicative, of the columns of A.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from pipeline.artifacts.adapter.adapter import Adapter, Pair
from pipeline.console import UserError
from pipeline.formats.base_model import Base
from pipeline.formats.experts import Stack, find_stacks
from pipeline.formats.safetensors import StoredTensor
from pipeline.formats.stored_names import Place, stored_names

# model_types of transformers with Conv1D modules, and what these are called. The type decides, as in PEFT; what an
# adapter's fan_in_fan_out says does not.
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")


def is_transposed(base: Base, module: str) -> bool:
    """Whether the base holds the module's weight as [D_in, D_out]."""
    return base.config.get("model_type") in CONV1D_TYPES and module.rpartition(".")[2] in CONV1D_MODULES


def places(base: Base, names: Collection[str]) -> dict[str, Place]:
    """{tensor of the running model: its place}, for those of `names` that the base has.

    A name that is in the folder is itself; transformers is asked only where one is not.
    """
    found = {name: Place(name) for name in names if name in base.tensors}
    if len(found) < len(set(names)):
        elsewhere = stored_names(base)
        found |= {name: elsewhere[name] for name in names if name in elsewhere}
    return found


def as_matrix(base: Base, place: Place, module: str) -> StoredTensor:
    """The weight of a module at its place, by its own shape [D_out, D_in]: of rows of a tensor their bytes alone."""
    tensor = base.tensors[place.tensor]
    if place.n_rows is not None:
        row_bytes = tensor.n_bytes // tensor.shape[0]
        shape = (place.n_rows, *tensor.shape[1:])
        start, size = tensor.start + place.first * row_bytes, place.n_rows * row_bytes
        return replace(tensor, shape=shape, start=start, n_bytes=size)
    return replace(tensor, shape=tensor.shape[::-1]) if is_transposed(base, module) else tensor


def stacks(base: Base, adapter: Adapter) -> dict[str, Stack]:
    """Where the weights of those modules that are a layer's experts lie, and of pairs of all experts' tensors these. UserError
    where the base has none such."""
    if not adapter.experts:
        return adapter.stacks
    widths = {module: len(adapter.pairs[module].B) for module in adapter.experts}
    return {**adapter.stacks, **find_stacks(base, adapter.experts, widths)}


def in_stored_form(
    base: Base,
    adapter: Adapter,
    found: Mapping[str, Place],
    stacked: Mapping[str, Stack],
    *,
    multiplicative: bool,
) -> Adapter:
    """The adapter with its modules and full tensors by the names of `base`. `found`: the place of every one of them, but of
    modules of experts, which keep their names beside what is `stacked`.

    Raises UserError where a family other than pairs meets a tensor that holds more than its weight, or is transposed, and
    where a weight is stored under a name that is none.
    A multiplicative pair on a transposed weight is given what an expert's has: a `Stack` of the one.
    """
    modules = {module: found[f"{module}.weight"] for module in adapter.modules if module not in stacked}
    if odd := next((f"{m}.weight as {p.tensor}" for m, p in modules.items() if not p.tensor.endswith(".weight")), None):
        raise UserError(
            f"{adapter.folder}: {base.folder} stores {odd}, which is no weight's name: no fold changes that. Load the adapter "
            "with PEFT, or train without the module."
        )
    within = {module: stack for module, stack in stacked.items() if module in adapter.pairs}
    full = {}
    for name, tensor in adapter.full.items():
        place = found.get(name, Place(name))
        if place.n_rows is not None:
            raise UserError(
                f"{adapter.folder}: {name} was trained in full, and is part of {place.tensor} in {base.folder}."
            )
        full[place.tensor] = tensor
    maps = {}
    for module, one in adapter.maps.items():
        place = modules[module]
        if place.n_rows is not None or is_transposed(base, module):
            how = "transposed (Conv1D)" if place.n_rows is None else f"with other weights in {place.tensor}"
            raise UserError(
                f"{adapter.folder}: {base.folder} stores {module} {how}. Of a {adapter.family} adapter that is not folded: "
                "load it with PEFT."
            )
        maps[_module(place)] = one
    pairs: dict[str, Pair] = {}
    together: dict[str, list[tuple[Place, Pair]]] = {}
    for module, pair in adapter.pairs.items():
        if module in stacked:
            pairs[module] = pair
            continue
        place = modules[module]
        if place.n_rows is not None:
            together.setdefault(_module(place), []).append((place, pair))
        elif is_transposed(base, module) and multiplicative:
            pairs[_module(place)] = pair
            bias = f"{_module(place)}.bias"
            biases = (bias,) if adapter.moves_bias and bias in base.tensors else ()
            within[_module(place)] = Stack((place.tensor,), biases, transposed=True)
        elif is_transposed(base, module):
            pairs[_module(place)] = replace(pair, A=pair.B.T, B=pair.A.T)
        else:
            pairs[_module(place)] = pair
    for module, members in together.items():
        pairs[module] = joined(members, base.tensors[f"{module}.weight"].shape[0], multiplicative=multiplicative)
    copied = frozenset(found[name].tensor if name in found else name for name in adapter.copied)
    return replace(adapter, pairs=pairs, maps=maps, full=full, copied=copied, stacks=within)


def joined(members: Sequence[tuple[Place, Pair]], rows: int, *, multiplicative: bool) -> Pair:
    """One pair of a tensor with `rows` rows that does to its parts what `members` do: A [ΣR, D], B [rows, ΣR]."""
    first = max((pair for _, pair in members), key=lambda pair: abs(pair.scaling))
    As, Bs, biases = [], [], torch.zeros(rows)
    for place, pair in members:
        after = rows - place.first - (place.n_rows or 0)
        factor = pair.scaling / first.scaling if pair.scaling != first.scaling else 1.0
        B = pair.B if factor == 1.0 else pair.B.double() * factor
        Bs.append(torch.nn.functional.pad(B, (0, 0, place.first, after)))
        As.append(torch.nn.functional.pad(pair.A, (place.first, after)) if multiplicative else pair.A)
        if pair.bias is not None:
            biases[place.first : rows - after] = pair.bias.float() * factor
    biased = any(pair.bias is not None for _, pair in members)
    return replace(first, A=torch.cat(As), B=torch.cat(Bs, dim=1), bias=biases if biased else None)


def _module(place: Place) -> str:
    return place.tensor.removesuffix(".weight")
