"""What a fold will do, decided before anything is written.

Takes a `Base` and one or more `Adapter`s; gives a `FoldPlan`: which tensors change and by which steps in which order,
which tensors are read through 4 bits, which dtype each tensor has afterwards, and the new config.

Composition, in the order given: each adapter changes the weight as the one before left it. A multiplicative one multiplies
it from the left, rotations, reflections and factors of inputs from the right, an additive one adds, DoRA takes the norms
of its rows, PEFT's own layer merges what it is of, and a tensor that was trained in full takes its place. Of three
multiplicative ones: W' = (I + s₃·B₃·A₃)·(I + s₂·B₂·A₂)·(I + s₁·B₁·A₁)·W. Within one adapter full tensors come first.
Undoing (`unmerge`) takes the inverses in the opposite order. Everything is rounded once, at the end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.artifacts.adapter.adapter import Adapter, Pair
from pipeline.artifacts.adapter.maps import Added, Multiplied, Replaced, RowFactors, RowMap, WholeWeight
from pipeline.artifacts.fold.config import logit_factor, new_config
from pipeline.artifacts.fold.inverse import check_invertible, inverse
from pipeline.artifacts.fold.match import Part, match
from pipeline.artifacts.fold.ties import settled, touches
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA, MULTIPLICATIVE, Kind
from pipeline.formats.base_model import Base, stop_ids
from pipeline.formats.choices import BaseQuant, Dtype, OutputDtype
from pipeline.formats.dtypes import DTYPES, FLOATS, FOLDABLE, code_of
from pipeline.formats.nf4 import read_nf4
from pipeline.formats.safetensors import StoredTensor, TensorSpec, read_floats
from pipeline.names import is_router, layer_of
from pipeline.peft.types import LOCAL


@dataclass(frozen=True)
class PairStep:
    """One change of a weight: W → W + s·B·(A·W), or W → W + s·B·A, by `kind`. `part`: the adapter's place in the plan."""

    part: int
    kind: Kind
    pair: Pair
    scaling: float


@dataclass(frozen=True)
class RowStep:
    """One change of a weight by maps, each of every row by itself, in order. `scaling`: s, for DoRA."""

    part: int
    maps: tuple[RowMap, ...]
    scaling: float | None = None


@dataclass(frozen=True)
class WholeStep:
    """One change of a weight, or of the bias beside it, by PEFT's own layer. `weight`: of a bias, the weight before this step."""

    part: int
    map: WholeWeight
    weight: "Change | None" = None
    scaling: float | None = None


Step = PairStep | RowStep | WholeStep


@dataclass(frozen=True)
class Change:
    """One stored tensor and what is done to it, in order. A bias is folded as a weight with one column.

    `blocks`: its rows, where they are in memory (`rows.held`).
    """

    tensor: StoredTensor
    steps: tuple[Step, ...]
    base_quant: BaseQuant | None
    base_dtype: Dtype | None = None
    blocks: tuple[torch.Tensor, ...] | None = None

    @property
    def columns(self) -> int:
        return self.tensor.shape[-1] if len(self.tensor.shape) in (2, 3) else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.tensor.shape) // self.columns

    def matrices(self) -> "Iterator[Change]":
        """Of a tensor [E, D, I] with a matrix for each expert that pairs change, or that has been in 4 bits, each matrix;
        else the change itself."""
        paired = any(isinstance(step, PairStep) for step in self.steps)
        if len(self.tensor.shape) != 3 or not (paired or self.base_quant):
            yield self
            return
        for expert, one in enumerate(self.tensor.matrices()):
            yield replace(self, tensor=one, steps=tuple(_of_expert(step, expert) for step in self.steps))

    def rows(self, piece_items: int) -> Iterator[torch.Tensor]:
        """The weight before the fold, in blocks of about `piece_items` values, or of the size they have in memory."""
        if self.blocks is not None:
            return iter(self.blocks)
        return read_rows(self.tensor, self.columns, piece_items, self.base_quant, self.base_dtype)


def _of_expert(step: Step, expert: int) -> Step:
    """The step on one expert's matrix."""
    if isinstance(step, PairStep) and step.pair.A.dim() == 3:
        return replace(step, pair=replace(step.pair, A=step.pair.A[expert], B=step.pair.B[expert]))
    if not isinstance(step, RowStep):
        return step
    maps = tuple(Replaced(one.values[expert]) if isinstance(one, Replaced) else one for one in step.maps)
    return replace(step, maps=maps)


