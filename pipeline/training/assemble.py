"""Puts a run together on one process: stage, weights, adapters, engine, state, files.

Takes the config and what `prepare` made of it, and our place in the pipeline; gives a `Trainer` at the step to go on
from. A problem that one process finds is raised on all of them.
"""

import json
import time
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.config_sources import to_toml
from pipeline.console import UserError, gib, say
from pipeline.data.batches import Position
from pipeline.model import activation, adapters, fusion, weights
from pipeline.model.stage import DTYPES, Stage, check_head, logit_transform
from pipeline.objectives import language_modelling
from pipeline.training import checkpoint, engine, prepare, saving
from pipeline.training.metrics import Metrics, peak_memory
from pipeline.training.optimizer import PipelineOptimizer, make_inner
from pipeline.training.run_state import RunState, restore
from pipeline.training.schedule import learning_rate, warmup_steps
from pipeline.training.stop import STOP_FILE, Watcher
from pipeline.training.trainer import Cadence, Trainer

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "safetensors")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def trainer(
    config: Config,
    plan: prepare.ModelPlan,
    data: prepare.Data,
    place: engine.Place,
    watcher: Watcher,
    resume: str | None,
    config_path: str,
) -> Trainer:
    """The run, ready to go. `resume`: the checkpoint folder to go on from."""
    torch.manual_seed(config.seed + place.rank)
    stage = build_stage(config, plan, place)
    optimizer = build_optimizer(config, stage, place)
    batches = prepare.micro_batches(config, data, place.replica, place.replicas)
    evaluations = prepare.evaluation_batches(config, data, place.replica, place.replicas)
    transform = logit_transform(stage.model.config)
    head: Any = stage.head if stage.is_last else None  # only the last stage computes a loss
    pipeline_engine = engine.build(
        stage, place,
        partial(language_modelling.training_loss, head=head, transform=transform._replace(after=config.train_logit_scale)),
        optimizer, config.gradient_accumulation_steps, dynamic_shape=batches.fixed_shape is None,
    )  # fmt: skip
    _tie(stage, optimizer, place)
    run_dir = open_run(config, place, resume)
    manifest = _restore(Path(resume), config, stage, optimizer, place, batches) if resume else None
    steps_in_epoch = batches.steps_per_epoch(0)
    state = RunState(optimizer, place.rank, place.replica == 0, _facts(config, place))
    say_memory(place)
    return Trainer(
        engine=pipeline_engine, place=place, optimizer=optimizer, batches=batches, evaluations=evaluations,
        row_losses=partial(language_modelling.row_losses, head=head, transform=transform),
        learning_rate=_schedule(config, steps_in_epoch), save_artifact=_artifact_saver(config, stage, optimizer, place, plan),
        adapter=None if config.full_fine_tune else (dict(optimizer.parameters_by_name), _scaling(config)),
        cadence=Cadence(**{key: getattr(config, key) for key in Cadence.__dataclass_fields__}),
        state=state, metrics=Metrics(run_dir, manifest["step"] if manifest else 0), watcher=watcher, run_dir=run_dir,
        launch=engine.launched_by(), resume_line=_resume_line(config_path, place, run_dir),
        step=manifest["step"] if manifest else 0,
        position=Position(manifest["epoch"], manifest["rows"]) if manifest else Position(),
        best_loss=manifest["best_loss"] if manifest else None,
    )  # fmt: skip


def build_stage(config: Config, plan: prepare.ModelPlan, place: engine.Place) -> Stage:
    """Our part of the model with its weights, adapters and activation memory. Fails on all ranks or on none."""
    stage = Stage(plan.shell, *plan.ranges[place.stage])
    problem = None
    try:
        weights.load(stage, config.model, DTYPES[config.model_weight_dtype], place.device)
        stage.to(place.device)  # RoPE tables and other buffers
        if stage.is_last:
            check_head(stage)
    except UserError as error:
        problem = str(error)
    engine.agree(place, problem)
    if config.full_fine_tune:
        adapters.unfreeze(stage, config.target_modules if isinstance(config.target_modules, list) else None)
    else:
        inject = (
            adapters.inject_multiplicative if config.adapter_type == "multiplicative_lora" else adapters.inject_lora
        )
        inject(stage, plan.targets, config.lora_rank or 1, config.lora_alpha or 1.0, config.lora_dropout,
               DTYPES[config.lora_weight_dtype], config.seed)  # fmt: skip
    wanted = (
        {"all": list(fusion.KERNELS), "none": []}.get(config.kernels)
        if isinstance(config.kernels, str)
        else config.kernels
    )
    taken = fusion.apply(stage, frozenset(wanted or ()))
    if wanted:
        say_kernels(taken, place)
    activation.apply(stage, config.activation_checkpointing)
    return stage


def say_kernels(taken: Counter[str], place: engine.Place) -> None:
    """How many modules of the whole model took each kernel."""
    everyone: list[Counter[str]] = [Counter()] * place.world
    dist.all_gather_object(everyone, taken if place.replica == 0 else Counter())
    total = sum(everyone, Counter[str]())
    say(
        "kernels:  "
        + (", ".join(f"{name} in {count} modules" for name, count in total.items()) or "no module fits one")
    )


