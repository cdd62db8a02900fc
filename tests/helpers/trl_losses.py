"""TRL's own losses, called with log-probabilities that a test gives: stand-ins take the trainer's and the model's place."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from pipeline.objectives.preference_losses import Settings


class _Accelerator:
    """One process on the CPU."""

    device = torch.device("cpu")

    @staticmethod
    def gather(tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather


def _trainer(settings: Settings, **more: Any) -> Any:
    return SimpleNamespace(
        accelerator=_Accelerator(),
        aux_loss_enabled=False,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def _rows(sums: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [R, T − 1] and mask [R, T] of rows that have these sums, slot after slot, all in the first token."""
    counts = tokens.flatten()
    places = torch.arange(int(counts.max()) + 1)
    mask = (places >= 1) & (places <= counts[:, None])
    return torch.nn.functional.pad(sums.reshape(-1, 1), (0, len(places) - 2)), mask.long()


def _model(per_token: Tensor) -> Any:
    zeros = torch.zeros_like(per_token.detach())
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **given: outputs


def dpo_loss(
    names: list[str], weights: list[float], settings: Settings, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(loss, what to take its gradient by: each row's sum [2, U])."""
    sums = given["policy"].detach().requires_grad_()
    per_token, mask = _rows(sums, given["tokens"])
    trainer = _trainer(
        settings,
        ld_alpha=None,
        f_divergence_type=settings.divergence,
        f_alpha_divergence_coef=settings.alpha,
        loss_types=names,
        loss_weights=weights,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=settings.discopop_tau),
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": given["reference"][0],
        "ref_rejected_logps": given["reference"][1],
    }
    torch.set_default_dtype(sums.dtype)  # of its ε, and of token counts
    try:
        return DPOTrainer._compute_loss(trainer, _model(per_token), inputs, False), sums
    finally:
        torch.set_default_dtype(torch.float32)


def kto_loss(name: str, settings: Settings, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(loss, the rated rows' sums [U])."""
    sums = given["policy"][0].detach().requires_grad_()
    per_token, mask = _rows(sums, given["tokens"][0])
    mismatched = given["policy"][1].detach()
    trainer = _trainer(
        settings,
        loss_type=name,
        calculate_KL=name == "kto",
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": given["desirable"],
        "ref_logps": given["reference"][0],
        "ref_KL_logps": given["reference"][1],
    }
    return KTOTrainer._compute_loss(trainer, _model(per_token), inputs, False), sums


def cpo_trainer(name: str, settings: Settings) -> Any:
    """With `cpo_loss(chosen [U], rejected [U])`."""
    trainer = _trainer(settings, loss_type=name, alpha=0.0, simpo_gamma=settings.simpo_gamma)
    trainer.cpo_loss = lambda chosen, rejected: CPOTrainer.cpo_loss(trainer, chosen, rejected)
    return trainer


def orpo_trainer(settings: Settings) -> Any:
    """With `odds_ratio_loss(chosen [U], rejected [U])` of per-token means."""
    trainer = _trainer(settings)
    trainer.odds_ratio_loss = lambda chosen, rejected: ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    return trainer
