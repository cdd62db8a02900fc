"""Adapters of every family by stock PEFT on small models, and what each does to a weight, dense and in fp64.

The dense forms are written from the papers' formulas and PEFT's forward pass; they share no code with the fold.
"""

from pathlib import Path
from typing import Any

import torch
from peft import BOFTConfig, HRAConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import Tensor

from tests.helpers.artifacts import load_model, make_base, tensors_of

# down_proj is 32 × 48, q_proj 32 × 32, k_proj 16 × 32.
TARGETS = ["down_proj", "q_proj", "k_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
OFT: dict[str, Any] = {"r": 0, "oft_block_size": 8, "target_modules": TARGETS}
CONFIGS: dict[str, Any] = {
    "lora": lambda **k: LoraConfig(**{**LORA, **k}),
    "dora": lambda **k: LoraConfig(**LORA, use_dora=True, **k),
    "dora, ranks and s that differ": lambda **k: LoraConfig(
        **LORA, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, **k
    ),
    "ia3": lambda **k: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], **k),
    "oft": lambda **k: OFTConfig(**OFT, **k),
    "oft, exact": lambda **k: OFTConfig(**OFT, use_cayley_neumann=False, **k),
    "oft, three terms": lambda **k: OFTConfig(**OFT, num_cayley_neumann_terms=3, **k),
    "oft, seven terms": lambda **k: OFTConfig(**OFT, num_cayley_neumann_terms=7, **k),
    "oft, one block for all": lambda **k: OFTConfig(**OFT, block_share=True, **k),
    "boft": lambda **k: BOFTConfig(boft_block_size=4, target_modules=TARGETS, **k),
    "hra": lambda **k: HRAConfig(r=6, target_modules=TARGETS, **k),
    "hra, odd": lambda **k: HRAConfig(r=3, target_modules=TARGETS, **k),
    "hra, orthogonal": lambda **k: HRAConfig(r=4, apply_GS=True, init_weights=False, target_modules=TARGETS, **k),
}


def loud_base(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A base whose rows have lengths of about 1, so that what multiplies a weight shows in the logits."""
    model = load_model(make_base(folder, family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
    model.save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path, case: str, *, seed: int = 0, size: float = 0.1, **config: Any) -> Any:
    """The base with an adapter of the case by PEFT, moved away from its start, in eval mode; saved to `folder`."""
    model = get_peft_model(load_model(base), CONFIGS[case](**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder))
    return model.eval()


def stored(folder: Path, module: str) -> dict[str, Tensor]:
    """A module's tensors of an adapter's file, by the rest of their names, fp64."""
    prefix = f"base_model.model.{module}."
    return {name.removeprefix(prefix): t.double() for name, t in tensors_of(folder).items() if name.startswith(prefix)}


def dense(case: str, t: dict[str, Tensor], W: Tensor, b: Tensor | None, s: float = 1.5) -> tuple[Tensor, Tensor | None]:
    """W and b after an adapter of the case with the tensors `t`, all fp64."""
    family = case.partition(",")[0]
    if family == "lora":
        return W + s * t["lora_B.weight"] @ t["lora_A.weight"], b
    if family == "dora":
        V = W + s * t["lora_B.weight"] @ t["lora_A.weight"]
        return t["lora_magnitude_vector"][:, None] / V.norm(dim=1, keepdim=True) * V, b
    if family == "ia3":
        moved = b if b is None or t["ia3_l"].shape[0] == 1 else t["ia3_l"].flatten() * b
        return W * t["ia3_l"], moved
    if family == "oft":
        return W @ torch.block_diag(*(_series(_skew(v, 8)) for v in t["oft_R.weight"])).T, b
    if family == "boft":
        R = torch.block_diag(*(_cayley((block - block.T) / 2) for block in t["boft_R"][0]))
        return t["boft_s"] * (W @ R.T), b
    for u in t["hra_u"].T:
        W = W @ (torch.eye(len(u), dtype=W.dtype) - 2 * torch.outer(u, u) / (u @ u))
    return W, b


def _skew(upper: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=torch.float64)
    values = iter(upper.tolist())
    for i in range(size):
        for j in range(i + 1, size):
            Q[i, j] = next(values)
            Q[j, i] = -Q[i, j]
    return Q


def _series(Q: Tensor) -> Tensor:
    """Five terms: I + 2Q + 2Q² + 2Q³ + Q⁴."""
    return torch.eye(len(Q), dtype=Q.dtype) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


def _cayley(Q: Tensor) -> Tensor:
    identity = torch.eye(len(Q), dtype=Q.dtype)
    return (identity - Q) @ torch.linalg.inv(identity + Q)
