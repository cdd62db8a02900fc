"""Which base weights are quantised, and what that takes: known before a weight is read.

Takes a model on `meta` and a `Scheme`; puts a `QuantizedPlaceholder` in the place of every linear layer whose weight is to
be quantised, and marks parameters that hold a matrix for each expert. Both compute as before, so that the planner can count
them, and the bytes that they will take are known. `quantized_bnb.put_in` puts bitsandbytes' layers and packers in their
places; bitsandbytes itself is not needed here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from pipeline import patterns
from pipeline.console import UserError
from pipeline.formats.choices import RunQuant
from pipeline.formats.dtypes import DTYPES, dtype_name
from pipeline.formats.nf4 import ABSMAX_BLOCK, BLOCK
from pipeline.kernels.packed_experts import PackedExperts
from pipeline.model.structure.parts import casts_to_weight, layers_of_model, parts_of, reads_weight
from pipeline.model.tiny_copy import NoCopyError, tiny_copy, token_ids
from pipeline.names import ROUTERS

MARK = "quantised_parameters"  # attribute of a module: {name of a parameter of all experts: QuantizedExperts}


class Scheme(NamedTuple):
    """How base weights are quantised. `quant_type` ('nf4', 'fp4'), `double_quant` and `compute_dtype` are of 4 bits,
    `outlier_threshold` (LLM.int8(), Dettmers et al. 2022, §3.2; an input's magnitude) of 8."""

    bits: int
    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype
    outlier_threshold: float
    skip: tuple[str, ...]  # modules left alone: the beginning or end of a name, or a regular expression

    @classmethod
    def from_bnb(cls, settings: Mapping[str, Any], dtype: torch.dtype) -> "Scheme":
        """As bitsandbytes' keys have it (load_in_4bit, bnb_4bit_quant_type, …). `dtype`: of products, where they do not say."""
        compute = settings["bnb_4bit_compute_dtype"]
        return cls(
            bits=4 if settings["load_in_4bit"] else 8,
            quant_type=settings["bnb_4bit_quant_type"],
            double_quant=settings["bnb_4bit_use_double_quant"],
            compute_dtype=DTYPES[compute] if compute else dtype,
            outlier_threshold=settings["llm_int8_threshold"],
            skip=tuple(settings["llm_int8_skip_modules"]),
        )

    def __str__(self) -> str:
        if self.bits == 8:
            return "8-bit (LLM.int8())"
        double = ", its scales quantised too" if self.double_quant else ""
        return f"4-bit {self.quant_type}{double}, computing in {dtype_name(self.compute_dtype)}"

    @staticmethod
    def named(name: RunQuant, compute_dtype: torch.dtype) -> "Scheme":
        """What a command line calls so, with the defaults of [quantization.bnb] (config/tables.Bnb)."""
        return Scheme(8 if name == "int8" else 4, "nf4", name == "nf4-double", compute_dtype, 6.0, ())

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Of a weight [rows, columns]: codes, scales and tables as bitsandbytes stores them."""
        if self.bits == 8:
            return rows * columns + 4 * rows
        scales = -(-rows * columns // BLOCK)
        packed, table = -(-rows * columns // 2), 4 * 16
        if not self.double_quant:
            return packed + table + 4 * scales
        return packed + table + scales + 4 * (-(-scales // ABSMAX_BLOCK) + 256 + 1)


@runtime_checkable
class PackedLinear(Protocol):
    """A layer that stores its weight in another form than it is given."""

    def pack(self, weight: Tensor) -> nn.Parameter:
        """The parameter for `weight` [D_out, D_in], on its device."""
        ...


class QuantizedExperts(NamedTuple):
    """Marks a parameter of all experts [E, rows, columns] as one that is, or will be, quantised, each matrix by itself.

    `pack` takes one expert's matrix in the pieces that lie one below the other in it and gives what unpacks it; None on `meta`.
    """

    scheme: Scheme
    pack: Callable[[Sequence[Tensor]], Callable[[], Tensor]] | None = None


class Quantised(NamedTuple):
    """A weight that will be quantised: bytes as it is on `meta` and packed, numbers in it and in its largest matrix."""

    plain: int
    packed: int
    numbers: int
    largest: int
    scheme: Scheme


class QuantizedPlaceholder(nn.Linear):
    """A linear layer whose weight will be quantised: on `meta`, with the shapes of before."""

    def __init__(self, plain: nn.Linear, scheme: Scheme) -> None:
        has_bias = plain.bias is not None
        super().__init__(plain.in_features, plain.out_features, has_bias, device="meta", dtype=plain.weight.dtype)
        self.scheme = scheme


def _foreseen(module: nn.Module) -> Iterator[Quantised]:
    """The weights of `module` that will be quantised; the experts in one parameter are one of them."""
    for part in module.modules():
        if isinstance(part, QuantizedPlaceholder):
            packed, n = part.scheme.packed_bytes(part.out_features, part.in_features), part.weight.numel()
            yield Quantised(n * part.weight.element_size(), packed, n, n, part.scheme)
        for name, mark in marked(part).items():
            if (weight := part._parameters.get(name)) is not None:
                experts, rows, columns = weight.shape
                packed, n = experts * mark.scheme.packed_bytes(rows, columns), weight.numel()
                yield Quantised(n * weight.element_size(), packed, n, rows * columns, mark.scheme)


def marked(module: nn.Module) -> dict[str, QuantizedExperts]:
    """The marked parameters of this module itself, by name."""
    return getattr(module, MARK, {})


def marked_within(module: nn.Module) -> list[str]:
    """The names of all marked parameters in `module`."""
    return [f"{name}.{leaf}" for name, part in module.named_modules() for leaf in marked(part)]


def is_packed(module: nn.Module) -> bool:
    """Whether weights in `module` are, or will be, quantised."""
    return any(isinstance(part, PackedLinear | QuantizedPlaceholder) or marked(part) for part in module.modules())


def saved_bytes(module: nn.Module) -> int:
    """By which the weights of `module` will be smaller than its parameters on `meta` say."""
    return sum(weight.plain - weight.packed for weight in _foreseen(module))


def dequantised_bytes(module: nn.Module) -> int:
    """Of the largest weight in `module` that will be quantised, in the form in which it is multiplied: alive in a product.
    Of experts it is one expert's."""
    return max((weight.largest * weight.scheme.compute_dtype.itemsize for weight in _foreseen(module)), default=0)


def dequantising_traffic(module: nn.Module) -> tuple[int, int]:
    """Bytes read and written to unpack the weights of `module` for their products: of one forward, of one backward.

    4 bits are unpacked for both, 8 bits for backward only: their forward multiplies the codes. Experts are unpacked for both;
    each is counted, as with many tokens each has some.
    """
    forward = backward = 0
    for weight in _foreseen(module):
        both = weight.packed + weight.numbers * weight.scheme.compute_dtype.itemsize
        backward += both
        forward += both if weight.scheme.bits == 4 or weight.largest < weight.numbers else 0
    return forward, backward


def put_placeholders(model: PreTrainedModel, scheme: Scheme) -> list[str]:
    """Put a `QuantizedPlaceholder` for every linear layer of the decoder layers that `scheme` quantises, and mark parameters
    of all experts; returns the names of both.

    The embedding, the head and a mixture's routers stay as they are. UserError for a name in `skip` that no module has,
    and for a model most of whose weights are in neither.
    """
    prefix = f"{parts_of(model).layers}."
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and type(module) is nn.Linear and _is_called(model, name)
    ]
    stacked = [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(prefix) and parameter.dim() == 3 and min(parameter.shape) > 1
    ]
    _check_model(model, [*(f"{name}.weight" for name in linear), *stacked])
    skip = [*scheme.skip, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    _check_skip(model, scheme.skip)
    chosen = [name for name in linear if should_convert_module(name, skip)]
    experts = [n for n in stacked if all(should_convert_module(one, skip) for one in (n, n.rpartition(".")[0]))]
    if not chosen and not experts:
        raise UserError(f"llm_int8_skip_modules = {list(scheme.skip)} leaves nothing to quantise")
    for name in chosen:
        plain: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        model.set_submodule(name, QuantizedPlaceholder(plain, scheme))
    for name in experts:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, MARK, {**marked(owner), leaf: QuantizedExperts(scheme)})
    return chosen + experts


