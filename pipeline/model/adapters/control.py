"""The control adapter: h' = h + Q·diag(e^S − 1)·Qᵀ·h on a module's output, with the columns of Q kept orthonormal.

Takes a stage and names of modules; gives wrapped modules. Each column of Q is a direction whose part in the output is
multiplied by e^S: S = 0 leaves it, S > 0 amplifies it, S < 0 weakens it, none is erased or reversed. The inverse is the
same with −S. It is the multiplicative adapter with A = Qᵀ, B = Q·diag(e^S − 1) and s = 1 (jukofyork's control adapters,
which follow his creative-writer v0.1: he found the free form "too unconstrained").
"""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.console import UserError
from pipeline.model.adapters.base import Injector, device_of, outputs_of, wrap
from pipeline.model.stage import Stage


class ControlAdapter(nn.Module):
    """h' = h + Q·diag(e^S − 1)·Qᵀ·h on the output h of any linear-like module: Q [D_out, R], S [R], zero at first."""

    def __init__(
        self, base_layer: nn.Module, rank: int, dropout: float, dtype: torch.dtype, width: int | None = None
    ) -> None:
        """`width`: D_out, where the base layer has no out_features to say it."""
        super().__init__()
        self.base_layer = base_layer
        self.dropout = nn.Dropout(dropout)
        device = device_of(base_layer)
        width = width or int(base_layer.out_features)  # type: ignore[arg-type]
        self.Q = nn.Parameter(torch.empty(width, rank, dtype=dtype, device=device))
        self.S = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer takes → [..., D_out] in the dtype of its output."""
        h = self.base_layer(*args, **kwargs)
        z = nn.functional.linear(self.dropout(h).to(self.Q.dtype), self.Q.T)
        return (h + nn.functional.linear(z, self._response())).to(h.dtype)

    @torch.no_grad()
    def written(self) -> dict[str, Tensor]:
        """The same function as a multiplicative pair with s = 1: A [R, D_out], B [D_out, R]."""
        return {"A": self.Q.T.contiguous(), "B": self._response()}

    def _response(self) -> Tensor:
        return self.Q * torch.expm1(self.S)


def inject_control(stage: Stage, targets: list[str], rank: int, dropout: float, dtype: torch.dtype, seed: int) -> None:
    """Wrap those of `targets` that the stage owns in a `ControlAdapter`. UserError where R exceeds a module's width."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        width = outputs_of(stage.model, base_layer)
        if rank > width:
            raise UserError(
                f"lora_rank = {rank}: {name} has {width} outputs, and a control adapter's "
                "directions are orthogonal to each other, so there cannot be more of them"
            )
        adapter = ControlAdapter(base_layer, rank, dropout, dtype, width)
        _draw_orthonormal(adapter.Q, f"{name}.Q", seed)
        return adapter

    wrap(stage, targets, make)


def newton_step(Q: Tensor) -> Tensor:
    """What to add to Q [D, R] for a step towards the nearest matrix with QᵀQ = I: Q(3I − QᵀQ)/2 − Q = Q(I − QᵀQ)/2.

    An error e = QᵀQ − I becomes −(3e² − e³)/4 (Björck & Bowie 1971, of order 2): after a small update one is enough.
    """
    return Q @ (torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device) - Q.T @ Q) / 2


@torch.no_grad()
def _draw_orthonormal(parameter: nn.Parameter, name: str, seed: int) -> None:
    """Columns of a random orthonormal frame (Haar, but for signs), from a generator of the parameter's own."""
    if parameter.is_meta:
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    normal = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    parameter.copy_(torch.linalg.qr(normal).Q)


INJECTORS: dict[str, Injector] = {
    "control_adapter": lambda stage, targets, to: inject_control(
        stage, targets, to.rank, to.dropout, to.dtype, to.seed
    ),
}