@dataclass(frozen=True)
class FoldPlan:
    """A fold. `changes` by tensor name; `files` as they will be written; `config` is None where it stays as it is.

    `quantised`: the tensors that are read through `base_dtype` and `base_quant`, changed ones included. `conditions`: for
    --unmerge, the condition number κ of what is undone, by adapter and module. `untied`: head and embedding, which the base
    ties, come out apart. `stops`: ids at which the result stops, beside those at which the base does.
    """

    base: Base
    parts: tuple[Part, ...]
    unmerge: bool
    changes: dict[str, Change]
    base_quant: BaseQuant | None
    base_dtype: Dtype | None
    quantised: frozenset[str]
    conditions: dict[tuple[int, str], float]
    files: dict[str, tuple[TensorSpec, ...]]
    config: dict[str, Any] | None
    untied: bool
    stops: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return sum(spec.n_bytes for specs in self.files.values() for spec in specs)


def plan_fold(
    base: Base,
    adapters: Sequence[Adapter],
    *,
    scales: Sequence[float],
    kind: Kind | None = None,
    dtype: OutputDtype = "keep",
    keep_logit_scale: bool = False,
    layers: str | None = None,
    unmerge: bool = False,
    base_quant: BaseQuant | None = None,
    base_dtype: Dtype | None = None,
) -> FoldPlan:
    """Match adapters and base, and settle steps, dtypes and config. Raises UserError where anything is left over.

    `scales`: one factor an adapter, on its scaling. With `dtype` other than "keep", every floating-point tensor gets
    it. `layers` ('0:38') restricts what is folded. `unmerge` takes the adapters out again, last one first.
    """
    if unmerge and base_quant:
        raise UserError("--unmerge with --base-quant: rounding to 4 bits has no inverse. Leave one of them out.")
    if base_dtype and not base_quant:
        raise UserError("--base-dtype is of the weights that --base-quant rounds to 4 bits: give both, or --dtype.")
    alone = len(adapters) == 1
    settled_base, adapters, apart = settled(base, adapters, unmerge=unmerge)
    parts = tuple(
        match(settled_base, adapter, kind=kind, kind_is_meant=alone, scale=scale, layers=layers)
        for adapter, scale in zip(adapters, scales, strict=True)
    )
    apart = apart and any(touches(part.adapter) for part in parts)
    base = settled_base if apart else base
    quantised = quantised_weights(base) if base_quant else frozenset()
    steps, conditions = plan_steps(base, parts, unmerge)
    changes = {
        name: _read_through(Change(base.tensors[name], tuple(found), None), quantised, base_quant, base_dtype)
        for name, found in steps.items()
    }
    files = {
        name: tuple(TensorSpec(t.name, output_dtype(t.dtype, dtype), t.shape) for t in header.tensors)
        for name, header in base.headers.items()
    }
    config = new_config(base.config, dtype, logit_factor(parts, unmerge) if keep_logit_scale else 1.0, apart)
    learned = () if unmerge else (id for part in parts for id in part.adapter.stops)
    stops = tuple(id for id in dict.fromkeys(learned) if id not in stop_ids(base.folder))
    return FoldPlan(
        base, parts, unmerge, changes, base_quant, base_dtype, quantised, conditions, files, config, apart, stops
    )