def pack_in_place(
    owner: nn.Module, name: str, unpacks: Sequence[Callable[[], Tensor]], dtype: torch.dtype, device: torch.device
) -> None:
    """Put packed experts in the place of the parameter `name` of `owner`, and have its code take one expert after the other."""
    shape = owner._parameters.pop(name).shape  # type: ignore[union-attr]
    setattr(owner, name, PackedExperts(unpacks, shape, dtype, device))
    if (config := getattr(owner, "config", None)) is not None and hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


@torch.no_grad()
def check_experts(config: PretrainedConfig, names: Collection[str]) -> None:
    """UserError where the model's own code does not compute the same with packed experts in the place of the parameters
    `names`: tried on a tiny copy, whose experts are packed as they are."""
    try:
        model, _ = tiny_copy(config)
    except NoCopyError as error:
        raise UserError(
            f"quantization: no tiny copy of model_type '{config.model_type}' can be run to try out packed experts ({error}); "
            "leave them out with llm_int8_skip_modules = ['experts']"
        ) from error
    stacked = {name: p for name, p in model.named_parameters() if name in names}
    if len(stacked) < len(names):
        raise UserError(
            f"quantization: a tiny copy of model_type '{config.model_type}' has no {min(set(names) - set(stacked))} to try out"
        )
    for config_ in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if hasattr(config_, "_experts_implementation"):
            config_._experts_implementation = "eager"
    expected = model(input_ids=token_ids(), use_cache=False).logits
    for name, parameter in stacked.items():
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        pack_in_place(
            owner,
            leaf,
            [partial(torch.Tensor.detach, matrix) for matrix in parameter],
            parameter.dtype,
            parameter.device,
        )
    try:
        found = model(input_ids=token_ids(), use_cache=False).logits
        why = (
            None
            if torch.allclose(found, expected, rtol=0, atol=float(2**-18 * expected.abs().max()))
            else "other logits"
        )
    except Exception as error:  # whatever the model's code does with a parameter
        why = str(error)
    if why:
        raise UserError(
            f"quantization: experts of model_type '{config.model_type}' cannot be quantised ({why}); leave them out with "
            "llm_int8_skip_modules = ['experts']"
        )


