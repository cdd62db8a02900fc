"""Quantised base weights: bitsandbytes' 4-bit and 8-bit linear layers, filled one tensor at a time.

Takes a stage on `meta` in which `quantized.put_placeholders` has marked the layers; puts bitsandbytes' layers in their place.
`weights.load` then hands each its weight as soon as that is read, in 16 bits on the device, and keeps what `pack` returns:
of the 16-bit model no more than one tensor is alive at a time.

Importing this imports bitsandbytes, so it is imported where a base is quantised, and nowhere else.
"""

import logging
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from pipeline.model.quantized import MARK, QuantizedPlaceholder, Scheme, marked
from pipeline.model.stage import Stage

# It says at every product in 8 bits that the input is rounded to float16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Linear4bit(bnb.nn.Linear4bit):
    """x·Wᵀ with W in 4 bits (QLoRA, Dettmers et al. 2023, eq. 5); nothing is kept for backward but W itself.

    x [..., D_in] → [..., D_out], in x's dtype.
    """

    def __init__(self, like: QuantizedPlaceholder) -> None:
        scheme = like.scheme
        super().__init__(
            like.in_features,
            like.out_features,
            like.bias is not None,
            scheme.compute_dtype,
            compress_statistics=scheme.double_quant,
            quant_type=scheme.quant_type,
            device="meta",
        )
        # On processors with AVX512-BF16 bitsandbytes 0.50.2 repacks the weight at the first forward in eval mode, to bf16
        # scales, and what dequantises it later (backward) reads the new form as the old.
        self.support_avx512bf16_for_cpu = False

    def pack(self, weight: Tensor) -> nn.Parameter:
        """`weight` [D_out, D_in], bf16 or fp32, as 4-bit codes uint8 [D_out·D_in / 2, 1] with their scales."""
        empty: Any = self.weight
        parameter = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=empty.compress_statistics,
            quant_type=empty.quant_type,
            module=self,
        )
        return parameter.to(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.weight.quant_state  # type: ignore[union-attr]
        if x.device.type == "cpu" and self.in_features % state.blocksize:
            return _Product4bit.apply(x, self)  # type: ignore[no-any-return]
        return super().forward(x)  # type: ignore[no-any-return]


class _Product4bit(torch.autograd.Function):
    """x·Wᵀ, forward and backward in the layer's compute dtype, with W as `dequantised` gives it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        x = x.to(layer.compute_dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, _matrix(layer, x.dtype), bias).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.to(ctx.layer.compute_dtype)
        return (gradient @ _matrix(ctx.layer, gradient.dtype)).to(ctx.dtype), None


def _matrix(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    weight: Any = layer.weight
    return dequantised(weight.data, weight.quant_state).to(dtype)


def dequantised(codes: Tensor, state: Any) -> Tensor:
    """The matrix that these codes stand for, in the dtype it was quantised from.

    It is unpacked as one row: on processors with AVX512 bitsandbytes 0.50.2 takes wrong scales for a matrix whose rows are no
    multiple of a block, though blocks run over the ends of rows.
    """
    flat = copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return bnb.functional.dequantize_4bit(codes, flat).view(state.shape)


class Linear8bit(bnb.nn.Linear8bitLt):
    """x·Wᵀ with W in 8 bits and one scale a row (LLM.int8(), Dettmers et al. 2022, eq. 3 and 8).

    x [..., D_in] → [..., D_out], in x's dtype. bitsandbytes' own function holds on to x for backward where checkpointing
    does not see it, so a recomputed layer would keep it all the same; a frozen W needs nothing but itself.
    """

    def __init__(self, like: QuantizedPlaceholder) -> None:
        super().__init__(
            like.in_features,
            like.out_features,
            like.bias is not None,
            has_fp16_weights=False,
            threshold=like.scheme.outlier_threshold,
            device="meta",
        )

    def pack(self, weight: Tensor) -> nn.Parameter:
        """`weight` [D_out, D_in] as int8 codes of the same shape with an fp32 scale for each row."""
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)

    def forward(self, x: Tensor) -> Tensor:
        return _Product8bit.apply(x, self)  # type: ignore[no-any-return]


class _Product8bit(torch.autograd.Function):
    """`Linear8bitLt` forward; backward through W = codes · scales / 127, in x's dtype, as bitsandbytes computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear8bit) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return bnb.nn.Linear8bitLt.forward(layer, x.detach())  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        state = ctx.layer.state
        W = state.CB.to(ctx.dtype).mul_(state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return gradient.to(ctx.dtype) @ W, None


def pack_expert(scheme: Scheme, pieces: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Pack one expert's matrix as bitsandbytes packs a linear layer's weight, its `pieces` [rows, columns] each by itself.

    What is given back unpacks it in the scheme's compute dtype. 8 bits are a form of storage here: inputs are not quantised,
    and none is an outlier.
    """
    pack = _pack_four if scheme.bits == 4 else _pack_eight
    unpacks = [pack(scheme, piece.contiguous()) for piece in pieces]
    return unpacks[0] if len(unpacks) == 1 else lambda: torch.cat([unpack() for unpack in unpacks])


def _pack_four(scheme: Scheme, W: Tensor) -> Callable[[], Tensor]:
    codes, state = bnb.functional.quantize_4bit(
        W, compress_statistics=scheme.double_quant, quant_type=scheme.quant_type
    )
    return lambda: dequantised(codes, state).to(scheme.compute_dtype)


def _pack_eight(scheme: Scheme, W: Tensor) -> Callable[[], Tensor]:
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(W.to(torch.float16))
    return lambda: codes.to(scheme.compute_dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def put_in(stage: Stage) -> None:
    """bitsandbytes' layers, on `meta`, in place of the stage's `QuantizedPlaceholder` ones; and what packs experts."""
    model: Any = stage.model
    for name, module in list(model.named_modules()):
        if marks := marked(module):
            packed = {leaf: mark._replace(pack=partial(pack_expert, mark.scheme)) for leaf, mark in marks.items()}
            setattr(module, MARK, packed)
        if isinstance(module, QuantizedPlaceholder):
            four = module.scheme.bits == 4
            model.set_submodule(name, (Linear4bit if four else Linear8bit)(module).requires_grad_(False))
            # PEFT looks at these to choose its layer.
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
