"""What is minimised, from the config's [objective] or [rl] and the data; refuses what does not go together.

Takes the tables and a few of the run's keys; gives an `ObjectiveSpec`, None for language modelling, or one UserError.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.data_tables import UNITS, Dataset, EvalDataset
from pipeline.config.objective_table import Objective, Rl
from pipeline.console import CollectedErrors, UserError, log, warn
from pipeline.objectives.preference_losses import LOSSES, Mixture, Settings
from pipeline.objectives.representation import Tap
from pipeline.training.stage.taps import BREAKERS, described_tap, taps_of

OF_STATES = ("representation", BREAKERS)  # types that have taps


@dataclass(frozen=True)
class ObjectiveSpec:
    """Preference training: the losses of answers (None: of hidden states alone), the rows of a unit, the reference ('base',
    'start' or a folder; None where nothing reads one), the taps on hidden states, and whether the reference's log-probabilities
    are computed in the step."""

    mixture: Mixture | None
    slots: int
    reference: str | None
    taps: tuple[Tap, ...] = ()
    live: bool = False

    @property
    def cached(self) -> bool:
        """Whether the reference's log-probabilities are computed before the first step."""
        return self.mixture is not None and self.mixture.reads_reference and not self.live

    @property
    def reference_slots(self) -> tuple[int, ...]:
        """Which rows of a unit the reference runs in every step."""
        own = {slot for tap in self.taps for slot in tap.reference_slots}
        return tuple(range(self.slots)) if self.live else tuple(sorted(own))


@dataclass(frozen=True)
class Around:
    """Keys of the run that a loss may not go with. `in_full`: whether weights of the base are trained; `starts_from`:
    init_adapter."""

    units_at_once: int | None  # None: as many as batch_size_tokens holds
    in_full: bool
    starts_from: str | None
    train_logit_scale: float
    dropout: float
    start_from_weight: bool
    layers: int = 0  # of the model
    trained: tuple[int, ...] = ()  # those with an adapter
    router_loss: bool = False


def spec_of(
    objective: Objective | None,
    rl: Rl | None,
    datasets: Sequence[Dataset],
    held_out: Sequence[EvalDataset],
    around: Around,
) -> ObjectiveSpec | None:
    """The objective; says it in words. UserError with all that does not go together."""
    if objective is not None and rl is not None:
        raise UserError("rl: [rl] is qlora-pipe's table for what [objective] says; remove one of them")
    if rl is not None:
        objective = Objective.model_validate({"type": "preference", "beta": rl.dpo_beta})
    every: list[Dataset | EvalDataset] = [*datasets, *held_out]
    if objective is None or objective.type == "language_modelling":
        _check_streams(datasets, held_out, objective)
        _check_data(every, None)
        return None
    errors = CollectedErrors()
    with errors.collect():
        _check_streams(datasets, held_out, objective)
    with errors.collect():
        mixture = mixture_of(objective) if objective.type not in OF_STATES or objective.loss_type else None
        if objective.type != BREAKERS:
            _check_data(every, mixture.data if mixture else "preference")
    errors.raise_all()
    taps = _taps(objective, mixture, around)
    ranked = mixture is not None and mixture.data == "ranked"
    slots = sorted({dataset.ranks if ranked else 2 for dataset in every})
    if len(slots) > 1:
        raise UserError(f"datasets.ranks: all datasets of a run need the same number, and they have {slots}")
    problems = [*_loss_problems(objective, mixture, around)] if mixture else []
    scores = mixture is not None and mixture.reads_reference
    live = scores and not objective.reference.precompute_ref_log_probs
    reads = bool(taps) or scores
    generates = any(dataset.generates for dataset in datasets)
    if live and generates:
        problems.append(
            "objective.reference.precompute_ref_log_probs: with rejected = 'generate' the reference scores the answers before "
            "each step; remove it"
        )
    beside = live or bool(taps)
    for problem in (*problems, *(_reference_problems(objective, around, generates, beside) if reads else ())):
        with errors.collect():
            raise UserError(problem)
    errors.raise_all()
    reference = objective.reference.model if reads else None
    data = mixture.data if mixture else "preference" if objective.type != BREAKERS else "circuit-breaker"
    losses = [described(mixture)] if mixture else []
    log(
        f"minimised: {' + '.join([*losses, *map(described_tap, taps)])}, of {data} data"
        + (f", against {reference}" if reference else "")
        + (", which runs beside it" if live else "")
    )
    _say_unreached(taps, mixture, around)
    if around.dropout:
        warn(
            f"lora_dropout = {around.dropout:g}: TRL turns dropout off in preference training, as it is noise in every comparison"
        )
    if reference is None and "reference" in objective.model_fields_set:
        warn("objective.reference: none of these losses reads one")
    return ObjectiveSpec(mixture, slots[0], reference, taps, live)


