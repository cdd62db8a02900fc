"""Everything of a run that needs no weights, no other process and no GPU: `--check` is this and nothing more.

Takes the config; gives what it resolves to (layers, targets, stages, rows) or one UserError. All processes call it with
the same outcome; the first to come builds the data cache, the others find it.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.config.schema import Config
from pipeline.config.tables import Dataset, EvalDataset
from pipeline.console import CollectedErrors, UserError, gib, log, log_if_slow, warn
from pipeline.data import chunks
from pipeline.data import tokenizer as tokenizers
from pipeline.data.batches import EvaluationBatches, MicroBatches, Position
from pipeline.data.reading.sources import find
from pipeline.data.selection import Selection, Streams, mix, split, whole
from pipeline.data.store import ChunkStore
from pipeline.files import check_writable
from pipeline.formats.base_model import config_ties, read_base, warn_of_remarks
from pipeline.formats.dtypes import DTYPES
from pipeline.model import cut_check, partition, unsupported, weights
from pipeline.model.adapters import base as adapters
from pipeline.model.adapters import full as trained_modules
from pipeline.model.stage import empty_model, read_model_config, tied_head
from pipeline.names import HEAD, layers_of
from pipeline.training.optim import parameter_groups
from pipeline.training.optim.lr_schedule import warmup_steps
from pipeline.training.stage import families, initial_full_tensors
from pipeline.training.stage import parts as stage_parts
from pipeline.training.start import data_fits


@dataclass(frozen=True)
class ModelPlan:
    """The model without weights, the modules to adapt (with whether any has a bias), and each stage's range of layers.

    `in_full`: names of the parameters that are trained in full beside the adapter. `tied`: of the head's, if it is the
    embedding, with that one's.
    """

    shell: PreTrainedModel
    targets: list[str]
    biased_targets: bool
    in_full: list[str]
    tied: dict[str, str]
    ranges: list[tuple[int, int]]


@dataclass(frozen=True)
class Data:
    """Rows for training, by dataset, and for evaluation, by name."""

    train: list[Selection]
    evaluation: dict[str, Selection]


def plan_model(config: Config, *, resumes: bool = False) -> ModelPlan:
    """Read config.json, resolve layers and target modules, cut into stages; says what it resolved to.

    `resumes`: whether the run goes on from a checkpoint, whatever the config says: then init_adapter is not looked at.
    """
    model_config = read_model_config(config.model)
    with unsupported.named(model_config.model_type, "looking at its structure"):
        plan = _plan(config, model_config, resumes)
    if sentence := unsupported.router_loss(model_config):
        warn(sentence)
    check_tiny(config, plan.targets, plan.ranges)
    return plan


@log_if_slow("starting: looking at the model, without its weights")
def _plan(config: Config, model_config: PretrainedConfig, resumes: bool) -> ModelPlan:
    shell = empty_model(model_config, DTYPES[config.model_weight_dtype], config.attn_implementation)
    check_apart(config, shell)
    if quantised := stage_parts.foresee_quantised(shell, config):
        log(f"base:     {len(quantised)} linear layers in {stage_parts.quantisation(config)}")
    if config.full_fine_tune:
        targets, in_full, first_trained = list[str](), list[str](), None
        check_full_fine_tune(config, shell)
    else:
        targets, first_adapted = resolve_adapter(config, shell)
        in_full = resolve_in_full(config, shell, targets)
        first_trained = min(first_adapted, trained_modules.first_layer(shell, in_full))
    biased = any(getattr(shell.get_submodule(name), "bias", None) is not None for name in targets)
    tied = tied_head(shell)
    if config.init_adapter and not (resumes or config.resume_from_checkpoint):
        initial_tensors(config, targets, biased, in_full, tied)
        log(f"          begins with the weights of {config.init_adapter}")
    check_groups(config, targets, tied)
    ranges = cut_into_stages(config, shell, first_trained, in_full)
    return ModelPlan(shell, targets, biased, in_full, tied, ranges)


def check_apart(config: Config, shell: PreTrainedModel) -> None:
    """UserError with all mistakes at once that have nothing to do with each other: layers, modules, stages, paths."""
    errors, n_layers = CollectedErrors(), len(shell.base_model.layers)
    layers = list(range(n_layers))
    with errors.collect():
        check_writable(Path(config.output_dir), "output_dir")
    if not config.full_fine_tune:
        with errors.collect():
            layers = adapters.resolve_layers(config.layers_to_transform, n_layers)
        with errors.collect():
            adapters.resolve_targets(shell, config.target_modules or families.default_targets(config), layers)
        with errors.collect():
            trained_modules.resolve(shell, config.trainable_modules, [])
    with errors.collect():
        partition.check_possible(config.layers_per_stage, config.pipeline_stages, n_layers)
    # Looking for files warns of what it finds, and it is done again when they are read.
    datasets: list[Dataset | EvalDataset] = [*config.datasets, *config.eval_datasets]
    for dataset in datasets if errors.errors else ():
        with errors.collect():
            find(dataset.dataset_type, dataset.dataset_path)
    errors.raise_all()


def check_tiny(config: Config, targets: list[str], ranges: list[tuple[int, int]]) -> None:
    """UserError where a tiny copy of the model, cut into these stages and with adapters in `targets`, computes something
    else than the whole model, or does not run."""
    put = partial(families.inject_for_trial, config=config, targets=targets) if targets else None
    cut_check.check(read_model_config(config.model), ranges, put)


def check_files(config: Config, shell: PreTrainedModel) -> None:
    """UserError if a weight of the model is not there, or nothing can be written to output_dir. No weight is read."""
    check_writable(Path(config.output_dir), "output_dir")
    base = read_base(Path(config.model), "model")
    with unsupported.named(shell.config.model_type, "finding its weights in the folder's files"):
        weights.check_complete(shell, base)
    warn_of_remarks(base)
    if config_ties(base.config) and not tied_head(shell) and base.find(HEAD):
        warn(
            f"{config.model}: config.json ties the head to the embedding, but {base.taken} holds two different tensors. Both "
            "are kept, as in transformers; tie_word_embeddings = false would say so."
        )


def check_full_fine_tune(config: Config, shell: PreTrainedModel) -> None:
    """Say that the model's own weights are trained; UserError where that is not possible."""
    weights.check_saved_as_run(shell)
    if config.target_modules == "all-linear":
        raise UserError(
            "target_modules = 'all-linear': with full_fine_tune, give names of modules, or leave the key out to train everything"
        )
    parts = {part for name, _ in shell.named_parameters() for part in name.split(".")}
    if unknown := [name for name in config.target_modules or () if name not in parts]:
        raise UserError(
            f"target_modules: no parameter has {', '.join(unknown)} in its name; there are {', '.join(sorted(parts))}"
        )
    which = "" if config.target_modules is None else f", those of {', '.join(config.target_modules)}"
    log(f"training: the model's own weights{which}")


