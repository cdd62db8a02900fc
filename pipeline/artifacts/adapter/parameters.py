"""LoRA of parameters instead of linear modules (PEFT's target_parameters), above all of what holds all experts of a layer.

Takes an adapter whose file names the module alone, once for each of its parameters that are adapted, and a base; gives the
pairs of A and B of the stored tensors. Of a parameter P [E, M, N] with E experts PEFT has A [R·E, N] and B [M, R·E], rows of A
expert after expert, columns of B part after part (`peft/tuners/lora/layer.py`, ParamWrapper):

    P_e' = P_e + s·B_e·A_e,  A_e = A[e·R : (e+1)·R],  B_e = B[:, e::E];   of a module whose inputs come first  P_e + s·A_eᵀ·B_eᵀ

PEFT's wrapper of a second parameter stands around that of the first, so that `<module>.base_layer` is the earlier one, in the
order in which the module holds them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.artifacts.adapter.adapter import Adapter, Pair
from pipeline.console import UserError
from pipeline.formats.base_model import Base
from pipeline.formats.experts import Stack
from pipeline.formats.stored_names import RunningParameter, running_parameters
from pipeline.patterns import matches

INNER = ".base_layer"  # after a module's name: the wrapper within


class Placed(NamedTuple):
    """The LoRA of one parameter as PEFT has it: A [R·E, N], B [M, R·E]."""

    A: Tensor
    B: Tensor
    experts: int
    rank: int


def file_stems(parameters: list[str]) -> dict[str, str]:
    """{parameter: what its A and B are called by in PEFT's file}. `parameters`: full names, each module's in the order in which
    it holds them."""
    found = {}
    for module, group in groupby(parameters, key=lambda name: name.rpartition(".")[0]):
        members = list(group)
        for number, name in enumerate(members):
            found[name] = module + INNER * (len(members) - 1 - number)
    return found


def per_expert(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E, R, N] and B [E, M, R] of PEFT's; without a copy."""
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def placed(adapter: Adapter, running: Mapping[str, tuple[int, ...]]) -> dict[str, Placed]:
    """{parameter: its LoRA}. `running`: shapes of the model's parameters, in the order in which modules hold them.

    UserError for a LoRA that is of none of them, or has other shapes.
    """
    of = adapter.of_parameters
    if of is None:
        return {}
    wanted = [name for name in running if any(_ends(name, one) for one in of.names)]
    found: dict[str, Placed] = {}
    stems = {stem: name for name, stem in file_stems(wanted).items()}
    for stem, (A, B) in of.pairs.items():
        if (name := stems.get(stem)) is None:
            raise UserError(
                f"{adapter.folder}: it adapts parameters of {stem.removesuffix(INNER)} ({', '.join(of.names)}), and the model "
                "has none such there. Was the adapter trained on another model?"
            )
        experts = running[name][0] if len(running[name]) == 3 else 1
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % experts:
            raise UserError(
                f"{adapter.folder}: {name}: A {tuple(A.shape)}, B {tuple(B.shape)} are no pair for each of {experts} experts."
            )
        found[name] = Placed(A, B, experts, A.shape[0] // experts)
    if lost := [name for stem, name in stems.items() if stem not in of.pairs]:
        raise UserError(f"{adapter.folder}: it has nothing for {lost[0]}. The adapter is incomplete.")
    return found


def in_stored_tensors(base: Base, adapter: Adapter) -> Adapter:
    """The adapter with pairs of stored tensors for those of parameters: of a matrix for each expert A [E, R, N], B [E, M, R],
    where all lie in one tensor.

    UserError where the base has no tensors that a fold can change, or of other shapes.
    """
    if adapter.of_parameters is None:
        return adapter
    running = running_parameters(base)
    pairs, stacks = dict(adapter.pairs), dict(adapter.stacks)
    for name, one in placed(adapter, {name: parameter.shape for name, parameter in running.items()}).items():
        scaling, origin = adapter.of_parameters.scaling(name, one.rank)
        for module, pair, stack in _stored(base, adapter, name, one, running[name]):
            pairs[module] = Pair(pair[0], pair[1], scaling, origin)
            if stack is not None:
                stacks[module] = stack
    return replace(adapter, pairs=pairs, stacks=stacks, of_parameters=None)


def check_stored(base: Base, names: list[str]) -> None:
    """UserError where one of the parameters `names`, of the running model, is stored in no form that a fold can change."""
    running = running_parameters(base) if names else {}
    for name in names:
        if name not in running or not _is_stored(base, name, running[name]):
            raise UserError(
                f"{base.folder} stores {name} in another form than the model runs, which no fold can change."
            )


def _is_stored(base: Base, name: str, parameter: RunningParameter) -> bool:
    return bool(parameter.tensors) if len(parameter.shape) == 3 else name.endswith(".weight")


def _stored(
    base: Base, adapter: Adapter, name: str, one: Placed, parameter: RunningParameter
) -> Iterator[tuple[str, tuple[Tensor, Tensor], Stack | None]]:
    """Of each stored tensor of a parameter: its name as a module's, A and B of what it adds, and, of one of all experts, where
    that lies."""
    if not _is_stored(base, name, parameter):
        raise UserError(
            f"{base.folder} stores {name}, which {adapter.folder} adapts, in another form than the model runs: no fold can "
            "change it. Load the adapter with PEFT."
        )
    A, B = per_expert(one.A, one.B, one.experts)
    if parameter.inputs_first and len(parameter.shape) == 3:
        A, B = B.mT, A.mT
    rows, columns = parameter.shape[-2:]
    if (B.shape[1], A.shape[2]) != (rows, columns):
        raise UserError(
            f"{adapter.folder}: {name}: A {tuple(one.A.shape)}, B {tuple(one.B.shape)}: the shapes do not fit the model's "
            f"{' × '.join(map(str, parameter.shape))}. Was the adapter trained on another model?"
        )
    if len(parameter.shape) != 3:
        yield name.removesuffix(".weight"), (A[0], B[0]), None
        return
    if len(parameter.tensors) == 1 and len(base.tensors[parameter.tensors[0][0]].shape) == 3:
        (tensor,) = parameter.tensors[0]
        yield tensor.removesuffix(".weight"), (B.mT, A.mT) if parameter.turned else (A, B), Stack((tensor,), (), False)
        return
    for expert, tensors in enumerate(parameter.tensors):
        first = 0
        for tensor in tensors:
            n_rows = base.tensors[tensor].shape[-1 if parameter.turned else 0]
            part = A[expert], B[expert, first : first + n_rows]
            first += n_rows
            yield tensor.removesuffix(".weight"), (part[1].mT, part[0].mT) if parameter.turned else part, None


def of_a_parameter(folder: Path, stem: str, config: Mapping[str, Any]) -> bool:
    """Whether what a PEFT configuration's file calls `stem` is a LoRA of a parameter of that module, and not of the module."""
    module, targets = stem, config.get("target_modules") or []
    while module.endswith(INNER):
        module = module.removesuffix(INNER)
    if isinstance(targets, str):
        targeted = matches(targets, module, f"{folder}: target_modules")
    else:
        targeted = any(_ends(module, target) for target in targets)
    holders = [name.rpartition(".")[0] for name in config.get("target_parameters") or ()]
    return not targeted and any(not holder or _ends(module, holder) for holder in holders)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
