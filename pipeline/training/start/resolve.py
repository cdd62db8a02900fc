"""`Config` → `Resolved`: what a run is, with the model's structure looked at and nothing of it read.

Says what it resolves to (layers, modules, stages), or raises one UserError. What follows takes its plain values; the config
itself goes no further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.schema import Config
from pipeline.config.tables import Samples
from pipeline.config.tables import Sampling as TableOfSampling
from pipeline.console import CollectedErrors, UserError, gib, log, log_if_slow, warn
from pipeline.data.reading.sources import find
from pipeline.files import check_writable
from pipeline.formats.base_model import stop_ids
from pipeline.formats.dtypes import DTYPES, dtype_name
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights
from pipeline.generation import cache_check
from pipeline.generation.prompts import read_prompts
from pipeline.generation.sampling import Sampling
from pipeline.model import cut_check, quantized, router_loss, unsupported, weights
from pipeline.model.adapters import by_peft, experts, parameters
from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters.base import trainable
from pipeline.model.adapters.targets import describe_layers, describe_targets, resolve_layers, resolve_targets, routers
from pipeline.model.stage import read_model_config, tied_head
from pipeline.model.structure.parts import layers_of_model, parts_of
from pipeline.model.trial import attention_check, packing_check
from pipeline.names import id_in_cache, layers_of, within_layer
from pipeline.peft.types import PATTERNS, Asked, settings_of
from pipeline.planning import cut, formula
from pipeline.training.optim import parameter_groups
from pipeline.training.stage import families, initial_adapter, parts, patterns
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import AdapterSpec, BaseModel, Trained, size_of
from pipeline.training.start.objective import Around, spec_of
from pipeline.training.start.resolved import DataSpec, GenerationSpec, Intervals, Layout, Resolved, SampleSpec, Updates


def resolve(config: Config, *, resumes: bool = False) -> Resolved:
    """Read config.json, resolve layers and target modules, cut into stages; says what it resolved to.

    `resumes`: whether the run goes on from a checkpoint, whatever the config says: then init_adapter is not looked at.
    """
    model_config = read_model_config(config.model)
    with unsupported.named(model_config.model_type, "looking at its structure"):
        resolved = _resolve(config, model_config, resumes)
    attention_check.check(model_config, config.attn_implementation, resolved.base.dtype)
    if sentence := unsupported.router_loss(model_config, trained=bool(resolved.router_loss)):
        warn(sentence)
    check_tiny(resolved, resolved.ranges)
    sets = [*resolved.data.datasets, *resolved.data.eval_datasets]
    packed = [dataset for dataset in sets if dataset.keeps_apart]
    if not packed:
        return resolved
    cut_in = max((dataset.sequence_len for dataset in packed if dataset.packing != "best_fit"), default=None)
    way = packing_check.check(model_config, config.attn_implementation, cut_in=cut_in)
    return replace(resolved, kept_apart_by=way)


@log_if_slow("starting: looking at the model, without its weights")
def _resolve(config: Config, model_config: PretrainedConfig, resumes: bool) -> Resolved:
    base = base_of(config)
    meta_model = MetaModel(model_config, base.dtype, base.attn_implementation, base.scheme)
    model = meta_model.shared
    check_apart(config, model)
    if base.scheme:
        linear = sum(isinstance(part, quantized.QuantizedPlaceholder) for part in model.modules())
        stacked = quantized.marked_within(model)
        log(f"base:     {linear} linear layers{', the experts of each layer' if stacked else ''} in {base.scheme}")
        if stacked:
            quantized.check_experts(model_config, stacked)
    trained = trained_of(config, base, model)
    if config.init_adapter and not (resumes or config.resume_from_checkpoint):
        initial_adapter_of(trained, config.init_adapter)
        log(f"          begins with the weights of {config.init_adapter}")
    check_groups(parameter_groups.specials(config.optimizer), meta_model, trained)
    data = replace(data_of(config), rope_switch=packing_check.switches_at(model_config))
    router_weight = router_loss_of(config.load_balancing_loss_coef, model)
    around = Around(
        units_at_once=None if config.batch_size_tokens else config.micro_batch_size_per_gpu,
        in_full=config.full_fine_tune or bool(config.trainable_modules),
        starts_from=config.init_adapter,
        train_logit_scale=config.train_logit_scale,
        dropout=config.lora_dropout,
        start_from_weight=config.init_lora_weights is not True,
        layers=len(layers_of_model(model)),
        trained=tuple(layers_of(trained.adapter.targets)) if trained.adapter else (),
        router_loss=bool(router_weight),
    )
    objective = spec_of(config.objective, config.rl, config.datasets, config.eval_datasets, around)
    tokens, budget, slots = (
        max(d.sequence_len for d in config.datasets),
        config.batch_size_tokens,
        objective.slots if objective else 1,
    )
    layout = Layout(
        config.pipeline_stages,
        config.layers_per_stage,
        rows=max(slots, budget // tokens) if budget else slots * config.micro_batch_size_per_gpu,
        tokens=tokens,
        accumulation=config.gradient_accumulation_steps,
        checkpointing=config.activation_checkpointing,
        host_gib=config.host_memory_gib,
        link_gbit_per_s=config.link_gbit_per_s,
        kernels=config.kernels,
    )
    updates = Updates(
        config.optimizer,
        clip=config.gradient_clipping,
        product_decay=config.composite_weight_decay,
        largest_norm=config.scale_weight_norms,
        lr_shape=config.lr_scheduler,
        warmup=config.warmup_steps,
        constant_lr=config.force_constant_lr,
    )
    streams = any(dataset.streaming for dataset in config.datasets)  # without epochs
    intervals = Intervals(**{field.name: getattr(config, field.name) for field in fields(Intervals)})
    if streams:  # a window is no epoch
        intervals = replace(intervals, save_every_n_epochs=None, save_checkpoint_on_epoch_end=False)
    if config.pipeline_stages > 1:
        check_copies(trained, model, noise=bool(config.neftune_noise_alpha))
    ranges = cut_into_stages(layout, model, trained)
    return Resolved(base, meta_model, trained, ranges, updates, layout, data, intervals, router_weight, objective)


def data_of(config: Config) -> DataSpec:
    """The data as the config has it."""
    keeps_base = not config.full_fine_tune and not config.trainable_modules
    return DataSpec(
        config.datasets,
        config.eval_datasets,
        cache=Path(config.output_dir) / "dataset_cache",
        processes=config.dataset_processes,
        stops=stop_ids(Path(config.model)),
        combination=config.dataset_combination_mode,
        stopping=config.dataset_interleave_stopping_strategy,
        mix_by=config.mix_by,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size_per_gpu,
        batch_size_tokens=config.batch_size_tokens,
        accumulation=config.gradient_accumulation_steps,
        group_by_length=config.group_by_length,
        epochs=config.epochs,
        max_steps=config.max_steps,
        samples=samples_of(config.samples, config.model, config.datasets, keeps_base),
        generation=generation_of(config.sampling, config.datasets),
    )


def generation_of(s: TableOfSampling | None, datasets: Sequence[Dataset]) -> GenerationSpec | None:
    """How the model answers prompts that it is trained on; None where it does not."""
    if not any(dataset.generates for dataset in datasets):
        return None
    s = s or TableOfSampling.model_validate({})
    drawn = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.temperature_last, s.seed)
    return GenerationSpec(drawn, s.max_new_tokens)


def samples_of(s: Samples | None, folder: str, datasets: Sequence[Dataset], keeps_base: bool) -> SampleSpec | None:
    """What the model in `folder` is asked while it is trained. `keeps_base`: whether its own weights stay as they are.

    UserError for a file of prompts that has none.
    """
    if s is None:
        return None
    prompts = read_prompts(Path(s.prompts_file), "samples.prompts_file") if s.prompts_file else s.prompts
    spoken = next((dataset for dataset in datasets if dataset.dataset_type == "chat"), None)
    return SampleSpec(
        folder,
        tuple(prompts),
        chat=spoken is not None if s.chat is None else s.chat,
        system=s.system,
        chat_template=spoken.chat_template if spoken else None,
        template_kwargs=dict(spoken.chat_template_kwargs) if spoken else {},
        merge_system=spoken is not None and spoken.merge_system,
        sampling=Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.temperature_last, s.seed),
        max_new_tokens=s.max_new_tokens,
        compare=keeps_base if s.compare is None else s.compare,
        every_steps=s.every_steps,
        at_start=s.at_start,
        at_end=s.at_end,
    )


def base_of(config: Config) -> BaseModel:
    """The base model as the config has it."""
    dtype, scheme = DTYPES[config.model_weight_dtype], None
    if config.quantization is not None:
        scheme = quantized.Scheme.from_bnb(config.quantization.bnb.model_dump(), dtype)
    name = config.hub_base_model or id_in_cache(Path(config.model)) or config.model
    return BaseModel(config.model, dtype, config.attn_implementation, scheme, name)


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


def check_apart(config: Config, model: PreTrainedModel) -> None:
    """UserError with all mistakes at once that have nothing to do with each other: layers, modules, stages, paths."""
    errors, n_layers = CollectedErrors(), len(layers_of_model(model))
    layers = list(range(n_layers))
    with errors.collect():
        check_writable(Path(config.output_dir), "output_dir")
    if not config.full_fine_tune:
        names = wanted_modules(config.adapter_type, config.target_modules)
        with errors.collect():
            layers = resolve_layers(config.layers_to_transform, n_layers)
        if names:
            with errors.collect():
                resolve_targets(model, names, layers, mixture_of(config.adapter_type, names, model))
        with errors.collect():
            parameters.resolve(model, config.target_parameters, layers)
        with errors.collect():
            trained_modules.resolve(model, config.trainable_modules, [])
    with errors.collect():
        cut.check_possible(config.layers_per_stage, config.pipeline_stages, n_layers)
    # Looking for files warns of what it finds, and it is done again when they are read.
    datasets: list[Dataset | EvalDataset] = [*config.datasets, *config.eval_datasets]
    for dataset in datasets if errors.errors else ():
        if isinstance(dataset, Dataset) and dataset.streaming:
            continue
        with errors.collect():
            find(dataset.dataset_type, dataset.dataset_path)
    errors.raise_all()


@log_if_slow("starting: trying out a tiny copy of the model")
def check_tiny(resolved: Resolved, ranges: list[tuple[int, int]]) -> None:
    """UserError where a tiny copy of the model, cut into these stages and with the adapter, computes something else than
    the whole model, or does not run."""
    adapter = resolved.trained.adapter
    put = partial(families.inject_for_trial, adapter=adapter) if adapter else None
    cut_check.check(resolved.meta_model.config, ranges, put, router_loss=bool(resolved.router_loss))
    if resolved.data.samples is not None:
        cache_check.check(resolved.meta_model.config, ranges, "[samples]: leave it out")
    elif resolved.data.generation is not None:
        wanted_by = "datasets.rejected = 'generate': give the rejected answers in the rows"
        cache_check.check(resolved.meta_model.config, ranges, wanted_by)


def router_loss_of(weight: float | None, model: PreTrainedModel) -> float:
    """The weight of the routers' loss: the configuration's, or what the model's own config asks for. Says it.

    UserError for a weight where transformers has no such loss of the model.
    """
    if router_loss.recorder(model) is None:
        if weight:
            raise UserError(
                f"load_balancing_loss_coef = {weight:g}: transformers has no loss of the routers of model_type "
                f"'{model.config.model_type}'; remove it"
            )
        return 0.0
    used = router_loss.asked_for(model) if weight is None else weight
    if used:
        where = "config.json" if weight is None else "load_balancing_loss_coef"
        log(f"routers:  {used:g} times their load-balancing loss, by {where}")
    elif weight == 0 and router_loss.asked_for(model):
        log("routers:  without their load-balancing loss, which config.json asks for (load_balancing_loss_coef = 0)")
    return used


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


def check_groups(
    specials: Sequence[parameter_groups.ParamGroupOverride], meta_model: MetaModel, trained: Trained
) -> None:
    """UserError for a name in [[optimizer.groups]] that nothing trained has. A tied head goes by its embedding's name."""
    if specials:
        names = trainable(parts.whole_on_meta(meta_model, trained))
        parameter_groups.check(specials, [name for name in names if name not in trained.tied])


