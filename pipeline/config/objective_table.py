"""The tables of a config that say what is minimised: [objective], [objective.reference], and qlora-pipe's [rl].

Every key with its default, unit, bound and meaning, as in pipeline/config/schema.py, which has the top level. Names and
meanings are TRL's. What goes with which loss is for `training/start/objective.py` to say, which knows the losses.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from pipeline.config.tables import Section

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "cdpo", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft", "simpo", "cpo", "orpo", "plackett_luce", "kto", "apo_zero_unpaired",
]  # fmt: skip
_OTHER_LOSSES = {
    "dpo": "DPO is loss_type = 'sigmoid'",
    "aot_pair": "it is 'aot_unpaired' (of two answers to one prompt: 'aot')",
    "kto_pair": "TRL has taken it out; pairs can be read as dataset_type = 'unpaired', for loss_type = 'kto'",
    "bco": "of pairs it is 'bco_pair'",
    "rpo": "it is loss_type = ['sigmoid', 'sft'] with loss_weights = [1.0, rpo_alpha]",
    "drpo": "it is not built: its published descriptions do not agree",
    "repr_po": "representation losses are not built yet",
    "reprpo": "representation losses are not built yet",
}


def _known_losses(value: Any) -> Any:
    """Losses under other names, or that are not built, are refused with what to do."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and (what := _OTHER_LOSSES.get(name.lower())):
            raise ValueError(f"'{name}': {what}")
    return value


def _known_types(value: Any) -> Any:
    if value in ("representation", "circuit_breaker"):
        raise ValueError("representation losses and circuit breakers ([[objective.tap]]) are not built yet")
    return value


def _precomputed(value: Any) -> Any:
    if value is False:
        raise ValueError(
            "a reference that runs beside each micro-batch is not built yet; it is computed once before the first step"
        )
    return value


class Reference(Section):
    """[objective.reference]"""

    model: str = Field(
        "base", min_length=1, description="what losses compare with: 'base' (no adapter), 'start' (the adapter as this run starts with it; it belongs to the run), or the folder of an adapter of the kind, modules and ranks that are trained")  # fmt: skip
    precompute_ref_log_probs: Annotated[bool, BeforeValidator(_precomputed)] = Field(
        True, description="the reference's log-probabilities are computed by one pass before the first step, and kept; false is not built"
    )  # fmt: skip


class Objective(Section):
    """[objective]"""

    type: Annotated[Literal["language_modelling", "preference"], BeforeValidator(_known_types)] = Field(
        description="'language_modelling' is the next token; 'preference' compares answers (docs/preference.md)"
    )
    loss_type: Annotated[LossType | list[LossType], BeforeValidator(_known_losses)] = Field(
        "sigmoid", description="one loss, or several that are added: TRL's names; 'cdpo', 'simpo', 'cpo' and 'orpo' are also of pairs, 'kto' and 'apo_zero_unpaired' of dataset_type = 'unpaired', 'plackett_luce' of 'ranked'")  # fmt: skip
    loss_weights: list[PositiveFloat] | None = Field(None, description="a weight for each of loss_type; default 1 each")
    beta: PositiveFloat = Field(
        0.1, description="how far the model may leave the reference: β of the losses; λ of 'orpo'"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="ε, the share of pairs that are the wrong way round; of 'robust', 'cdpo', 'exo_pair' (which needs one), 'aot', 'aot_unpaired', 'simpo' and 'cpo'")  # fmt: skip
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description="of 'sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'exo_pair', 'robust', 'cdpo' and 'discopop'"
    )  # fmt: skip
    f_alpha_divergence_coef: float = Field(0.5, description="α of 'alpha_divergence'")
    discopop_tau: PositiveFloat = Field(0.05, description="τ of 'discopop'")
    simpo_gamma: NonNegativeFloat = Field(0.5, description="γ of 'simpo', the margin")
    cpo_alpha: NonNegativeFloat = Field(1.0, description="of 'cpo': the weight of the chosen answer's likelihood")
    desirable_weight: PositiveFloat = Field(
        1.0, description="of 'kto' and 'apo_zero_unpaired': the weight of good answers"
    )
    undesirable_weight: PositiveFloat = Field(1.0, description="the same: the weight of bad answers")
    reference: Reference = Field(Reference.model_validate({}))


class Rl(Section):
    """[rl]"""

    method: Literal["dpo"] = Field(
        description="qlora-pipe's: [objective] type = 'preference' with loss_type = 'sigmoid'"
    )
    dpo_beta: PositiveFloat = Field(0.1, description="objective.beta")
