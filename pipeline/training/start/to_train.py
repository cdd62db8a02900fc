"""What a run trains, of the config: the adapter on this model's modules, modules set free, or the model's own weights.

Says it in words, or raises one UserError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.console import UserError, log, warn
from pipeline.formats.dtypes import DTYPES, dtype_name
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights
from pipeline.model import weights
from pipeline.model.adapters import by_peft, experts, parameters
from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.targets import describe_layers, describe_targets, resolve_layers, resolve_targets, routers
from pipeline.model.stage import tied_head
from pipeline.model.structure.parts import layers_of_model, parts_of
from pipeline.names import layers_of, within_layer
from pipeline.peft.types import PATTERNS, Asked, settings_of
from pipeline.training.optim import parameter_groups
from pipeline.training.stage import families, initial_adapter, parts, patterns
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import AdapterSpec, BaseModel, Trained, size_of


def trained_of(config: Config, base: BaseModel, model: PreTrainedModel) -> Trained:
    """What is trained of this model; says it in words."""
    tied = tied_head(model)
    if config.full_fine_tune:
        return Trained(None, own_weights(config.target_modules, model), tied=tied)
    adapter = resolve_adapter(config, model)
    in_full = trained_modules.resolve(model, config.trainable_modules, adapter.targets)
    if in_full:
        described = trained_modules.describe(model, config.trainable_modules, in_full)
        log(f"          and in full, in {dtype_name(base.dtype)}: {described}")
    return Trained(adapter, in_full=in_full, tied=tied)


def check_groups(
    specials: Sequence[parameter_groups.ParamGroupOverride], meta_model: MetaModel, trained: Trained
) -> None:
    """UserError for a name in [[optimizer.groups]] that nothing trained has. A tied head goes by its embedding's name."""
    if specials:
        names = trainable(parts.whole_on_meta(meta_model, trained))
        parameter_groups.check(specials, [name for name in names if name not in trained.tied])


def check_copies(trained: Trained, model: PreTrainedModel, *, noise: bool) -> None:
    """UserError for what changes the embedding where each stage has one, because layers are given something made of the ids."""
    parts = parts_of(model)
    if not parts.rereads_ids:
        return
    copied = tuple(f"{one}." for one in (parts.embedding, *parts.entry))
    wrong = {
        "full_fine_tune": trained.adapter is None,
        "trainable_modules": any(name.startswith(copied) for name in trained.in_full),
        "neftune_noise_alpha": noise,
    }
    if keys := [key for key, is_wrong in wrong.items() if is_wrong]:
        raise UserError(
            f"{', '.join(keys)}: the layers of model_type '{model.config.model_type}' are given vectors of their own, made of "
            "the embedding, of which each stage has a copy; these would come apart. Use pipeline_stages = 1, or leave it out"
        )


def initial_adapter_of(trained: Trained, folder: str) -> dict[str, Tensor]:
    """All that init_adapter's `folder` holds, by global name. UserError where it is not what this run trains."""
    if trained.adapter is None:
        raise ValueError("the config refuses init_adapter with full_fine_tune")
    return families.saved(trained.adapter, folder) | initial_adapter.read_in_full(folder, trained.in_full, trained.tied)


def own_weights(targets: list[str] | str | None, model: PreTrainedModel) -> list[str] | None:
    """Of full fine-tuning: target_modules, said in words; UserError where the weights cannot be trained or saved."""
    weights.check_saved_as_run(model)
    if isinstance(targets, str):
        raise UserError(
            "target_modules = 'all-linear': with full_fine_tune, give names of modules, or leave the key out to train everything"
        )
    there = {part for name, _ in model.named_parameters() for part in name.split(".")}
    if unknown := [name for name in targets or () if name not in there]:
        raise UserError(
            f"target_modules: no parameter has {', '.join(unknown)} in its name; there are {', '.join(sorted(there))}"
        )
    which = "" if targets is None else f", those of {', '.join(targets)}"
    log(f"training: the model's own weights{which}")
    return targets