def resolve_adapter(config: Config, shell: PreTrainedModel) -> tuple[list[str], int]:
    """Full names of the modules to adapt, and the first adapted layer; says them in words."""
    n_layers = len(shell.base_model.layers)
    layers = adapters.resolve_layers(config.layers_to_transform, n_layers)
    names = config.target_modules or families.default_targets(config)
    targets = adapters.resolve_targets(shell, names, layers)
    families.check_fits(config, shell, targets)
    where = "the output of" if config.adapter_type in families.ON_THE_OUTPUT else "the weights of"
    modules = "all linear modules" if names == "all-linear" else ", ".join(names)
    adapted = layers_of(targets)
    log(f"training: {config.adapter_type} on {where} {modules}, {adapters.describe_layers(adapted, n_layers)}")
    for line in adapters.describe_targets(shell, targets, layers):
        log(f"          {line}")
    if names == "all-linear" and (left_out := adapters.routers(shell, layers)):
        log(f"          without {', '.join(left_out)}, which only choose")
    log(f"          {families.describe(config)}")
    return targets, adapted[0]


def resolve_in_full(config: Config, shell: PreTrainedModel, targets: list[str]) -> list[str]:
    """Names of the parameters that are trained in full beside the adapter; says them in words."""
    names = config.trainable_modules
    in_full = trained_modules.resolve(shell, names, targets)
    if in_full:
        dtype = config.model_weight_dtype
        log(f"          and in full, in {dtype}: {trained_modules.describe(shell, names, in_full)}")
    return in_full