def mixture_of(objective: Objective) -> Mixture:
    """The losses and their weights. UserError where these do not fit each other."""
    given = objective.loss_type or "sigmoid"
    names = given if isinstance(given, list) else [given]
    weights = objective.loss_weights or [1.0] * len(names)
    if len(weights) != len(names) or len(set(names)) < len(names):
        raise UserError(
            f"objective.loss_weights: {len(weights)} for {len(names)} losses; each of loss_type is named once and has one"
        )
    kinds = {LOSSES[name].data for name in names}
    if len(kinds) > 1:
        raise UserError(
            f"objective.loss_type: {_listed(names)} are of {_listed(sorted(kinds))} data; they cannot be added"
        )
    settings = Settings(
        beta=objective.beta,
        label_smoothing=objective.label_smoothing,
        divergence=objective.f_divergence_type,
        alpha=objective.f_alpha_divergence_coef,
        discopop_tau=objective.discopop_tau,
        simpo_gamma=objective.simpo_gamma,
        cpo_alpha=objective.cpo_alpha,
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
    )
    return Mixture(dict(zip(names, weights, strict=True)), settings)


def described(mixture: Mixture) -> str:
    """The losses in words: '1 · sigmoid + 0.1 · sft'."""
    return " + ".join(f"{weight:g} · {name}" for name, weight in mixture.weights.items())


def _check_data(datasets: Sequence[Dataset | EvalDataset], wanted: str | None) -> None:
    """UserError for a dataset that the objective cannot be trained on or measured with. `wanted`: None for rows by themselves."""
    for dataset in datasets:
        kind = dataset.dataset_type
        if wanted is None and kind in UNITS:
            raise UserError(
                f"dataset_type = '{kind}': answers are compared with [objective] type = 'preference'; without it the next token "
                "is trained, of other types of dataset"
            )
        if wanted is not None and kind != wanted:
            raise UserError(
                f"dataset_type = '{kind}': this loss_type is of dataset_type = '{wanted}', for all datasets of the run"
            )


def _loss_problems(objective: Objective, mixture: Mixture, around: Around) -> list[str]:
    """What the losses do not go with, a message each."""
    names, found = list(mixture.weights), []
    smoothing = mixture.settings.label_smoothing
    if "exo_pair" in names and not smoothing:
        found.append("objective.label_smoothing: 'exo_pair' takes its logarithm, and needs one above 0 (1e-3)")
    if smoothing and not any(LOSSES[name].smoothed for name in names):
        smoothed = [name for name, loss in LOSSES.items() if loss.smoothed]
        found.append(f"objective.label_smoothing: has no effect on {_listed(names)}; it is for {_listed(smoothed)}")
    if mixture.settings.divergence != "reverse_kl" and not any(LOSSES[name].by_divergence for name in names):
        found.append(f"objective.f_divergence_type: has no effect on {_listed(names)}; remove it")
    compares = [name for name in names if LOSSES[name].compares]
    if compares and around.units_at_once == 1:
        found.append(
            f"micro_batch_size_per_gpu: {_listed(compares)} compares the units of a micro-batch; give 2 or more"
        )
    if around.train_logit_scale != 1:
        found.append(
            "train_logit_scale: the reference's logits are not scaled; remove it with [objective] type = 'preference'"
        )
    return found