def resolve_adapter(config: Config, model: PreTrainedModel) -> AdapterSpec:
    """The adapter on this model's modules, which it fits; says it in words."""
    n_layers = len(layers_of_model(model))
    layers = resolve_layers(config.layers_to_transform, n_layers)
    names = wanted_modules(config.adapter_type, config.target_modules)
    mixture = mixture_of(config.adapter_type, names, model)
    modules = resolve_targets(model, names, layers, mixture) if names else []
    of_parameters = parameters.shapes(model, parameters.resolve(model, config.target_parameters, layers))
    targets = [*modules, *of_parameters]
    experts_of = {name: mixture[within_layer(name)] for name in modules if within_layer(name) in mixture}
    biased = any(getattr(model.get_submodule(name), "bias", None) is not None for name in modules)
    biased = biased or any(form.bias for form in experts_of.values())
    table = config.peft.model_dump() if config.peft else None
    asked = asked_of(table, config.lora_dropout, targets, model)
    adapter = replace(adapter_of(config, targets, biased, experts_of), by_peft=asked, parameters=of_parameters)
    families.check_fits(adapter, model)
    where = "the output of" if adapter.row.on_output else "the weights of"
    named = "all linear modules" if names == "all-linear" else ", ".join(names) or "no linear module"
    log(f"training: {adapter.family} on {where} {named}, {describe_layers(layers_of(targets), n_layers)}")
    for line in describe_targets(model, modules, layers, experts_of, list(of_parameters)):
        log(f"          {line}")
    if names == "all-linear" and (left_out := routers(model, layers)):
        log(f"          without {', '.join(left_out)}, which only choose")
    log(f"          {families.describe(adapter)}")
    return adapter


def wanted_modules(adapter_type: str, given: list[str] | str | None) -> list[str] | str:
    """target_modules as `given`, which may be none beside target_parameters; else the family's default."""
    return families.default_targets(adapter_type) if given is None else given


def mixture_of(adapter_type: str, names: list[str] | str, model: PreTrainedModel) -> dict[str, ExpertWeights]:
    """The modules of experts that `names` may mean, by their name within a layer. UserError where the family has none."""
    if isinstance(names, str) or not experts.has_experts(model):
        return {}
    if families.FAMILIES[adapter_type].on_output:
        return experts.find(model.config)
    if experts.EXPERTS in names:
        raise UserError(
            f"target_modules: adapter_type = '{adapter_type}' changes what a module reads, and the experts of a layer "
            "are one module here; 'multiplicative_lora' and 'control_adapter' change what they write"
        )
    return {}


def adapter_of(
    config: Config,
    targets: list[str],
    biased_targets: bool = False,
    experts_of: Mapping[str, ExpertWeights] = NO_EXPERTS,
) -> AdapterSpec:
    """The configured adapter on `targets`. UserError for a key that names a module which is none of them."""
    rank, alpha, rslora = config.lora_rank, config.lora_alpha, config.use_rslora
    patterns.check({"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}, targets)
    if unknown := set(config.feedforward_modules or ()) - {name.rpartition(".")[2] for name in targets}:
        raise UserError(f"feedforward_modules: {', '.join(sorted(unknown))} is none of target_modules")
    sizes = {name: size_of(rank, alpha, rslora) for name in targets}
    if rank is not None and alpha is not None:
        own = {n: patterns.resolve(n, rank, alpha, config.rank_pattern, config.alpha_pattern) for n in targets}
        sizes = {name: size_of(*rank_and_alpha, rslora) for name, rank_and_alpha in own.items()}
    return AdapterSpec(
        family=config.adapter_type,
        sizes=sizes,
        common=size_of(rank, alpha, rslora),
        dtype=DTYPES[config.lora_weight_dtype],
        dropout=config.lora_dropout,
        seed=config.seed,
        biased_targets=biased_targets,
        use_rslora=rslora,
        use_dora=config.use_dora,
        start=config.init_lora_weights,
        block_size=config.oft_block_size or config.boft_block_size,
        feedforward=tuple(families.feedforward(config.adapter_type, config.feedforward_modules, targets)),
        experts=dict(experts_of),
    )


def asked_of(
    table: Mapping[str, Any] | None, dropout: float, targets: list[str], model: PreTrainedModel
) -> Asked | None:
    """The table [peft], checked by PEFT, where there is one. UserError with every key that PEFT does not take."""
    if table is None:
        return None
    from pipeline.peft.layers import check_settings

    peft_type, settings = table["type"], settings_of(table, dropout)
    check_settings(peft_type, settings, by_peft.WHERE)
    patterns.check({f"{by_peft.WHERE}{key}": settings[key] for key in PATTERNS if settings.get(key)}, targets)
    unbiased = next((name for name in targets if getattr(model.get_submodule(name), "bias", None) is None), "")
    asked = Asked(peft_type, settings, by_peft.shapes_of(model, targets), unbiased)
    if asked.not_folded:
        warn(f"{asked.not_folded}: the adapter is for PEFT to load, and merge_lora.py will refuse it")
    return asked
