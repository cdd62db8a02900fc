"""Variants of LoRA: MosLoRA and FLoRA, LoRA that starts from the weight itself (PiSSA, OLoRA), and DoRA.

Takes a stage and names of modules; gives wrapped modules. x is a module's input, W its weight [D_out, D_in],
A [R, D_in], B [D_out, R]. Each needs the module's output alone while training, so the module may be quantised where
the start does not read its weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.console import UserError
from pipeline.families import LORA
from pipeline.model.adapters import parameters
from pipeline.model.adapters.base import (
    Injector,
    Settings,
    device_of,
    draw,
    draw_normal,
    inject_peft,
    owned,
    sizes_of,
    wrap,
)
from pipeline.model.stage import Stage

OVERSAMPLED = 10  # probes beyond the rank (Halko, Martinsson & Tropp 2011, §4.2)
ROWS = 1024  # of a weight at a time, where fp32 copies are made


class MosLoRA(nn.Module):
    """y' = y + s·B·M·A·x, the mixer M [R, R] (Wu et al. 2024, arXiv 2406.11909, eq. 6). B is zero at first.

    Once trained it is a LoRA with B·M for B. FLoRA (Si et al. 2024, arXiv 2405.14739, eq. 4) is, of a matrix, the same map from
    another start: its core M is zero, A and B are random.
    """

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, nn.Dropout(dropout)
        self.A, self.B = _pair(base_layer, rank, dtype)
        self.M = nn.Parameter(torch.empty(rank, rank, dtype=dtype, device=self.A.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        y = self.base_layer(x)
        z = nn.functional.linear(nn.functional.linear(self.dropout(x).to(self.A.dtype), self.A), self.M)
        return (y + nn.functional.linear(z, self.B) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def written(self) -> dict[str, Tensor]:
        """The same function as a LoRA with the same s: A [R, D_in], B [D_out, R]."""
        return {"A": self.A.detach(), "B": (self.B.float() @ self.M.float()).to(self.B.dtype)}


class LoRAFromWeight(nn.Module):
    """y' = y + s·(B·A − B₀·A₀)·x, where s·B₀·A₀ is the part of W that A and B start as, and are trained instead of.

    PEFT changes the weight to W − s·B₀·A₀, which a 16-bit weight rounds. Here W stays as it is and the start is
    subtracted in the adapter's dtype, so what is saved, [B, −B₀] and [A; A₀], is this function over the original base.
    """

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, nn.Dropout(dropout)
        self.A, self.B = _pair(base_layer, rank, dtype)
        self.A0, self.B0 = (nn.Parameter(torch.zeros_like(t), requires_grad=False) for t in (self.A, self.B))

    @torch.no_grad()
    def start(self, A: Tensor, B: Tensor) -> None:
        """Begin from this pair, at which the adapter changes nothing."""
        for parameter, frozen, value in ((self.A, self.A0, A), (self.B, self.B0, B)):
            parameter.copy_(value)
            frozen.copy_(parameter)  # rounded alike

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        y, given = self.base_layer(x), x.to(self.A.dtype)
        trained = nn.functional.linear(nn.functional.linear(self.dropout(given), self.A), self.B)
        start = nn.functional.linear(nn.functional.linear(given, self.A0), self.B0)
        return (y + (trained - start) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def written(self) -> dict[str, Tensor]:
        """The same function as a LoRA of rank 2R with the same s: A [2R, D_in], B [D_out, 2R]."""
        return {"A": torch.cat([self.A, self.A0]), "B": torch.cat([self.B, -self.B0], dim=1)}


class DoRA(nn.Module):
    """y' = m/‖W + s·B·A‖ ⊙ (W + s·B·A)·x + b, norms over each output's row (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    The norm gets no gradient (§4.3). Nothing D × D is made for it: ‖Wᵢ + s·Bᵢ·A‖² = ‖Wᵢ‖² + 2s·Bᵢ·(A·Wᵀ)ᵢ + s²·Bᵢ·A·Aᵀ·Bᵢᵀ,
    and A·Wᵀ is what the module gives for the rows of A. m [D_out] starts as ‖W‖.
    """

    squares: Tensor

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.dropout = base_layer, scaling, nn.Dropout(dropout)
        self.A, self.B = _pair(base_layer, rank, dtype)
        self.register_buffer("squares", _squares(base_layer), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.squares.sqrt().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        y, bias = self.base_layer(x), getattr(self.base_layer, "bias", None)
        z = nn.functional.linear(self.dropout(x).to(self.A.dtype), self.A)
        turned = (y if bias is None else y - bias) + nn.functional.linear(z, self.B) * self.scaling
        turned = turned * (self.lora_magnitude_vector / self._norms(x.dtype))
        return (turned if bias is None else turned + bias).to(y.dtype)

    def written(self) -> dict[str, Tensor]:
        """As PEFT writes it: a LoRA and the magnitudes."""
        return {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """‖W + s·B·A‖ of every row [D_out], in fp32."""
        A, B, bias = self.A.float(), self.B.float(), getattr(self.base_layer, "bias", None)
        AW = self.base_layer(self.A.to(dtype)).float()
        crossed = (AW if bias is None else AW - bias.float()).T * B
        own = (B @ (A @ A.T)) * B
        return (self.squares + (2 * self.scaling * crossed + self.scaling**2 * own).sum(1)).clamp_min(0).sqrt()


def inject_lora(
    stage: Stage,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    dtype: torch.dtype,
    seed: int,
    use_rslora: bool = False,
) -> None:
    """PEFT's LoRA on those of `targets`, modules and parameters, that the stage owns, in `dtype`; s = alpha/R, or alpha/√R with
    `use_rslora`."""
    from peft import LoraConfig

    of_parameters = parameters.among(stage.model, owned(stage, targets))
    modules = [name for name in targets if name not in of_parameters]
    mine = inject_peft(
        stage,
        modules,
        lambda names: LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=names,
            bias="none",
            use_rslora=use_rslora,
            fan_in_fan_out=any(isinstance(stage.model.get_submodule(name), Conv1D) for name in owned(stage, modules)),
        ),
    )
    for name in mine:
        module = stage.model.get_submodule(name)
        module.lora_A.to(dtype)
        module.lora_B.to(dtype)
        draw(module.lora_A["default"].weight, f"{name}.A", seed)
    parameters.inject(stage, of_parameters, rank, alpha, dtype, seed, use_rslora)


def inject_moslora(
    stage: Stage, targets: list[str], rank: int, scaling: float, dropout: float, dtype: torch.dtype, seed: int
) -> None:
    """`MosLoRA` on those of `targets` that the stage owns; A and M Kaiming-uniform."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = MosLoRA(base_layer, rank, scaling, dropout, dtype)
        draw(adapter.A, f"{name}.A", seed)
        draw(adapter.M, f"{name}.M", seed)
        return adapter

    wrap(stage, targets, make)


def inject_flora(
    stage: Stage, targets: list[str], rank: int, scaling: float, dropout: float, dtype: torch.dtype, seed: int
) -> None:
    """`MosLoRA` from FLoRA's start, as its authors' code has it: M zero, A and B normal with the variance 1/(2R)."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = MosLoRA(base_layer, rank, scaling, dropout, dtype)
        draw_normal(adapter.A, f"{name}.A", seed, (2 * rank) ** -0.5)
        draw_normal(adapter.B, f"{name}.B", seed, (2 * rank) ** -0.5)
        nn.init.zeros_(adapter.M)
        return adapter

    wrap(stage, targets, make)


def inject_dora(
    stage: Stage, targets: list[str], rank: int, scaling: float, dropout: float, dtype: torch.dtype, seed: int
) -> None:
    """`DoRA` on those of `targets` that the stage owns; A Kaiming-uniform."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = DoRA(base_layer, rank, scaling, dropout, dtype)
        draw(adapter.A, f"{name}.A", seed)
        return adapter

    wrap(stage, targets, make)


def inject_from_weight(
    stage: Stage,
    targets: list[str],
    start: str,
    rank: int,
    scaling: float,
    dropout: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """`LoRAFromWeight` on those of `targets` that the stage owns. `start`: 'pissa', 'pissa_niter_<N>' or 'olora'.
    UserError for a rank above a weight's own, or a weight that is quantised."""
    iterations = int(start.removeprefix("pissa_niter_")) if start.startswith("pissa_niter_") else None

    def take(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        if start == "olora":
            return _first_columns(weight, rank, scaling)
        if iterations is None:
            U, singular, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            probes = torch.empty(weight.shape[1], min(rank + OVERSAMPLED, *weight.shape), device=weight.device)
            draw(probes, f"{name}.probes", seed)
            U, singular, Vh = approximate_svd(weight, probes, iterations)
        return _pissa(U, singular, Vh, rank, scaling)

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = LoRAFromWeight(base_layer, rank, scaling, dropout, dtype)
        weight: Any = base_layer.weight
        if not weight.is_floating_point():
            raise UserError(
                f"init_lora_weights = '{start}': {name} is quantised, and the start is taken from its weight"
            )
        if rank > min(weight.shape):
            raise UserError(f"lora_rank = {rank}: {name} has a weight of rank {min(weight.shape)} at most")
        if not weight.is_meta:
            adapter.start(*take(name, weight.detach().float()))
        return adapter

    wrap(stage, targets, make)


@torch.no_grad()
def approximate_svd(weight: Tensor, probes: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular vectors of `weight` [D_out, D_in]: U [D_out, q], their values [q], Vh [q, D_in].

    `probes` [D_in, q], random; subspace iteration (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1). torch's
    svd_lowrank draws its own probes on the device, other ones on another; a resumed run must find the same vectors.
    """
    Q = torch.linalg.qr(weight @ probes).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(weight.T @ Q).Q
        Q = torch.linalg.qr(weight @ Q).Q
    U, singular, Vh = torch.linalg.svd(Q.T @ weight, full_matrices=False)
    return Q @ U, singular, Vh


def _pissa(U: Tensor, singular: Tensor, Vh: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA: s·B·A is the best approximation of rank R of U·diag(singular)·Vh (Meng et al. 2024, arXiv 2404.02948)."""
    root = (singular[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def _first_columns(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """OLoRA: the first R columns of Q and rows of R of `weight` = Q·R (Büyükakyüz 2024, arXiv 2406.01775); s as PEFT's."""
    Q, R = torch.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


def _pair(base_layer: Any, rank: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, D_in], not yet set, and B [D_out, R], zero."""
    device, sizes = device_of(base_layer), sizes_of(base_layer)
    assert sizes is not None, "a linear module"
    A = nn.Parameter(torch.empty(rank, sizes[0], dtype=dtype, device=device))
    return A, nn.Parameter(torch.zeros(sizes[1], rank, dtype=dtype, device=device))


@torch.no_grad()
def _squares(base_layer: Any) -> Tensor:
    """‖Wᵢ‖² of every row of the module's weight [D_out], in fp32. A quantised weight is read off its products."""
    weight, bias = base_layer.weight, getattr(base_layer, "bias", None)
    if weight.is_floating_point():
        return torch.cat([rows.float().square().sum(1) for rows in weight.detach().split(ROWS)])
    total = torch.zeros(base_layer.out_features, device=weight.device)
    for first in range(0, base_layer.in_features, ROWS):
        rows = torch.zeros(min(ROWS, base_layer.in_features - first), base_layer.in_features, device=weight.device)
        rows[:, first : first + len(rows)] = torch.eye(len(rows), device=weight.device)
        columns = base_layer(rows)
        total += (columns if bias is None else columns - bias).float().square().sum(0)
    return total


def _inject_plain(stage: Stage, targets: list[str], to: Settings) -> None:
    """PEFT's LoRA, or one that starts from the weight."""
    if to.start is True:
        inject_lora(stage, targets, to.rank, to.alpha, to.dropout, to.dtype, to.seed, to.use_rslora)
    else:
        inject_from_weight(stage, targets, str(to.start), to.rank, to.s, to.dropout, to.dtype, to.seed)


INJECTORS: dict[str, Injector] = {
    LORA: _inject_plain,
    "moslora": lambda stage, targets, to: inject_moslora(stage, targets, to.rank, to.s, to.dropout, to.dtype, to.seed),
    "flora": lambda stage, targets, to: inject_flora(stage, targets, to.rank, to.s, to.dropout, to.dtype, to.seed),
    "dora": lambda stage, targets, to: inject_dora(stage, targets, to.rank, to.s, to.dropout, to.dtype, to.seed),
}
