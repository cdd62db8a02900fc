"""The additive form of an adapter: the pair (A', B') that every LoRA reader applies as y = W·x + b + s·B'·A'·x.

Takes a `Base` and an `Adapter`; gives an `AdditiveForm`, from which A' and B' of one module at a time are computed in
fp32. W' = W + s·B·M (see `fold_rows`), so A' = M and B' = B: A' = A·W for a multiplicative adapter, A' = A for an
additive one. No weight but the targets' is read, and of an additive adapter's base none.

A reader's file has one rank R and one alpha, and s = alpha / R. (vLLM knows no other; PEFT and llama.cpp do, each in
its own way.) Where an adapter's modules differ, A' and B' are filled up with zeros to the largest rank, which changes
nothing, and B' takes the quotient of the scalings, which is one more rounding.

On a module with a bias a multiplicative adapter moves that too: (I + s·B·A)(W·x + b) = W'·x + b + s·c, c = B·A·b.
c is no product of x with anything, so whether it can be written depends on the format.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.artifacts.adapter.stored_form import as_matrix, is_transposed, places
from pipeline.artifacts.fold.plan import Change, PairStep, plan_fold
from pipeline.artifacts.fold.rows import BLOCK_ITEMS, compose, round_to
from pipeline.artifacts.fold.ties import settled
from pipeline.artifacts.fold.warnings import warnings_of
from pipeline.console import UserError
from pipeline.families import FAMILIES, KINDS, MULTIPLICATIVE, Kind
from pipeline.formats.base_model import Base
from pipeline.formats.choices import BaseQuant, Dtype
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.safetensors import StoredTensor, read_floats
from pipeline.formats.stored_names import Place
from pipeline.names import is_embedding


@dataclass(frozen=True)
class Target:
    """One module: what a fold would do to its weight [D_out, D_in], and B' / B.

    `constant`: c = B·A·b [D_out], fp64, times `factor`; None where the module's bias is not moved.
    """

    module: str
    change: Change
    step: PairStep
    factor: float
    constant: torch.Tensor | None

    @property
    def weight(self) -> StoredTensor:
        return self.change.tensor

    @property
    def rank(self) -> int:
        return self.step.pair.A.shape[0]


@dataclass(frozen=True)
class AdditiveForm:
    """An adapter in its additive form: A' [R, D_in], B' [D_out, R] of every target, with one R and one s for all.

    `dtype` is the safetensors dtype they are written in; `warnings` are for the user. `full`: what was trained in
    full beside the adapter, by its name in the model, in its own dtype; `tied`: names that are copies of one of them.
    """

    kind: Kind
    targets: tuple[Target, ...]
    rank: int
    scaling: float
    dtype: str
    warnings: tuple[str, ...]
    full: dict[str, torch.Tensor]
    tied: dict[str, str]

    @property
    def alpha(self) -> float:
        """What is divided by the rank to give s."""
        return self.scaling * self.rank

    @property
    def n_bytes(self) -> int:
        items = sum(self.rank * sum(target.weight.shape) for target in self.targets)
        return items * FLOATS[self.dtype].itemsize + sum(
            self.full[name].nbytes for name in [*self.full, *self.tied.values()]
        )


def additive_form(
    base: Base,
    adapter: Adapter,
    *,
    kind: Kind | None,
    dtype: str,
    base_quant: BaseQuant | None = None,
    base_dtype: Dtype | None = None,
) -> AdditiveForm:
    """Match the adapter with the base and settle rank, scaling and constants. `kind`, `base_quant` and `base_dtype` as for
    `plan_fold`: with these A' = A·W₄, which beside a base that is served in 4 bits is what was trained.

    Biases of the targets are read here, weights are not. Raises UserError where an adapter module has no weight in the
    base or another shape, or where the adapter's kind has no additive form.
    """
    if adapter.experts:
        raise UserError(
            f"{adapter.folder} changes the experts of {len(adapter.experts)} layers ({next(iter(adapter.experts))}): an additive "
            "form would need an A' = A·W of each expert, for which no file that servers read has a place. Fold it "
            "(merge_lora.py)."
        )
    plan = plan_fold(base, [adapter], scales=[1.0], kind=kind, base_quant=base_quant, base_dtype=base_dtype)
    found = next((kind for kind in KINDS if kind == plan.parts[0].kind and FAMILIES[kind].additive), None)
    if found is None:
        raise UserError(
            f"{adapter.folder} is a {plan.parts[0].kind} adapter, and no sum W + s·B·A with a small A "
            "and B. Fold it (merge_lora.py), or load it with PEFT."
        )
    if found == MULTIPLICATIVE and (across := [m for m in adapter.modules if is_transposed(base, m)]):
        raise UserError(
            f"{base.folder} stores {across[0]} transposed (Conv1D): of a multiplicative adapter there no additive form is made. "
            "Fold it (merge_lora.py)."
        )
    scaling = max((pair.scaling for pair in adapter.pairs.values()), key=abs)
    base, (alone,), _ = settled(base, [adapter])
    full, tied = _full(adapter, alone)
    where = places(base, [f"{module}.weight" for module in adapter.modules])
    targets = []
    for module, pair in adapter.pairs.items():
        factor, place = pair.scaling / scaling, where[f"{module}.weight"]
        step = PairStep(0, found, pair, pair.scaling)
        quant = base_quant if place.tensor in plan.quantised else None
        change = Change(as_matrix(base, place, module), (step,), quant, base_dtype)
        bias = _moved_bias(base, place) if found == MULTIPLICATIVE and adapter.moves_bias else None
        constant = None if bias is None else _constant(bias, step, factor)
        targets.append(Target(module, change, step, factor, constant))
    rank = max(target.rank for target in targets)
    return AdditiveForm(found, tuple(targets), rank, scaling, dtype, tuple(warnings_of(plan)), full, tied)


def _full(adapter: Adapter, alone: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What was trained in full, and the copies of a tied head. Raises UserError where it is not of whole modules of their
    own, which is what a reader can put in the place of the base's.

    `alone`: the adapter without copies of a head or embedding.
    """
    full = alone.full
    for name in full:
        module = name.rpartition(".")[0]
        if module in adapter.modules or f"{module}.weight" not in full:
            raise UserError(
                f"{adapter.folder}: {name} was trained in full, without the rest of its module. No file of adapters "
                "has a place for that. Fold it (merge_lora.py)."
            )
    copies = [name for name in adapter.full if name not in full and name not in adapter.copied]
    source = next((name for name in full if is_embedding(name.removesuffix(".weight"))), "")
    return full, dict.fromkeys(copies, source)