def build_optimizer(config: Config, stage: Stage, place: engine.Place) -> PipelineOptimizer:
    """Over this stage's trained parameters, which may be none."""
    parameters = adapters.trainable(stage)
    counts: list[int] = [0] * place.world
    second_copy = (
        stage.model.config.tie_word_embeddings and not stage.is_first
    )  # a tied head is the embedding once more
    dist.all_gather_object(
        counts, sum(p.numel() for name, p in parameters.items() if not (second_copy and name == HEAD))
    )
    total = sum(counts) // place.replicas
    if not total:
        raise UserError(f"nothing to train: target_modules = {config.target_modules} matches no parameter")
    say(f"trained:  {total:,} parameters")
    o = config.optimizer
    inner = make_inner(
        o.type, list(parameters.values()), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    return PipelineOptimizer(parameters, inner, config.gradient_clipping)


def _tie(stage: Stage, optimizer: PipelineOptimizer, place: engine.Place) -> None:
    """Trained tied embeddings on two stages: one weight, so their gradients are summed and both make the same update."""
    if place.stages == 1 or not stage.model.config.tie_word_embeddings:
        return
    own = [name for name in optimizer.parameters_by_name if name == HEAD or name.endswith(EMBEDDING)]
    group = None
    for replica in range(place.replicas):
        ranks = [place.topology.get_rank(pipe=s, data=replica) for s in (0, place.stages - 1)]
        candidate = engine.new_group(ranks)
        group = candidate if place.rank in ranks else group
    if own:
        optimizer.tie(frozenset(own), group, counts=stage.is_first)


def open_run(config: Config, place: engine.Place, resume: str | None) -> Path:
    """The run's folder, the same on all ranks: a new one by UTC time, or that of the checkpoint."""
    chosen: list[Any] = [None]
    if place.rank == 0:
        run_dir = Path(resume).parent if resume else _new_folder(Path(config.output_dir))
        (run_dir / STOP_FILE).unlink(missing_ok=True)
        checkpoint.clear_rubbish(run_dir)
        (run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
        chosen = [str(run_dir)]
    dist.broadcast_object_list(chosen)
    say(f"run:      {chosen[0]}")
    return Path(chosen[0])


def _new_folder(output_dir: Path) -> Path:
    """A folder named by the UTC time; runs that start within one second wait for their own."""
    while True:
        run_dir = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:
            time.sleep(0.2)


def _restore(
    folder: Path, config: Config, stage: Stage, optimizer: PipelineOptimizer, place: engine.Place, batches: Any
) -> dict[str, Any]:
    """Put the checkpoint's state back and say what differs from its configuration."""
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    if lines := differences(manifest["config"], config.model_dump(mode="json")):
        say("changed since the checkpoint:\n" + "\n".join(lines))
    order = batches.order_hash(manifest["epoch"])
    if manifest["rows"] and order != manifest["order"]:
        raise UserError("the training data or its order is not the checkpoint's, so its position in the data means nothing; "
                        "restore the datasets and their settings and the seed, or start a new run")  # fmt: skip
    embedding = f"{stage.model.base_model_prefix}.{EMBEDDING}"
    aliases = {HEAD: embedding} if stage.model.config.tie_word_embeddings else {}
    same_layout = manifest["layout"] == [place.stages, place.replicas]
    restore(
        folder,
        manifest,
        optimizer,
        place.rank,
        aliases=aliases,
        optimizer_states=config.load_optimizer_states,
        same_layout=same_layout,
    )
    if not same_layout:
        torch.manual_seed(config.seed + place.rank + 1000003 * manifest["step"])
    say(f"resumed:  after step {manifest['step']}, from {folder}")
    return manifest


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each key whose value is another than in the checkpoint's configuration."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = (json.dumps(c.get(key), default=str) for c in (saved, current))
        if old != new and key != "resume_from_checkpoint":
            lines.append(f"  {key}: {old} → {new}")
    return lines


def _schedule(config: Config, steps_in_epoch: int) -> Any:
    if config.force_constant_lr is not None:
        return lambda step, total: config.force_constant_lr
    warmup = warmup_steps(config.warmup_steps, steps_in_epoch)
    return lambda step, total: learning_rate(
        step,
        peak=config.optimizer.lr,
        warmup=warmup,
        total=total,
        shape=config.lr_scheduler,
        lowest=config.optimizer.lr_min,
    )


def _artifact_saver(
    config: Config, stage: Stage, optimizer: PipelineOptimizer, place: engine.Place, plan: prepare.ModelPlan
) -> Any:
    dtype = DTYPES[config.save_dtype] if config.save_dtype else None
    if config.full_fine_tune:
        return lambda folder: saving.save_model(folder, place, stage, Path(config.model), dtype)
    return lambda folder: saving.save_adapter(
        folder, place, dict(optimizer.parameters_by_name), dtype, kind=config.adapter_type, rank=config.lora_rank,
        alpha=config.lora_alpha, dropout=config.lora_dropout, base_model=config.model,
        train_logit_scale=config.train_logit_scale, biased_targets=plan.biased_targets,
    )  # fmt: skip


def _scaling(config: Config) -> float:
    return (config.lora_alpha or 1.0) / (config.lora_rank or 1)


def _facts(config: Config, place: engine.Place) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"), "layout": [place.stages, place.replicas],
        "versions": {package: version(package) for package in PACKAGES},
    }  # fmt: skip


def _resume_line(config_path: str, place: engine.Place, run_dir: Path) -> str:
    return f"deepspeed --num_gpus {place.world} train.py --config {config_path} --resume_from_checkpoint {run_dir}"


def say_memory(place: engine.Place) -> None:
    """Each process's peak memory so far, which is that of loading its stage."""
    peaks: list[int] = [0] * place.world
    dist.all_gather_object(peaks, peak_memory())
    say(
        "memory:   "
        + ", ".join(f"rank {rank} {gib(peak)}" for rank, peak in enumerate(peaks))
        + " at most while loading"
    )
