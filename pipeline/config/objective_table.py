"""The tables of a config that say what is minimised: [objective], [objective.reference], and qlora-pipe's [rl].

Every key with its default, unit, bound and meaning, as in pipeline/config/schema.py, which has the top level. Names and
meanings are TRL's. What goes with which loss is for `training/start/objective.py` to say, which knows the losses.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

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
    "repr_po": "its losses are of hidden states: type = 'representation', with [[objective.tap]]",
    "reprpo": "its losses are of hidden states: type = 'representation', with [[objective.tap]]",
}


def _known_losses(value: Any) -> Any:
    """Losses under other names, or that are not built, are refused with what to do."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and (what := _OTHER_LOSSES.get(name.lower())):
            raise ValueError(f"'{name}': {what}")
    return value


Slot = Literal["chosen", "rejected", "breaker", "retain"]
DistanceType = Literal[
    "l2", "squared", "normalised", "cosine", "relu_cosine", "combined", "adaptive", "top_k", "symlog", "correlation",
    "projection", "orthogonal",
]  # fmt: skip
_OTHER_DISTANCES = {
    "mse": "of the mean over the hidden size it is 'squared'; what ReprPO's journal calls MSE is 'l2'",
    "norm": "it is 'l2'",
    "cka": "it is not built: of one row against another it is 'correlation'",
    "prefvec": "its well-defined halves are 'projection' and 'orthogonal'",
    "svd": "transforms of hidden states are not built: where they are learnt, the loss can be lowered by the transform alone",
    "suppressed": "transforms of hidden states are not built",
    "supressed": "transforms of hidden states are not built",
}


def _known_distances(value: Any) -> Any:
    """Distances under other names, or that are not built, are refused with what to do."""
    if isinstance(value, str) and (what := _OTHER_DISTANCES.get(value.lower())):
        raise ValueError(f"'{value}': {what}")
    return value


class Tap(Section):
    """[[objective.tap]]"""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="what it is called in metrics: 'tap/<name>'")
    of: Slot = Field(
        description="the row of a unit whose hidden states are trained: 'chosen' or 'rejected'; with circuit breakers 'breaker' or 'retain'")  # fmt: skip
    to: Slot | None = Field(
        None, description="the row whose states under the reference these are compared with; default the same row. Of 'projection' and 'orthogonal' the other answer: the direction is from `to` towards `of`")  # fmt: skip
    layers: list[int | str] | str = Field(
        description="decoder layers whose outputs are compared, counted from 0: [10, 20], as parts of the depth ['0.33', '0.67'], or 'all' (from the first trained one on); distances of several are added")  # fmt: skip
    distance: Annotated[DistanceType, BeforeValidator(_known_distances)] = Field(
        description="between a state x and the reference's y (docs/preference.md has the formulas)"
    )
    mask: Literal["completion", "all"] = Field(
        "completion", description="which tokens count: those that are trained (answers), or all of the row; of two rows' tokens, those that count in both")  # fmt: skip
    align: Literal["token", "mean"] = Field(
        "token", description="tokens are compared with each other by their place, or the rows' mean states; of 'projection' and 'orthogonal' always means")  # fmt: skip
    weight: NonNegativeFloat = Field(
        1.0, description="of the loss, beside the other taps and loss_type; 0 is measured only"
    )
    schedule: Literal["constant", "1 - p/2", "p/2", "p", "1 - p"] = Field(
        "constant", description="by which weight is multiplied; p grows from 0 at the run's first step to 1 at its end"
    )
    relative: bool = Field(
        False, description="of 'l2': divided by the mean norm of the reference's states, so that a weight carries over between layers and models")  # fmt: skip
    alpha: float = Field(
        0.5, ge=0, le=1, description="of 'combined': the weight of the direction; of the norms 1 − alpha"
    )
    threshold: float = Field(
        0.9, ge=-1, le=1, description="of 'adaptive': the cosine above which it is 'squared', else 'cosine'"
    )
    k: PositiveInt = Field(
        16, description="of 'top_k': how many of a state's numbers count, those that are furthest apart"
    )


class Reference(Section):
    """[objective.reference]"""

    model: str = Field(
        "base", min_length=1, description="what losses compare with: 'base' (no adapter), 'start' (the adapter as this run starts with it; it belongs to the run), or the folder of an adapter of the kind, modules and ranks that are trained")  # fmt: skip
    precompute_ref_log_probs: bool = Field(
        True, description="the reference's log-probabilities are computed by one pass before the first step, and kept; with false the reference runs beside the model in every step, which costs a forward pass each time and keeps nothing (not of 'start')"
    )  # fmt: skip


class Objective(Section):
    """[objective]"""

    type: Literal["language_modelling", "preference", "representation", "circuit_breaker"] = Field(
        description="'language_modelling' is the next token; 'preference' compares answers, 'representation' their hidden states (of pairs), 'circuit_breaker' hidden states of two streams of rows (docs/preference.md)"
    )
    loss_type: Annotated[LossType | list[LossType] | None, BeforeValidator(_known_losses)] = Field(
        None, description="one loss, or several that are added; default 'sigmoid', of 'representation' none. TRL's names; 'cdpo', 'simpo', 'cpo' and 'orpo' are also of pairs, 'kto' and 'apo_zero_unpaired' of dataset_type = 'unpaired', 'plackett_luce' of 'ranked'")  # fmt: skip
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
    tap: list[Tap] = Field([], description="of 'representation' and 'circuit_breaker'")


class Rl(Section):
    """[rl]"""

    method: Literal["dpo"] = Field(
        description="qlora-pipe's: [objective] type = 'preference' with loss_type = 'sigmoid'"
    )
    dpo_beta: PositiveFloat = Field(0.1, description="objective.beta")
