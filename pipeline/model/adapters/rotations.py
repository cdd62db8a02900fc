"""Families that rotate or scale: HRA and BOFT, and PEFT's OFT and IA³.

Takes a stage and names of modules; gives the stage with these on what its modules read (or, of IA³, what they give).
All begin as the identity, the same on any number of stages. x is a module's input, W its weight [D_out, D_in].
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.console import UserError
from pipeline.model.adapters.base import Injector, device_of, draw, inject_peft, owned, wrap
from pipeline.model.stage import Stage


class HRA(nn.Module):
    """W' = W·H₁·…·H_R, Hᵢ = I − 2·uᵢ·uᵢᵀ/‖uᵢ‖²: R reflections of the input (Yuan et al. 2024, arXiv 2405.17484, eq. 3).

    The product is I − U·T·Uᵀ, U [D_in, R] the unit vectors and T⁻¹ = ½·I plus what of UᵀU is above the diagonal (Joffrain
    et al. 2006, "Accumulating Householder transformations, revisited"), so it costs what a LoRA of rank R does, where
    PEFT multiplies D_in × D_in matrices. The vectors come in equal pairs, which cancel, at first.
    """

    def __init__(self, base_layer: Any, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.hra_u = nn.Parameter(torch.empty(base_layer.in_features, rank, dtype=dtype, device=device_of(base_layer)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        lengths = self.hra_u.float().norm(dim=0)
        U = self.hra_u / lengths
        identity = torch.eye(U.shape[1], device=U.device)
        T = torch.linalg.solve_triangular((U.T @ U).float().triu(1) + identity / 2, identity, upper=True)
        z = nn.functional.linear(x.to(self.hra_u.dtype), self.hra_u.T) / lengths
        turned = nn.functional.linear(z, U @ T.to(U.dtype))
        return self.base_layer((x - turned).to(x.dtype))  # type: ignore[no-any-return]


def inject_hra(stage: Stage, targets: list[str], rank: int, dtype: torch.dtype, seed: int) -> None:
    """`HRA` on those of `targets` that the stage owns. `rank` is even; vectors Kaiming-uniform as PEFT's."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = HRA(base_layer, rank, dtype)
        half = torch.empty(adapter.hra_u.shape[0], rank // 2)
        draw(half, f"{name}.hra_u", seed)
        with torch.no_grad():
            adapter.hra_u.copy_(half.repeat_interleave(2, dim=1))
        return adapter

    wrap(stage, targets, make)


def inject_ia3(stage: Stage, targets: list[str], feedforward: list[str], dtype: torch.dtype) -> None:
    """PEFT's IA³ (Liu et al. 2022, arXiv 2205.05638): a factor for each output of `targets`, for each input of those
    that are in `feedforward` too."""
    from peft import IA3Config

    layers = f"{stage.model.base_model_prefix}.layers."
    within = {name.removeprefix(layers) for name in feedforward}
    _inject(
        stage,
        targets,
        dtype,
        lambda mine: IA3Config(
            target_modules=mine,
            feedforward_modules=[name for name in mine if name in within],
        ),
    )


def inject_oft(stage: Stage, targets: list[str], block_size: int, dtype: torch.dtype) -> None:
    """PEFT's OFT (Qiu et al. 2023, arXiv 2306.07280): W·R, R of orthogonal blocks of `block_size`, which must divide D_in.

    R is by the Cayley transform's Neumann series (5 terms, PEFT's default), so it is orthogonal to that order.
    """
    from peft import OFTConfig

    _check_blocks(stage, targets, block_size, "oft_block_size")
    _inject(
        stage,
        targets,
        dtype,
        lambda mine: OFTConfig(
            r=0,
            oft_block_size=block_size,
            target_modules=mine,
            module_dropout=0.0,
        ),
    )


class BOFT(nn.Module):
    """W' = diag(s)·W·Rᵀ, R of orthogonal blocks: BOFT with one butterfly factor (Liu et al. 2023, arXiv 2311.06243, eq. 5).

    A block is the Cayley transform (I − K)(I + K)⁻¹ of K = (P − Pᵀ)/2, P what is trained: orthogonal however far it goes. The
    input's blocks are turned where PEFT multiplies D_in × D_in matrices. A bias is not scaled.
    """

    def __init__(self, base_layer: Any, block_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        inputs, outputs, device = base_layer.in_features, base_layer.out_features, device_of(base_layer)
        blocks = torch.zeros(1, inputs // block_size, block_size, block_size, dtype=dtype, device=device)
        self.boft_R, self.boft_s = (
            nn.Parameter(blocks),
            nn.Parameter(torch.ones(outputs, 1, dtype=dtype, device=device)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        P = self.boft_R[0].float()
        K, identity = (P - P.mT) / 2, torch.eye(P.shape[-1], device=P.device)
        blocks = torch.linalg.solve(identity + K, identity - K, left=False).to(x.dtype)
        turned = torch.einsum("...nk,nkj->...nj", x.unflatten(-1, blocks.shape[:2]), blocks)
        y: Tensor = self.base_layer(turned.flatten(-2))
        s, bias = self.boft_s.flatten().to(y.dtype), self.base_layer.bias
        return y * s if bias is None else y * s + bias * (1 - s)


def inject_boft(stage: Stage, targets: list[str], block_size: int, dtype: torch.dtype) -> None:
    """`BOFT` on those of `targets` that the stage owns; `block_size` divides their inputs."""
    _check_blocks(stage, targets, block_size, "boft_block_size")
    wrap(stage, targets, lambda _, base_layer: BOFT(base_layer, block_size, dtype))


def _inject(stage: Stage, targets: list[str], dtype: torch.dtype, config_for: Any) -> None:
    for name in inject_peft(stage, targets, config_for):
        for parameter in stage.model.get_submodule(name).parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def _check_blocks(stage: Stage, targets: list[str], block_size: int, key: str) -> None:
    for name in owned(stage, targets):
        width: Any = stage.model.get_submodule(name).in_features
        if width % block_size:
            raise UserError(f"{key} = {block_size} does not divide the {width} inputs of {name}")


INJECTORS: dict[str, Injector] = {
    "ia3": lambda stage, targets, to: inject_ia3(stage, targets, to.feedforward, to.dtype),
    "oft": lambda stage, targets, to: inject_oft(stage, targets, to.block_size, to.dtype),
    "boft": lambda stage, targets, to: inject_boft(stage, targets, to.block_size, to.dtype),
    "hra": lambda stage, targets, to: inject_hra(stage, targets, to.rank, to.dtype, to.seed),
}
