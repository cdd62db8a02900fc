"""The control adapter: its formula, its inverse, Q kept orthonormal by the optimizer's hook; DoRA's row norms.

Oracles: fp64, an explicit inverse matrix, the polar factor of a matrix by its SVD, bitsandbytes' dequantised weight.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.control import ControlAdapter, inject_control, newton_step
from pipeline.model.adapters.lora import DoRA
from pipeline.training.optim.adamw_kahan import AdamWKahan
from pipeline.training.stage import families
from tests.helpers.builders import save_model
from tests.helpers.stages import build, hidden, token_ids

D_IN, D_OUT, RANK = 128, 64, 8
# fp32 sums of at most D_in, then D_out, then R products, each rounded to 2⁻²⁴.
FP32 = (D_IN + D_OUT + RANK) * 2**-24


def control(rank: int = RANK, dtype: torch.dtype = torch.float32, bias: bool = True) -> ControlAdapter:
    torch.manual_seed(1)
    adapter = ControlAdapter(nn.Linear(D_IN, D_OUT, bias=bias).requires_grad_(False), rank, 0.0, dtype)
    with torch.no_grad():
        adapter.Q.copy_(torch.linalg.qr(torch.randn(D_OUT, rank)).Q)
        adapter.S.copy_(torch.linspace(-1.5, 1.0, rank))
    return adapter


def matrix(adapter: ControlAdapter) -> Tensor:
    """I + Q·diag(e^S − 1)·Qᵀ in fp64."""
    Q, S = adapter.Q.detach().double(), adapter.S.detach().double()
    return torch.eye(len(Q), dtype=torch.float64) + Q @ torch.diag(S.exp() - 1) @ Q.T


def test_output_is_the_formulas_and_amplifies_by_e_to_the_s() -> None:
    adapter, x = control(), torch.randn(10, D_IN)
    h = adapter.base_layer(x).double()
    right = h @ matrix(adapter).T
    assert (adapter(x).double() - right).abs().max() <= FP32 * right.abs().max() * 2
    eigenvalues = torch.linalg.eigvalsh(matrix(adapter))
    expected = torch.cat([adapter.S.detach().double().exp(), torch.ones(D_OUT - RANK, dtype=torch.float64)])
    # Q is orthonormal to fp32's rounding, 2⁻²⁴ times a few.
    torch.testing.assert_close(eigenvalues, expected.sort().values, rtol=0, atol=1e-5)


def test_inverse_is_the_same_with_minus_s() -> None:
    adapter = control()
    forward = matrix(adapter)
    with torch.no_grad():
        adapter.S.neg_()
    torch.testing.assert_close(matrix(adapter), torch.linalg.inv(forward), rtol=0, atol=1e-5)


def test_written_is_the_multiplicative_pair_of_scaling_1() -> None:
    adapter = control()
    pair = {name: t.double() for name, t in adapter.written().items()}
    right = matrix(adapter) - torch.eye(D_OUT, dtype=torch.float64)
    torch.testing.assert_close(pair["B"] @ pair["A"], right, rtol=0, atol=1e-6)


def test_newton_step_goes_to_the_polar_factor_with_order_2() -> None:
    Q = torch.linalg.qr(torch.randn(D_OUT, RANK, dtype=torch.float64)).Q + 0.01 * torch.randn(D_OUT, RANK).double()
    U, _, Vh = torch.linalg.svd(Q, full_matrices=False)
    errors = []
    for _ in range(4):
        errors.append(float((Q.T @ Q - torch.eye(RANK)).norm()))
        Q = Q + newton_step(Q)
    for before, after in pairwise(errors):
        assert after <= 0.75 * before**2 * (1 + before) + 1e-14  # the bound of the docstring, 3e²/4 and higher
    torch.testing.assert_close(Q, U @ Vh, rtol=0, atol=1e-9)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw_kahan": lambda p: AdamWKahan([{"params": p}], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "largest"),
    # A step of lr = 0.01 in every entry leaves e of about 0.01·√64, whose 3e²/4 stays: 5e-3. bf16 rounds Q to 2⁻⁹ besides.
    [("adamw_kahan", torch.float32, 5e-3), ("adamw", torch.float32, 5e-3), ("adamw_kahan", torch.bfloat16, 1.2e-2)],
)
@pytest.mark.parametrize("hooked", [True, False])
def test_q_stays_orthonormal_while_training(
    tmp_path: Path, kind: str, dtype: torch.dtype, largest: float, hooked: bool
) -> None:
    """Without the hook it does not, so the test can fail."""
    save_model(tmp_path, "llama")
    stage = build(tmp_path, 0, 4).train()
    inject_control(stage, [f"model.layers.{i}.mlp.down_proj" for i in range(3)], RANK, 0.0, dtype, 42)
    parameters = trainable(stage)
    optimizer = OPTIMIZERS[kind](list(parameters.values()))
    if hooked:
        families.after_updates(stage, optimizer)
    for step in range(30):
        hidden([stage], token_ids(seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    errors = [float((q.float().T @ q.float() - torch.eye(RANK)).norm()) for n, q in parameters.items() if n[-1] == "Q"]
    assert len(errors) == 3
    assert max(errors) < largest if hooked else min(errors) > 2 * largest
    assert all(p.abs().max() > 0.01 for n, p in parameters.items() if n[-1] == "S"), "S has been trained"


def test_start_is_orthonormal_and_follows_the_seed(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    starts = []
    for seed in (1, 2):
        stage = build(tmp_path, 0, 4)
        inject_control(stage, ["model.layers.0.mlp.down_proj"], RANK, 0.0, torch.float32, seed)
        Q = trainable(stage)["model.layers.0.mlp.down_proj.Q"]
        assert (Q.T @ Q - torch.eye(RANK)).norm() < 1e-6
        starts.append(Q.detach())
    assert (starts[0] - starts[1]).abs().max() > 0.1


# DoRA


@pytest.mark.parametrize("bias", [True, False])
def test_doras_norms_are_those_of_the_merged_rows(bias: bool) -> None:
    torch.manual_seed(3)
    base = nn.Linear(D_IN, D_OUT, bias=bias).requires_grad_(False)
    adapter = DoRA(base, RANK, 1.5, 0.0, torch.float32)
    with torch.no_grad():
        adapter.A.normal_(), adapter.B.normal_()
        W = base.weight.double() + 1.5 * adapter.B.double() @ adapter.A.double()
        torch.testing.assert_close(adapter._norms(torch.float32).double(), W.norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(adapter.lora_magnitude_vector, base.weight.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_over_a_4_bit_layer(bias: bool) -> None:
    """The oracle reads the weight that nf4 stands for. In train mode, sizes multiples of 64 (traps of bitsandbytes)."""
    import bitsandbytes as bnb

    torch.manual_seed(3)
    plain = nn.Linear(D_IN, D_OUT, bias=bias)
    base = bnb.nn.Linear4bit(D_IN, D_OUT, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    base = base.to("cpu").requires_grad_(False).train()
    W = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).double()
    adapter, x = DoRA(base, RANK, 1.5, 0.0, torch.float32).train(), torch.randn(10, D_IN)
    with torch.no_grad():
        adapter.A.normal_(std=0.1)  # B is zero: the start
        torch.testing.assert_close(adapter(x), base(x), rtol=0, atol=1e-5)
        adapter.B.normal_(std=0.1), adapter.lora_magnitude_vector.mul_(1.1)
        merged = W + 1.5 * adapter.B.double() @ adapter.A.double()
        merged *= (adapter.lora_magnitude_vector.double() / merged.norm(dim=1))[:, None]
        right = x.double() @ merged.T + (0 if base.bias is None else base.bias.double())
    assert (adapter(x).double() - right).abs().max() <= 4 * FP32 * right.abs().max()
