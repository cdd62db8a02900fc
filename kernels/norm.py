"""LayerNorm without bias, and RMSNorm, over the last dimension.

Takes x [..., K] and a weight, [K] or one per head, [H, K] for x [..., H, K] (Cohere's query-key norm); gives the normed
x of the same shape. Everything between the load and the store is fp32 (fp64 for fp64 input, which only tests have).

Saves x itself and one fp32 statistic a row (RMSNorm: 1/rms, 4 bytes) or two (LayerNorm: mean and 1/σ, 8 bytes): with
x in bf16, 2·K + 8 bytes a token, of which 2·K are a tensor that the residual stream has anyway; 16 392 for K = 8192.
Under autograd transformers' CohereLayerNorm keeps 8·K + 8 (two fp32 copies). Price in memory traffic: forward reads x
and writes y; backward reads x and the gradient and writes one gradient: 5·K elements in all, one kernel each way.
The weight's gradient is computed only where the weight is trained, summed in fp32 in a fixed order.

Formulas: Ba et al. 2016 (arXiv:1607.06450) eq. 3; Zhang & Sennrich 2019 (arXiv:1910.07467) eq. 4. The variants are those
of transformers' CohereLayerNorm, LlamaRMSNorm, Gemma2RMSNorm and Olmo2RMSNorm (Apache-2.0). The idea of one fused pass
with saved statistics: the layer-norm tutorial of Triton (MIT) and Liger-Kernel's rms_norm (BSD-2).

Letters: N rows (all leading dimensions), K normed dimension, H heads of the weight (1 if it has one dimension).
"""

from typing import Any, NamedTuple

import torch
from pipeline.kernels.dispatch import Kernel, takes_triton
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path serves every device
    triton = None

# One program holds whole rows in registers. Compiled for sm_80 to sm_90, longer rows spill (with a trained weight, rows
# longer than 8192 do, to 300 bytes a thread).
MAX_TRITON_K = 16384
# Elements of a program's tile: short rows (query-key norms) go several to a program.
TILE = 2048
# Programs that share the sum of a weight gradient. Fixed, so that the order of the sum is the same on every GPU.
WEIGHT_GRADIENT_PROGRAMS = 512


class NormForm(NamedTuple):
    """y = w · (x − mean·centred) · 1/√(variance + eps), with w = weight or 1 + weight (`plus_one`).

    `cast_before_weight`: the normed value is rounded to x's dtype, then multiplied in the dtype that weight and x
    promote to, which is also y's. Otherwise the product is fp32, rounded once to x's dtype.
    """

    eps: float
    centred: bool
    plus_one: bool = False
    cast_before_weight: bool = False

    def out_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """The dtype of y."""
        return torch.promote_types(x.dtype, weight.dtype) if self.cast_before_weight else x.dtype


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LayerNorm without bias as Cohere has it: x [..., K], weight [K] or [H, K]; returns x's shape and dtype.

    Raises ValueError where the weight's shape is not that of x's last dimensions.
    """
    return _apply(x, weight, NormForm(eps, centred=True))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, cast_before_weight: bool | None = None
) -> Tensor:
    """RMSNorm: x [..., K], weight [K] or [H, K]; returns x's shape.

    Llama, Mistral, Qwen: as it is. Gemma, Qwen3-Next: `plus_one=True`. OLMo 2, gpt-oss: `cast_before_weight=False`.
    Unless given, the normed value is rounded before the weight where the weight is not 1 + weight. The dtype is x's, but
    for a weight wider than x with `cast_before_weight`, where it is the weight's, as in transformers.
    Raises ValueError where the weight's shape is not that of x's last dimensions, or for a form that no model has.
    """
    if plus_one and cast_before_weight:
        raise ValueError("rms_norm: 1 + weight is multiplied in fp32; cast_before_weight does not go with plus_one")
    cast = not plus_one if cast_before_weight is None else cast_before_weight
    return _apply(x, weight, NormForm(eps, centred=False, plus_one=plus_one, cast_before_weight=cast))


def _apply(x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    if weight.dim() not in (1, 2) or x.shape[-weight.dim() :] != weight.shape or not weight.numel():
        raise ValueError(f"norm: weight {list(weight.shape)} does not fit x {list(x.shape)}: want [K] or [heads, K]")
    return Norm.apply(x, weight, form, takes_triton(x) and x.shape[-1] <= MAX_TRITON_K)


class Norm(torch.autograd.Function):
    """Saves x, the weight and the statistics, nothing else. `use_triton` is an argument for the tests' sake."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: NormForm, use_triton: bool) -> Tensor:
        ctx.form, ctx.use_triton = form, use_triton
        y, *statistics = FORWARD(use_triton, x, weight, form)
        ctx.save_for_backward(x, weight, *statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, *statistics = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        d_x, d_weight = BACKWARD(ctx.use_triton, d_y, x, weight, statistics, ctx.form, wants_weight)
        return (d_x if wants_x else None), d_weight, None, None


# PyTorch: the reference, and the path of the CPU


def pytorch_forward(x: Tensor, weight: Tensor, form: NormForm) -> tuple[Tensor, ...]:
    """y, then the statistics [..., 1]: (mean, 1/σ) or (1/rms). transformers' own operations, so equal to the bit."""
    wide = torch.promote_types(x.dtype, torch.float32)
    value, mean = x.to(wide), None
    if form.centred:
        mean = value.mean(-1, keepdim=True)
        value = value - mean
    scale = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + form.eps)
    # What was subtracted from is a new tensor; what was only cast may be x itself.
    value = value.mul_(scale) if form.centred else value * scale
    normed = value.to(x.dtype) if form.cast_before_weight else value
    w = weight if form.cast_before_weight else _effective_weight(weight, form, wide)
    y = (w * normed).to(form.out_dtype(x, weight))
    return (y, scale) if mean is None else (y, mean, scale)


