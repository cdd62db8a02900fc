"""Which base weights are quantised, and what that takes: known before a weight is read.

Takes a model on `meta` and a `Scheme`; puts a `QuantizedPlaceholder` in the place of every linear layer whose weight is to
be quantised. It computes as a linear layer does, so that the planner can count it, and knows the bytes it will take.
`quantized_bnb.put_in` replaces it by bitsandbytes' layer; bitsandbytes itself is not needed here.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from pipeline import patterns
from pipeline.console import UserError
from pipeline.formats.dtypes import dtype_name
from pipeline.formats.nf4 import ABSMAX_BLOCK, BLOCK

# Of a mixture of experts: small, and a rounding there sends tokens elsewhere. qlora-pipe leaves out `gate` too.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


class Scheme(NamedTuple):
    """How base weights are quantised. `quant_type` ('nf4', 'fp4'), `double_quant` and `compute_dtype` are of 4 bits,
    `outlier_threshold` (LLM.int8(), Dettmers et al. 2022, §3.2; an input's magnitude) of 8."""

    bits: int
    quant_type: str
    double_quant: bool
    compute_dtype: torch.dtype
    outlier_threshold: float
    skip: tuple[str, ...]  # modules left alone: the beginning or end of a name, or a regular expression

    def __str__(self) -> str:
        if self.bits == 8:
            return "8-bit (LLM.int8())"
        double = ", its scales quantised too" if self.double_quant else ""
        return f"4-bit {self.quant_type}{double}, computing in {dtype_name(self.compute_dtype)}"

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


class QuantizedPlaceholder(nn.Linear):
    """A linear layer whose weight will be quantised: on `meta`, with the shapes of before."""

    def __init__(self, plain: nn.Linear, scheme: Scheme) -> None:
        has_bias = plain.bias is not None
        super().__init__(plain.in_features, plain.out_features, has_bias, device="meta", dtype=plain.weight.dtype)
        self.scheme = scheme

    @property
    def saved_bytes(self) -> int:
        """By which the packed weight is smaller."""
        plain = self.weight.numel() * self.weight.element_size()
        return plain - self.scheme.packed_bytes(self.out_features, self.in_features)


def saved_bytes(module: nn.Module) -> int:
    """By which the weights of `module` will be smaller than its parameters on `meta` say."""
    return sum(part.saved_bytes for part in module.modules() if isinstance(part, QuantizedPlaceholder))


def dequantised_bytes(module: nn.Module) -> int:
    """Of the largest weight in `module` that will be quantised, in the form in which it is multiplied: alive in a product."""
    foreseen = [part for part in module.modules() if isinstance(part, QuantizedPlaceholder)]
    return max((part.weight.numel() * part.scheme.compute_dtype.itemsize for part in foreseen), default=0)


def dequantising_traffic(module: nn.Module) -> tuple[int, int]:
    """Bytes read and written to unpack the weights of `module` for their products: of one forward, of one backward.

    4 bits are unpacked for both, 8 bits for backward only: their forward multiplies the codes.
    """
    forward = backward = 0
    for part in (part for part in module.modules() if isinstance(part, QuantizedPlaceholder)):
        codes = part.scheme.packed_bytes(part.out_features, part.in_features)
        unpacked = part.weight.numel() * part.scheme.compute_dtype.itemsize
        backward += codes + unpacked
        forward += codes + unpacked if part.scheme.bits == 4 else 0
    return forward, backward


def put_placeholders(model: PreTrainedModel, scheme: Scheme) -> list[str]:
    """Put a `QuantizedPlaceholder` for every linear layer of the decoder layers that `scheme` quantises; returns their names.

    The embedding, the head and a mixture's routers stay as they are. UserError for a name in `skip` that no module has,
    and for a model most of whose weights are in no linear layer (experts stacked in one tensor).
    """
    prefix = f"{model.base_model_prefix}.layers."
    linear = [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and type(module) is nn.Linear and name.rpartition(".")[2] not in ROUTERS
    ]
    _check_model(model, linear)
    skip = [*scheme.skip, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    _check_skip(model, scheme.skip)
    chosen = [name for name in linear if should_convert_module(name, skip)]
    if not chosen:
        raise UserError(f"llm_int8_skip_modules = {list(scheme.skip)} leaves nothing to quantise")
    for name in chosen:
        plain: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        model.set_submodule(name, QuantizedPlaceholder(plain, scheme))
    return chosen


def _check_model(model: PreTrainedModel, linear: list[str]) -> None:
    layers = model.base_model.layers
    within = sum(model.get_submodule(name).weight.numel() for name in linear)  # type: ignore[operator,union-attr]
    if within < sum(p.numel() for p in layers.parameters()) / 2:
        name, largest = max(layers.named_parameters(), key=lambda named: named[1].numel())
        raise UserError(
            f"quantization: most weights of model_type '{model.config.model_type}' are not in linear layers but in tensors "
            f"such as {name} {list(largest.shape)}, which bitsandbytes cannot quantise; remove [quantization]"
        )


def _check_skip(model: PreTrainedModel, skip: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules()]
    for pattern in skip:
        for name in names:  # a UserError where one takes too long: transformers, which is asked below, knows no limit
            patterns.matches(pattern, name, "llm_int8_skip_modules")
        if all(should_convert_module(name, [pattern]) for name in names if name):
            raise UserError(
                f"llm_int8_skip_modules: the model has no module '{pattern}'; a layer's are "
                f"{', '.join(n for n, m in model.base_model.layers[0].named_modules() if isinstance(m, nn.Linear))}"
            )