def check_groups(config: Config, targets: list[str], tied: dict[str, str]) -> None:
    """UserError for a name in [[optimizer.groups]] that nothing trained has. A tied head goes by its embedding's name."""
    if specials := parameter_groups.specials(config.optimizer):
        trained = adapters.trainable(stage_parts.whole_on_meta(config, targets))
        parameter_groups.check(specials, [name for name in trained if name not in tied])


def initial_tensors(
    config: Config, targets: list[str], biased: bool, in_full: list[str], tied: dict[str, str]
) -> dict[str, Tensor]:
    """All that init_adapter holds, by global name. UserError where it is not what this run trains."""
    adapter = families.saved(config, targets, biased)
    return adapter | initial_full_tensors.read(config.init_adapter or "", in_full, tied)


def cut_into_stages(
    config: Config, shell: PreTrainedModel, first_trained: int | None, in_full: list[str]
) -> list[tuple[int, int]]:
    """Each stage's range of layers; says it with the stage's weights and share of the work."""
    cost = partition.costs(
        shell.base_model,
        shell.get_output_embeddings(),
        first_adapted=first_trained,
        in_full=[shell.get_parameter(name) for name in in_full],
        recompute=bool(config.activation_checkpointing),
        sequence_len=max(d.sequence_len for d in config.datasets),
        key_width=_key_width(shell.config),
        active_share_of_experts=_active_share(shell.config),
    )
    if config.activation_checkpointing == "auto" and not config.layers_per_stage:
        log("stages:   chosen with what each layer keeps (activation_checkpointing = 'auto'; --plan shows it)")
        return partition.split(cost, config.pipeline_stages)
    if config.layers_per_stage:
        ranges = partition.explicit(config.layers_per_stage, len(cost.layers))
        log("stages:   as layers_per_stage says")
    else:
        ranges = partition.split(cost, config.pipeline_stages)
        log("stages:   balanced by floating-point operations, the head's included")
    shares, sizes = partition.shares(cost, ranges), partition.stage_bytes(cost, ranges)
    for stage, ((first, end), share, size) in enumerate(zip(ranges, shares, sizes, strict=True)):
        extra = (" + embedding" if stage == 0 else "") + (" + head" if stage == len(ranges) - 1 else "")
        log(
            f"  stage {stage}: layers {first} to {end - 1} ({end - first}){extra}, "
            f"{gib(size)} of weights, {share:.0%} of the work"
        )
    return ranges


def tokenizer_for(plan: ModelPlan, folder: str) -> Any:
    """The tokenizer in `folder`; UserError if its BOS or EOS has no trained row in the model's embedding."""
    tokenizer = tokenizers.load(folder)
    data_fits.check_tokenizer(tokenizer, folder, data_fits.embedding_rows(plan.shell))
    return tokenizer


def read_data(config: Config, tokenizer: Any, plan: ModelPlan | None = None) -> Data:
    """Tokenise (or find in the cache), cut and split every dataset; says what became of the text.

    With the model's plan, UserError for ids beyond its embedding and for chunks longer than it can read.
    """
    cache = Path(config.output_dir) / "dataset_cache"
    train, evaluation = [], {}
    if plan is not None:
        lengths = {f"datasets.{i}.sequence_len": dataset.sequence_len for i, dataset in enumerate(config.datasets)}
        lengths |= {f"eval_datasets.{i}.sequence_len": held.sequence_len for i, held in enumerate(config.eval_datasets)}
        for key, sequence_len in lengths.items():
            data_fits.check_length(key, sequence_len, plan.shell)
    for number, dataset in enumerate(config.datasets):
        name = dataset.name or f"dataset{number}"
        streams = _chunks(
            dataset, name, tokenizer, cache, plan, eval_size=dataset.eval_size, eval_split=dataset.eval_split
        )
        rows = split(streams, dataset.eval_size, dataset.subsample, dataset.num_repeats or 1)
        log(f"data:     {rows}")
        train.append(rows.train)
        if rows.eval is not None:
            evaluation[name] = rows.eval
    for number, held_out in enumerate(config.eval_datasets):
        name = held_out.name or f"eval{number}"
        evaluation[name] = whole(_chunks(held_out, name, tokenizer, cache, plan), held_out.subsample)
    return Data(train, evaluation)