def pytorch_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, statistics: list[Tensor], form: NormForm, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """d_x, and d_weight where wanted: with x̂ the normed x and g = w·d_y, d_x = (g − x̂·mean(g·x̂) − mean(g)) / σ.

    The last mean is LayerNorm's alone.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = statistics[-1]
    normed = (x.to(wide) - statistics[0]).mul_(scale) if form.centred else x.to(wide) * scale
    d_weight = (d_y * normed).sum_to_size(weight.shape).to(weight.dtype) if wants_weight else None
    d_value = d_y * _effective_weight(weight, form, wide)
    along = (d_value * normed).mean(-1, keepdim=True)
    if form.centred:
        d_value.sub_(d_value.mean(-1, keepdim=True))
    return d_value.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), d_weight


def _effective_weight(weight: Tensor, form: NormForm, wide: torch.dtype) -> Tensor:
    return 1.0 + weight.to(wide) if form.plus_one else weight.to(wide)


# Triton

if triton is not None:

    @triton.jit
    def _forward_kernel(
        x,
        weight,
        y,
        mean,
        scale,
        n_groups,
        n_heads,
        K,
        eps,
        CENTRED: tl.constexpr,
        PLUS_ONE: tl.constexpr,
        CAST_FIRST: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """Program (tile, head): rows group·H + head for ROWS groups, so that all of them share one row of the weight."""
        head = tl.program_id(1)
        group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        row = group.to(tl.int64) * n_heads + head
        column = tl.arange(0, BLOCK)
        inside = (group < n_groups)[:, None] & (column < K)[None, :]
        at = row[:, None] * K + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            average = tl.sum(value, axis=1) / K
            tl.store(mean + row, average, mask=group < n_groups)
            value = tl.where(inside, value - average[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / K + eps)
        tl.store(scale + row, inverse, mask=group < n_groups)
        value = value * inverse[:, None]
        if CAST_FIRST:
            value = value.to(x.dtype.element_ty).to(tl.float32)
        w = tl.load(weight + head * K + column, mask=column < K, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
        tl.store(y + at, (value * w[None, :]).to(y.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        d_y,
        x,
        weight,
        mean,
        scale,
        d_x,
        d_weight,
        n_groups,
        n_heads,
        K,
        CENTRED: tl.constexpr,
        PLUS_ONE: tl.constexpr,
        WEIGHT_GRADIENT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ) -> None:
        """Program (p, head): tiles p, p + P, … of that head's rows; its part of the weight's gradient is summed here."""
        head = tl.program_id(1)
        column = tl.arange(0, BLOCK)
        w = tl.load(weight + head * K + column, mask=column < K, other=0.0).to(tl.float32)
        if PLUS_ONE:
            w = w + 1.0
        total = tl.zeros([BLOCK], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(n_groups, ROWS), tl.num_programs(0)):
            group = tile * ROWS + tl.arange(0, ROWS)
            row = group.to(tl.int64) * n_heads + head
            inside = (group < n_groups)[:, None] & (column < K)[None, :]
            at = row[:, None] * K + column[None, :]
            normed = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            inverse = tl.load(scale + row, mask=group < n_groups, other=0.0)
            if CENTRED:
                average = tl.load(mean + row, mask=group < n_groups, other=0.0)
                normed = tl.where(inside, normed - average[:, None], 0.0)
            normed = normed * inverse[:, None]
            gradient = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
            if WEIGHT_GRADIENT:
                total += tl.sum(gradient * normed, axis=0)
            gradient = gradient * w[None, :]
            along = tl.sum(gradient * normed, axis=1) / K
            result = gradient - normed * along[:, None]
            if CENTRED:
                result = result - (tl.sum(gradient, axis=1) / K)[:, None]
            tl.store(d_x + at, (result * inverse[:, None]).to(d_x.dtype.element_ty), mask=inside)
        if WEIGHT_GRADIENT:
            part = tl.program_id(0) * n_heads + head
            tl.store(d_weight + part.to(tl.int64) * K + column, total, mask=column < K)


class _Launch(NamedTuple):
    """How the rows of x are laid over programs: N = groups · heads rows of K, `rows` groups and `block` ≥ K to a tile."""

    groups: int
    heads: int
    k: int
    rows: int
    block: int
    warps: int

    @classmethod
    def over(cls, x: Tensor, weight: Tensor) -> "_Launch":
        k = weight.shape[-1]
        heads = weight.numel() // k
        block = triton.next_power_of_2(k)
        # 16 elements a thread, 32 in the longest rows: a tile of 2048 in 4 warps, a row of 8192 in 16.
        return cls(x.numel() // (heads * k), heads, k, max(1, TILE // block), block, min(16, max(4, block // 512)))


def triton_forward(x: Tensor, weight: Tensor, form: NormForm) -> tuple[Tensor, ...]:
    """Like `pytorch_forward`, in one kernel."""
    launch = _Launch.over(x, weight)
    y = torch.empty(x.shape, dtype=form.out_dtype(x, weight), device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if form.centred else None
    if x.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[triton.cdiv(launch.groups, launch.rows), launch.heads](
                x.contiguous(),
                weight.contiguous(),
                y,
                mean,
                scale,
                launch.groups,
                launch.heads,
                launch.k,
                form.eps,
                CENTRED=form.centred,
                PLUS_ONE=form.plus_one,
                CAST_FIRST=form.cast_before_weight,
                ROWS=launch.rows,
                BLOCK=launch.block,
                num_warps=launch.warps,
            )
    return (y, scale) if mean is None else (y, mean, scale)


def triton_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, statistics: list[Tensor], form: NormForm, wants_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Like `pytorch_backward`, in one kernel; a trained weight adds the sum of at most 512 rows per head."""
    launch = _Launch.over(x, weight)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(launch.groups, launch.rows)
    if wants_weight:
        programs = min(programs, max(1, WEIGHT_GRADIENT_PROGRAMS // launch.heads))
    parts = d_x.new_empty((programs, *weight.shape), dtype=torch.float32) if wants_weight else None
    if x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[programs, launch.heads](
                d_y.contiguous(),
                x.contiguous(),
                weight.contiguous(),
                statistics[0],
                statistics[-1],
                d_x,
                parts,
                launch.groups,
                launch.heads,
                launch.k,
                CENTRED=form.centred,
                PLUS_ONE=form.plus_one,
                WEIGHT_GRADIENT=wants_weight,
                ROWS=launch.rows,
                BLOCK=launch.block,
                num_warps=launch.warps,
            )
    return d_x, None if parts is None else parts.sum(0).to(weight.dtype)


FORWARD, BACKWARD = Kernel(pytorch_forward, triton_forward), Kernel(pytorch_backward, triton_backward)
