"""AdamW whose steps move low-precision weights: update and weight decay both pass through a compensated sum.

Takes parameters with gradients; updates them in place. Follows torch-optimi's AdamW (MIT) with `kahan_sum`: debiased
betas, the mean in the parameter's dtype. Three things differ; the first two matter at the founding run's lr of 5e-6:

- Decay belongs into the sum. p·(1 − lr·wd) rounds back to p in bf16 (1 − 5e-8 is far below half a unit in the last
  place), so that AdamW as commonly written has exactly no weight decay. In fp32 1 − 5e-8 is 1 − 2⁻²⁴, and the decay
  comes out a fifth too strong, so fp32 parameters are compensated too.
- The compensation is fp32. A bf16 compensation stops growing once it is 256 times the step, and would lose a decay of
  5e-8 after about 300 steps. It costs two bytes more per trained weight.
- The mean square is fp32. In bf16 v·β₂ rounds back to v for β₂ ≥ 0.998, and v never comes down again.

Kahan, "Further remarks on reducing truncation errors" (1965); Loshchilov & Hutter, arXiv:1711.05101, algorithm 2.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def kahan_add(parameter: Tensor, compensation: Tensor, change: Tensor) -> None:
    """parameter + compensation += change, in place. `compensation` and `change` are fp32; parameter keeps its dtype.

    Afterwards parameter is the sum rounded to its dtype, and compensation what the rounding left over.
    """
    compensation.add_(change)
    before = parameter.to(torch.float32, copy=True)
    parameter.copy_(before + compensation)
    compensation.add_(before.sub_(parameter))


class AdamWKahan(Optimizer):
    """Parameter groups with `lr`, `betas`, `eps`, `weight_decay`; every parameter is compensated, fp32 ones too."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients in `.grad`."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})

    def value(self, parameter: Tensor) -> Tensor:
        """The parameter in fp32 with what its rounding left over; a new tensor."""
        return parameter.detach().float() + self._state(parameter)["kahan"]

    @torch.no_grad()
    def add(self, parameter: Tensor, change: Tensor) -> None:
        """parameter += change (fp32), in place, through the compensated sum."""
        kahan_add(parameter, self._state(parameter)["kahan"], change)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0, dtype=torch.int64)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["kahan"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _update(
        self, parameter: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        state, gradient = self._state(parameter), parameter.grad
        assert gradient is not None  # `step` passes over parameters without one
        state["step"] += 1
        beta1, beta2 = (_debiased(beta, int(state["step"])) for beta in betas)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, weight=1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        # The weight that decays is the compensated one; what it is multiplied by would round.
        change = (parameter.float() + state["kahan"]).mul_(-lr * weight_decay)
        change.addcdiv_(mean.float(), square.sqrt().add_(eps), value=-lr)
        kahan_add(parameter, state["kahan"], change)


def _debiased(beta: float, step: int) -> float:
    """Adam's bias correction folded into beta: β̂ = β(1 − βᵗ⁻¹)/(1 − βᵗ)."""
    return (beta**step - beta) / (beta**step - 1)
