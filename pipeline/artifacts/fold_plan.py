"""What a fold will do, decided before anything is written.

Takes a `Base` and an `Adapter`; gives a `FoldPlan`: which tensors change and by what, which dtype each tensor has
afterwards, and the new config. Every pair of the adapter has exactly one weight, and every shape fits, or the plan is
refused with the names.
"""

import copy
import difflib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from pipeline.artifacts.adapter_files import Adapter, Kind, Pair
from pipeline.artifacts.base_files import Base
from pipeline.artifacts.safetensors_stream import FLOATS, StoredTensor, TensorSpec
from pipeline.console import UserError

OutputDtype = Literal["keep", "bfloat16", "float16", "float32"]
OUTPUT_DTYPES: tuple[OutputDtype, ...] = get_args(OutputDtype)
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FOLDABLE = ("BF16", "F16", "F32")

# Where a family keeps the factor of its logits, and whether it multiplies (1) or divides (-1) them.
LOGIT_KEYS = {
    "cohere": ("logit_scale", 1), "cohere2": ("logit_scale", 1), "cohere2_moe": ("logit_scale", 1),
    "granite": ("logits_scaling", -1), "granitemoe": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1), "granitemoehybrid": ("logits_scaling", -1),
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One stored tensor and the pair that changes it. A bias is folded as a weight with one column."""

    tensor: StoredTensor
    pair: Pair
    scaling: float

    @property
    def columns(self) -> int:
        return self.tensor.shape[1] if len(self.tensor.shape) == 2 else 1


@dataclass(frozen=True)
class FoldPlan:
    """A fold: `changes` by tensor name; `files` as they will be written; `config` is None where it stays as it is."""

    base: Base
    kind: Kind
    changes: dict[str, Change]
    files: dict[str, tuple[TensorSpec, ...]]
    config: dict[str, Any] | None

    @property
    def weight_bytes(self) -> int:
        return sum(spec.n_bytes for specs in self.files.values() for spec in specs)


def plan_fold(
    base: Base,
    adapter: Adapter,
    *,
    kind: Kind | None = None,
    scale: float = 1.0,
    dtype: OutputDtype = "keep",
    keep_logit_scale: bool = False,
) -> FoldPlan:
    """Match adapter and base, and settle kind, dtypes and config. Raises UserError where anything is left over.

    `scale` multiplies the adapter's scaling. With `dtype` other than "keep", every floating-point tensor gets it.
    """
    weights = _match(base, adapter)
    kind = resolve_kind(adapter, weights, kind)
    changes = {}
    for module, pair in adapter.pairs.items():
        scaling = pair.scaling * scale
        changes[weights[module].name] = Change(weights[module], pair, scaling)
        bias = base.tensors.get(f"{module}.bias")
        if bias is not None and kind == "multiplicative_lora" and adapter.moves_bias:
            _check_bias(bias, pair)
            changes[bias.name] = Change(bias, pair, scaling)
    files = {
        name: tuple(TensorSpec(t.name, output_dtype(t.dtype, dtype), t.shape) for t in header.tensors)
        for name, header in base.headers.items()
    }
    factor = adapter.train_logit_scale if keep_logit_scale else 1.0
    return FoldPlan(base, kind, changes, files, new_config(base.config, dtype, factor))


def output_dtype(stored: str, dtype: OutputDtype) -> str:
    """The safetensors dtype a tensor of dtype `stored` has after the fold."""
    return stored if dtype == "keep" or stored not in FLOATS else DTYPE_NAMES[dtype]


def _match(base: Base, adapter: Adapter) -> dict[str, StoredTensor]:
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


def resolve_kind(adapter: Adapter, weights: dict[str, StoredTensor], asked: Kind | None) -> Kind:
    """The adapter's kind: as its files declare it, or by the shape of A against its modules' weights [D_out, D_in].

    A is R × D_in in an ordinary LoRA and R × D_out in the founding method's, which also calls itself LORA. All modules
    must agree; where every weight is square the shapes cannot tell, and `asked` must.
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
    return possible.pop()


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


def _check_bias(bias: StoredTensor, pair: Pair) -> None:
    if bias.dtype not in FOLDABLE or bias.shape != (pair.B.shape[0],):
        raise UserError(
            f"{bias.name} is {bias.dtype} {bias.shape}; the fold needs a float vector of {pair.B.shape[0]}."
        )


def _shape(tensor: torch.Tensor | StoredTensor) -> str:
    return " × ".join(str(n) for n in tensor.shape)


def new_config(config: dict[str, Any], dtype: OutputDtype, logit_factor: float) -> dict[str, Any] | None:
    """The model's config after the fold, or None where it stays as it is.

    A changed dtype is written wherever the config or one of its parts names one; `logit_factor` multiplies the logits.
    Raises UserError where the family has no key for such a factor.
    """
    changed = copy.deepcopy(config)
    if dtype != "keep" and not _set_dtype(changed, dtype):
        changed["torch_dtype"] = dtype  # the older name of the key: old and new readers know it
    if logit_factor != 1.0:
        key, exponent = LOGIT_KEYS.get(config.get("model_type", ""), ("", 0))
        if not isinstance(config.get(key), int | float):
            raise UserError(
                f"--keep-logit-scale: a {config.get('model_type')!r} config has no key that scales the logits, so the "
                f"factor {logit_factor:g} of the training cannot be kept in it. Fold without the flag: it is dropped."
            )
        changed[key] = config[key] * logit_factor**exponent
    return changed if changed != config else None


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Replace float dtypes in `config` and its sub-configs; whether the top level named one."""
    found = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key], found = dtype, True
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
    return found