def initial_adapter_of(trained: Trained, folder: str) -> dict[str, Tensor]:
    """All that init_adapter's `folder` holds, by global name. UserError where it is not what this run trains."""
    if trained.adapter is None:
        raise ValueError("the config refuses init_adapter with full_fine_tune")
    return families.saved(trained.adapter, folder) | initial_adapter.read_in_full(folder, trained.in_full, trained.tied)


def cut_into_stages(layout: Layout, model: PreTrainedModel, trained: Trained) -> list[tuple[int, int]]:
    """Each stage's range of layers; says it with the stage's weights and share of the work."""
    first_trained = None
    if trained.adapter:
        first_trained = min(layers_of(trained.adapter.targets)[0], trained_modules.first_layer(model, trained.in_full))
    cost = formula.costs(
        model,
        first_trained=first_trained,
        in_full=[model.get_parameter(name) for name in trained.in_full],
        recompute=bool(layout.checkpointing),
        sequence_len=layout.tokens,
    )
    if layout.checkpointing == "auto" and not layout.layers:
        log("stages:   chosen with what each layer keeps (activation_checkpointing = 'auto'; --plan shows it)")
        return cut.balanced(cost.layers, cost.head, layout.stages)
    if layout.layers:
        ranges = cut.explicit(layout.layers, len(cost.layers))
        log("stages:   as layers_per_stage says")
    else:
        ranges = cut.balanced(cost.layers, cost.head, layout.stages)
        log("stages:   balanced by floating-point operations, the head's included")
    shares, sizes = formula.shares(cost, ranges), formula.stage_bytes(cost, ranges)
    for stage, ((first, end), share, size) in enumerate(zip(ranges, shares, sizes, strict=True)):
        extra = (" + embedding" if stage == 0 or cost.embedding_everywhere else "") + (
            " + head" if stage == len(ranges) - 1 else ""
        )
        log(
            f"  stage {stage}: layers {first} to {end - 1} ({end - first}){extra}, "
            f"{gib(size)} of weights, {share:.0%} of the work"
        )
    return ranges