def _chunks(
    dataset: Dataset | EvalDataset, name: str, tokenizer: Any, cache: Path, plan: ModelPlan | None, **held_out: Any
) -> Streams[ChunkStore]:
    """A dataset's chunks, whose ids the model has; says what became of the text. `held_out`: as for `chunks.build`."""
    streams = chunks.build(
        name=name,
        dataset_type=dataset.dataset_type,
        dataset_path=dataset.dataset_path,
        sequence_len=dataset.sequence_len,
        tokenizer=tokenizer,
        cache_dir=cache,
        join_lines=dataset.join_lines,
        **held_out,
    )
    for store in streams.stores:
        log(f"data:     {store.report}")
        if plan is not None:
            data_fits.check_ids(store.report, tokenizer, data_fits.embedding_rows(plan.shell))
    return streams


def micro_batches(config: Config, data: Data, replica: int = 0, replicas: int = 1) -> MicroBatches:
    """The training micro-batches of one data-parallel replica."""
    epoch_rows = mix(
        data.train,
        seed=config.seed,
        mode=config.dataset_combination_mode,
        weights=[d.sample_weight for d in config.datasets],
        stopping_strategy=config.dataset_interleave_stopping_strategy,
        weigh_tokens=config.batch_size_tokens is not None,
    )
    return MicroBatches(
        [rows.store for rows in data.train],
        epoch_rows,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size_per_gpu,
        batch_size_tokens=config.batch_size_tokens,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dp_rank=replica,
        dp_world=replicas,
        group_by_length=config.group_by_length,
    )


def evaluation_batches(config: Config, data: Data, replica: int = 0, replicas: int = 1) -> dict[str, EvaluationBatches]:
    """The evaluation micro-batches of one data-parallel replica, by dataset."""
    return {
        name: EvaluationBatches(
            rows,
            micro_batch_size=config.micro_batch_size_per_gpu,
            batch_size_tokens=config.batch_size_tokens,
            dp_rank=replica,
            dp_world=replicas,
        )
        for name, rows in data.evaluation.items()
    }


def describe_steps(config: Config, batches: MicroBatches, replicas: int) -> None:
    """Say the size of a step and of the run as equations."""
    info = batches.info(Position())
    per_step = batches.micro_batches_per_step
    steps = batches.steps_per_epoch(0)
    log(
        f"a step:   {per_step} micro-batches ({config.gradient_accumulation_steps} accumulated × {replicas} replica(s)) "
        f"= {len(info.rows)} rows = {info.tokens:,} tokens"
    )
    epochs = f"{config.epochs} epoch(s) of {steps} steps" if config.epochs else "max_steps"
    limit = f", at most {config.max_steps} steps" if config.max_steps else ""
    total = min(config.max_steps or math.inf, (config.epochs or math.inf) * steps)
    if (warmup := warmup_steps(config.warmup_steps, steps)) >= total:
        warn(
            f"warmup_steps: {warmup} steps of warmup in a run of {total:.0f}: the learning rate never reaches "
            f"optimizer.lr = {config.optimizer.lr:g}; give fewer"
        )
    log(
        f"the run:  {epochs}{limit}; warmup {config.warmup_steps:g}, then {config.lr_scheduler} at lr {config.optimizer.lr:g}"
    )


def _key_width(config: PretrainedConfig) -> float:
    """Heads × head size, of the layers' mean where they differ: what attention's own work is proportional to."""
    layers = list(getattr(config, "per_layer_config", None) or [config])
    return sum(map(_width_of_keys, layers)) / len(layers)


def _width_of_keys(layer: PretrainedConfig) -> int:
    heads = getattr(layer, "num_attention_heads", None) or 1
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _active_share(config: PretrainedConfig) -> float:
    """Experts used per token over experts there are; 1 for a dense model."""
    there = (
        getattr(config, "num_local_experts", None)
        or getattr(config, "num_experts", None)
        or getattr(config, "n_routed_experts", None)
    )
    used = getattr(config, "num_experts_per_tok", None)
    return used / there if there and used else 1.0
