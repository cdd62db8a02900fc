"""`Config` → `Resolved`: what a run is, with the model's structure looked at and nothing of it read.

Says what it resolves to (layers, modules, stages), or raises one UserError. What follows takes its plain values; the config
itself goes no further.
"""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from pipeline.config.data_tables import Dataset, EvalDataset
from pipeline.config.schema import Config
from pipeline.console import CollectedErrors, UserError, gib, log, log_if_slow, warn
from pipeline.data.reading.sources import find
from pipeline.files import check_writable
from pipeline.formats.dtypes import DTYPES
from pipeline.generation import cache_check
from pipeline.model import cut_check, quantized, router_loss, unsupported
from pipeline.model.adapters import full as trained_modules
from pipeline.model.adapters import parameters
from pipeline.model.adapters.targets import resolve_layers, resolve_targets
from pipeline.model.stage import read_model_config
from pipeline.model.structure.parts import layers_of_model
from pipeline.model.trial import attention_check, packing_check
from pipeline.names import id_in_cache, layers_of
from pipeline.planning import cut, formula
from pipeline.training.data.specs import data_of
from pipeline.training.optim import parameter_groups
from pipeline.training.stage import families
from pipeline.training.stage.meta_model import MetaModel
from pipeline.training.stage.spec import BaseModel, Trained
from pipeline.training.start.objective import Around, spec_of
from pipeline.training.start.resolved import Intervals, Layout, Resolved, Updates
from pipeline.training.start.to_train import (
    check_copies,
    check_groups,
    initial_adapter_of,
    mixture_of,
    trained_of,
    wanted_modules,
)


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


def base_of(config: Config) -> BaseModel:
    """The base model as the config has it."""
    dtype, scheme = DTYPES[config.model_weight_dtype], None
    if config.quantization is not None:
        scheme = quantized.Scheme.from_bnb(config.quantization.bnb.model_dump(), dtype)
    name = config.hub_base_model or id_in_cache(Path(config.model)) or config.model
    return BaseModel(config.model, dtype, config.attn_implementation, scheme, name)


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