def plan_steps(
    base: Base, parts: Sequence[Part], unmerge: bool
) -> tuple[dict[str, list[Step]], dict[tuple[int, str], float]]:
    """The steps of every changed tensor in the order of their effect, and the condition numbers of what is undone."""
    steps: dict[str, list[Step]] = {}
    conditions: dict[tuple[int, str], float] = {}
    amplified: dict[str, float] = {}
    replaced: dict[str, str] = {}
    for number, part in reversed(list(enumerate(parts))) if unmerge else enumerate(parts):
        if unmerge:
            stacked = part.adapter.stacks
            names = {m: stacked[m].weights[0] if m in stacked else f"{m}.weight" for m in part.modules}
            dtypes = {module: base.tensors[name].dtype for module, name in names.items()}
            found = check_invertible(part, dtypes, amplified)
            conditions |= {(number, module): value for module, value in found.items()}
            amplified |= {module: value * amplified.get(module, 1.0) for module, value in found.items()}
        for name, tensor in part.full.items():
            _check_replaced_once(name, part, replaced)
            steps.setdefault(name, []).append(RowStep(number, (Replaced(tensor),)))
        for module in part.modules:
            if whole := next((one for one in part.adapter.maps.get(module, ()) if isinstance(one, WholeWeight)), None):
                found_steps = _whole_steps(base, part, number, module, whole, tuple(steps.get(f"{module}.weight", ())))
            else:
                found_steps = list(_module_steps(base, part, number, module, unmerge))
            for name, step in found_steps:
                steps.setdefault(name, []).append(step)
    return steps, conditions


def _read_through(
    change: Change, quantised: frozenset[str], base_quant: BaseQuant | None, base_dtype: Dtype | None
) -> Change:
    """The change with its tensor, and the weight beside a bias, read through 4 bits where they are to be."""
    steps = tuple(
        replace(step, weight=_read_through(step.weight, quantised, base_quant, base_dtype))
        if isinstance(step, WholeStep) and step.weight is not None
        else step
        for step in change.steps
    )
    quant = base_quant if change.tensor.name in quantised else None
    return replace(change, steps=steps, base_quant=quant, base_dtype=base_dtype)


def _whole_steps(
    base: Base, part: Part, number: int, module: str, whole: WholeWeight, before: tuple[Step, ...]
) -> list[tuple[str, Step]]:
    """What PEFT's layer does to a module's weight and bias. `before`: the weight's steps until here."""
    weight, bias = base.tensors[f"{module}.weight"], base.tensors.get(f"{module}.bias")
    changes = LOCAL[whole.peft_type].changes
    found: list[tuple[str, Step]] = [] if changes == "bias" else [(weight.name, WholeStep(number, whole))]
    if changes == "weight":
        return found
    if bias is not None:
        _check_bias(bias, weight.shape[0])
        found.append((bias.name, WholeStep(number, whole, Change(weight, before, None))))
    elif changes == "bias":
        raise UserError(
            f"{part.adapter.folder}: a {whole.peft_type} adapter is a change of biases, and {base.folder} has no {module}.bias "
            "to take it, so PEFT cannot merge it either. Load it with PEFT."
        )
    return found


def _check_replaced_once(name: str, part: Part, replaced: dict[str, str]) -> None:
    """Raise UserError where a second adapter brings a tensor that was trained in full: one of them would be lost."""
    if name in replaced:
        raise UserError(
            f"{replaced[name]} and {part.adapter.folder} both have {name}, trained in full: one would take the other's "
            "place. Fold one of them alone, or leave it out of the other with --layers."
        )
    replaced[name] = str(part.adapter.folder)


def _module_steps(base: Base, part: Part, number: int, module: str, unmerge: bool) -> Iterator[tuple[str, Step]]:
    """What an adapter does to a module's weight and bias, or what undoes it, by the name of the tensor."""
    if module in part.adapter.stacks:
        yield from _expert_steps(base, part, number, module, unmerge)
        return
    bias = base.tensors.get(f"{module}.bias")
    if part.adapter.family:
        maps = scaled_maps([one for one in part.adapter.maps[module] if not isinstance(one, WholeWeight)], part.scale)
        if unmerge:
            maps = tuple(undone for one in reversed(maps) if (undone := one.undone()) is not None)
        s = next((one.scaling for one in maps if isinstance(one, Added)), None)
        yield f"{module}.weight", RowStep(number, maps, s)
        moves_bias = bool(FAMILIES[part.kind].bias_rule)
        on_bias = tuple(one for one in maps if isinstance(one, RowFactors)) if moves_bias else ()
        if bias is not None and on_bias:
            _check_bias(bias, base.tensors[f"{module}.weight"].shape[0])
            yield bias.name, RowStep(number, on_bias)
        return
    step = _pair_step(part, number, module, unmerge)
    yield f"{module}.weight", step
    if step.pair.bias is not None:
        if bias is None or step.kind != LORA:
            raise UserError(
                f"{part.adapter.folder}: lora_B of {module} has a bias, "
                + (
                    f"and {base.folder} has no {module}.bias to take it."
                    if bias is None
                    else "which only a LoRA can have."
                )
            )
        _check_bias(bias, len(step.pair.bias))
        moved = Pair(torch.ones(1, 1), step.pair.bias[:, None], step.pair.scaling, step.pair.origin)
        yield bias.name, replace(step, pair=moved)  # b + s·bias·1, additive
    if bias is not None and part.kind == MULTIPLICATIVE and part.adapter.moves_bias:
        _check_bias(bias, step.pair.B.shape[0])
        yield bias.name, step