def _is_called(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is called, and none of those whose weight the model's code reads, or that only choose."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    return leaf not in ROUTERS and not reads_weight(parent, leaf) and not casts_to_weight(parent, leaf)


def _check_model(model: PreTrainedModel, quantisable: list[str]) -> None:
    layers = layers_of_model(model)
    within = sum(model.get_parameter(name).numel() for name in quantisable)
    if within < sum(p.numel() for p in layers.parameters()) / 2:
        name, largest = max(layers.named_parameters(), key=lambda named: named[1].numel())
        raise UserError(
            f"quantization: most weights of model_type '{model.config.model_type}' are neither in linear layers nor in experts "
            f"but in tensors such as {name} {list(largest.shape)}, which are not quantised; remove [quantization]"
        )


def _check_skip(model: PreTrainedModel, skip: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        for name in names:  # a UserError where one takes too long: transformers, which is asked below, knows no limit
            patterns.matches(pattern, name, "llm_int8_skip_modules")
        if all(should_convert_module(name, [pattern]) for name in names if name):
            raise UserError(
                f"llm_int8_skip_modules: the model has no module '{pattern}'; a layer's are "
                f"{', '.join(n for n, m in layers_of_model(model)[0].named_modules() if isinstance(m, nn.Linear))}"
            )