def _reference_problems(objective: Objective, around: Around, generates: bool, beside: bool) -> list[str]:
    """Why the reference is not what it is called, a message each. `generates`: whether the model gives answers itself; `beside`:
    whether the reference runs in every step."""
    found, model = list[str](), objective.reference.model
    if beside and around.router_loss:
        found.append(
            "load_balancing_loss_coef: not built together with a reference that runs in every step, as for [[objective.tap]]; "
            "set it to 0"
        )
    if beside and model == "start":
        found.append(
            "objective.reference.model = 'start': what runs in every step is the base, or an adapter in a folder; write the "
            "folder that init_adapter names, which is the same (without one it is 'base')"
        )
    elif model not in ("base", "start") and not around.trained:
        found.append(
            f"objective.reference.model = '{model}': an adapter is put in the place of the one that is trained, and "
            "full_fine_tune trains none; write 'start'"
        )
    elif model == "base":
        if around.in_full:
            found.append(
                "objective.reference.model: 'base' is the model with its adapters off, and full_fine_tune or trainable_modules "
                "change the model itself; write 'start'"
            )
        if around.starts_from and "reference" not in objective.model_fields_set:
            found.append(
                "objective.reference: init_adapter goes on from an adapter; say with model = 'start' that the losses compare "
                "with it, or with model = 'base' that they do not"
            )
        if around.start_from_weight:
            found.append(
                "objective.reference.model: with this init_lora_weights the base without its adapters is another model; write "
                "'start'"
            )
    if objective.reference.model == "start" and generates:
        found.append(
            "objective.reference.model: 'start' cannot say anything of answers that are given later (rejected = 'generate'), as "
            "the adapter is another then; write 'base', the folder in init_adapter, or take a loss without a reference"
        )
    return found


def _taps(objective: Objective, mixture: Mixture | None, around: Around) -> tuple[Tap, ...]:
    """The taps. UserError where there are none, or where they do not go with the rest."""
    if objective.type not in OF_STATES:
        if objective.tap:
            raise UserError(
                "objective.tap: taps on hidden states are of type = 'representation', which also takes loss_type, or of "
                "'circuit_breaker'"
            )
        return ()
    if not objective.tap:
        raise UserError(f"objective.tap: type = '{objective.type}' needs one [[objective.tap]] or more")
    if objective.type == BREAKERS and mixture is not None:
        raise UserError("objective.loss_type: rows of two streams are not compared with each other; remove it")
    if mixture is not None and mixture.data != "preference":
        raise UserError(
            f"objective.loss_type: with taps, losses are of pairs, and {described(mixture)} is of {mixture.data} data"
        )
    if around.in_full or not around.trained:
        raise UserError(
            "objective.tap: the reference is the model without its adapter, in the same step; full_fine_tune and "
            "trainable_modules leave none"
        )
    return taps_of(objective.tap, objective.type, around.layers, around.trained)


def _say_unreached(taps: Sequence[Tap], mixture: Mixture | None, around: Around) -> None:
    """Warn of adapters above the last tap where nothing else is minimised: they get no gradient, and only decay."""
    if not taps or mixture is not None:
        return
    last = max(tap.layers[-1] for tap in taps)
    if max(around.trained) > last:
        warn(
            f"layers_to_transform: no gradient reaches the adapters above layer {last}, the last tap's, and nothing else is "
            f"minimised: they learn nothing. Set layers_to_transform = '{min(around.trained)}:{last}'"
        )


def _check_streams(datasets: Sequence[Dataset], held_out: Sequence[EvalDataset], objective: Objective | None) -> None:
    """UserError for rows of two streams without an objective for them, and for one without its streams."""
    kind = objective.type if objective else "language_modelling"
    if kind != BREAKERS:
        if any(dataset.stream for dataset in datasets):
            raise UserError("datasets.stream: rows of two streams are for [objective] type = 'circuit_breaker'")
        return
    if held_out:
        raise UserError("eval_datasets: circuit breakers are measured on what both streams hold out (eval_size)")
    for number, dataset in enumerate(datasets):
        if dataset.stream is None or dataset.dataset_type in UNITS:
            raise UserError(
                f"datasets.{number}: circuit breakers take rows by themselves ('chat', 'completion', 'textfile', …), each "
                "dataset with stream = 'breaker' or 'retain'"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