def _expert_steps(base: Base, part: Part, number: int, module: str, unmerge: bool) -> Iterator[tuple[str, Step]]:
    """The same of a layer's experts: their matrices and vectors, each multiplied by the pair from the side of its outputs; or, of
    a LoRA, one tensor of all with a pair for each matrix."""
    stack, step = part.adapter.stacks[module], _pair_step(part, number, module, unmerge)
    if step.kind == LORA:
        yield stack.weights[0], step
        return
    by_rows = RowStep(number, (Multiplied(step.pair.A, step.pair.B, step.scaling),), step.scaling)
    for name in stack.weights:
        yield name, by_rows if stack.transposed else step
    for name in stack.biases:
        yield name, by_rows if len(base.tensors[name].shape) == 2 else step


def scaled_maps(maps: Sequence[RowMap], scale: float) -> tuple[RowMap, ...]:
    """A module's maps, with the part's scale on the one that has a strength."""
    return tuple(replace(one, scaling=one.scaling * scale) if isinstance(one, Added) else one for one in maps)


def _pair_step(part: Part, number: int, module: str, unmerge: bool) -> PairStep:
    """What an adapter does to a module's weight, or what undoes it: B̃ for B, or -s for s."""
    pair, scaling = part.pairs[module], part.scaling(module)
    kind: Kind = MULTIPLICATIVE if part.kind == MULTIPLICATIVE else LORA
    if not unmerge:
        return PairStep(number, kind, pair, scaling)
    if kind == MULTIPLICATIVE:
        return PairStep(number, kind, inverse(pair, scaling), scaling)
    return PairStep(number, kind, pair, -scaling)


def quantised_weights(base: Base) -> frozenset[str]:
    """The weights a QLoRA run here quantises that skips none: of every linear module of the decoder layers and of all
    experts, however these are stored; no head, embedding, norm or router.

    Raises UserError for weights that are not 16 or 32 bit.
    """
    found = [
        tensor
        for name, tensor in base.tensors.items()
        if layer_of(name) is not None
        and not is_router(name)
        and (
            (len(tensor.shape) == 2 and name.endswith(".weight")) or (len(tensor.shape) == 3 and min(tensor.shape) > 1)
        )
    ]
    if strange := next((tensor for tensor in found if tensor.dtype not in FOLDABLE), None):
        raise UserError(
            f"--base-quant: {strange.name} is stored as {strange.dtype}; {', '.join(FOLDABLE)} can be rounded."
        )
    if not found:
        raise UserError(f"--base-quant: {base.folder} has no linear modules in numbered layers.")
    return frozenset(tensor.name for tensor in found)


def read_rows(
    tensor: StoredTensor, columns: int, piece_items: int, base_quant: BaseQuant | None, base_dtype: Dtype | None
) -> Iterator[torch.Tensor]:
    """A stored float tensor as [rows, columns] blocks: as it is, or after 4 bits and back (from `base_dtype`, in that)."""
    if base_quant is None:
        return read_floats(tensor, columns, piece_items)
    held = DTYPES[base_dtype] if base_dtype else None
    return read_nf4(tensor, columns, piece_items, double_quant=base_quant == "nf4-double", held=held)


def output_dtype(stored: str, dtype: OutputDtype) -> str:
    """The safetensors dtype a tensor of dtype `stored` has after the fold."""
    return stored if dtype == "keep" or stored not in FLOATS else code_of(dtype)


def _check_bias(bias: StoredTensor, length: int) -> None:
    if bias.dtype not in FOLDABLE or bias.shape != (length,):
        raise UserError(f"{bias.name} is {bias.dtype} {bias.shape}; the fold needs a float vector of {length}.")