def _moved_bias(base: Base, place: Place) -> StoredTensor | None:
    """The bias [D_out] of the module whose weight is at `place`."""
    name = f"{place.tensor.removesuffix('.weight')}.bias"
    return as_matrix(base, replace(place, tensor=name), "") if name in base.tensors else None


def lora_A(form: AdditiveForm, target: Target, device: torch.device) -> torch.Tensor:
    """A' [R, D_in] on the CPU in the form's dtype, computed in fp32 from W in blocks of rows.

    Raises UserError where a value is NaN or infinite, or too large for the dtype.
    """
    exact = compose([target.step], partial(target.change.rows, BLOCK_ITEMS), device).M
    padded = torch.nn.functional.pad(exact, (0, 0, 0, form.rank - target.rank))
    return _rounded(padded, form.dtype, f"A' of {target.module}")


def lora_B(form: AdditiveForm, target: Target) -> torch.Tensor:
    """B' [D_out, R] on the CPU in the form's dtype. Raises as `lora_A`."""
    exact = target.step.pair.B.to("cpu", torch.float32) * target.factor
    padded = torch.nn.functional.pad(exact, (0, form.rank - target.rank))
    return _rounded(padded, form.dtype, f"B' of {target.module}")


def lora_B_bias(form: AdditiveForm, target: Target) -> torch.Tensor:
    """c [D_out] on the CPU in the form's dtype, zeros where no bias moves. Raises as `lora_A`."""
    rows = target.weight.shape[0]
    exact = torch.zeros(rows) if target.constant is None else target.constant
    return _rounded(exact, form.dtype, f"B·A·b of {target.module}")


def _constant(bias: StoredTensor, step: PairStep, factor: float) -> torch.Tensor | None:
    """factor · B·A·b in fp64, or None where it is zero (some families store biases that are all zeros)."""
    b = torch.cat(list(read_floats(bias, 1, BLOCK_ITEMS))).double()
    constant = (step.pair.B.double() @ (step.pair.A.double() @ b)).flatten() * factor
    return constant if bool((constant != 0).any()) else None


def _rounded(values: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise UserError(
            f"{name} holds NaN or infinite values: the base's weight does, or overflows. Nothing was written."
        )
    return round_to(values, dtype, name).cpu().contiguous()
