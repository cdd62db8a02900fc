"""The multiplicative LoRA, this project's own adapter: h' = h + s·B·A·h on a module's output.

Takes a stage and names of modules; gives wrapped modules.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.families import MULTIPLICATIVE
from pipeline.model.adapters.base import Injector, device_of, draw, outputs_of, wrap
from pipeline.model.stage import Stage


class MultiplicativeLoRA(nn.Module):
    """h' = h + s·B·A·h on the output h of any linear-like module: W' = (I + s·B·A)·W; of a mixture's experts, every W.

    A [R, D_out] looks for R directions in the output, B [D_out, R] holds the vector that is added for each, s = alpha/R.
    Needs only the module's output, so the module may hold bf16, 4-bit or 8-bit weights. (jukofyork, creative-writer
    v0.1, "The multiplicative-LoRA method".) A is Kaiming-uniform, B zero, as in LoRA (Hu et al. 2021, §4.1).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
        width: int | None = None,
    ) -> None:
        """`width`: D_out, where the base layer has no out_features to say it."""
        super().__init__()
        self.base_layer = base_layer
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        width = width or int(base_layer.out_features)  # type: ignore[arg-type]
        self.A = nn.Parameter(torch.empty(rank, width, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(width, rank, dtype=dtype, device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer takes (x [..., D_in]; of experts the router's choice too) → [..., D_out] in its output's dtype."""
        h = self.base_layer(*args, **kwargs)
        z = nn.functional.linear(self.dropout(h).to(self.A.dtype), self.A)
        return (h + nn.functional.linear(z, self.B) * self.scaling).to(h.dtype)


def inject_multiplicative(
    stage: Stage, targets: list[str], rank: int, alpha: float, dropout: float, dtype: torch.dtype, seed: int
) -> None:
    """Wrap those of `targets` that the stage owns in a `MultiplicativeLoRA`."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        width = outputs_of(stage.model, base_layer)
        adapter = MultiplicativeLoRA(base_layer, rank, alpha, dropout, dtype, device_of(base_layer), width)
        draw(adapter.A, f"{name}.A", seed)
        return adapter

    wrap(stage, targets, make)


INJECTORS: dict[str, Injector] = {
    MULTIPLICATIVE: lambda stage, targets, to: inject_multiplicative(
        stage, targets, to.rank, to.alpha, to.dropout, to.dtype, to.seed
    ),
}
