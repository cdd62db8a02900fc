"""Puts a run together on one process: stage, weights, adapters, engine, state.

Takes the config and what `prepare` made of it, and our place in the pipeline; gives a `Trainer` at the step to go on
from. A problem that one process finds is raised on all of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from pipeline.config.loading import to_toml
from pipeline.config.schema import Config
from pipeline.console import UserError, gib, log, log_if_slow
from pipeline.formats.dtypes import DTYPES
from pipeline.model import neftune, unsupported, weights
from pipeline.model.adapters.base import trainable, written
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.memory import activation
from pipeline.model.memory.host_arena import HostArena
from pipeline.model.quantized import saved_bytes
from pipeline.model.router_loss import RouterLoss
from pipeline.model.stage import Stage, check_head, tied_head
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.language_modelling import LanguageModelling
from pipeline.objectives.objective import Objective
from pipeline.objectives.preference import Preference, StepTotals
from pipeline.objectives.representation import WithTaps
from pipeline.objectives.with_router_loss import WithRouterLoss
from pipeline.peft.types import is_shared
from pipeline.publishing.report.beside import Reports
from pipeline.training.checkpoint import trained as saving
from pipeline.training.checkpoint.saver import Saver
from pipeline.training.checkpoint.state import Progress, RunState, needed, restore
from pipeline.training.engine import engine, reference
from pipeline.training.engine.asking import RunAsker
from pipeline.training.engine.on_policy import Negatives
from pipeline.training.engine.samples import Samples
from pipeline.training.metrics import Metrics, StepMemory, peak_memory
from pipeline.training.nodes.carrying import Carrier, brought
from pipeline.training.optim import parameter_groups, regularisation
from pipeline.training.optim.inner import make_inner, value
from pipeline.training.optim.lr_schedule import learning_rate, warmup_steps
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.run import folder as run_folder
from pipeline.training.run import record
from pipeline.training.run.peers import UNHURRIED
from pipeline.training.run.stop import Watcher
from pipeline.training.run.trainer import Trainer
from pipeline.training.stage import families, initial_adapter, parts
from pipeline.training.stage.beside import Beside
from pipeline.training.stage.unmoved import Unmoved
from pipeline.training.start import kernel_places, prepare, resolve
from pipeline.training.start import plan as planned
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.resolved import Resolved, Updates
from pipeline.training.step_measures import LayerGradients, StepTimes
from pipeline.training.trackers import Trackers


def trainer(
    config: Config,
    plan: Resolved,
    data: prepare.Data,
    place: engine.Place,
    watcher: Watcher,
    resumed: run_folder.Resumed | None,
    command: list[str],
    carrier: Carrier | None = None,
) -> Trainer:
    """The run, ready to go. `resumed`: the first process's checkpoint, its manifest; `carrier`: between disks, if needed."""
    run_plan = planned.for_run(plan, place)
    torch.manual_seed(config.seed + place.number)
    with engine.agreement(place):
        arena = planned.arena(run_plan, place.stage, place.device)
    with watcher.phase(UNHURRIED):
        stage = build_stage(plan, run_plan, place, arena, config.neftune_noise_alpha)
    optimizer = optimizer_of(plan, stage, place)
    batches = batches_of(plan, data, place, watcher)
    routers, totals = measures_of(stage, plan)
    beside, times = beside_of(stage, plan.objective), StepTimes()
    objective = objective_of(stage, config.train_logit_scale, routers, plan.objective, totals, beside)
    pipeline_engine = build_engine(plan, place, stage, optimizer, objective, batches, watcher, times)
    resumed, recorded = run_folder.agree_on(resumed, place), config.model_dump(mode="json")
    about = facts(recorded, place, names_on_all_stages(optimizer, place))
    if resumed is not None:
        progress = put_back(*resumed, about, stage, optimizer, place, batches, plan.objective, carrier)
    else:
        progress = begin(plan, config.init_adapter, stage, place, batches)
    opened = run_folder.open_run(Path(config.output_dir), resumed, place, to_toml(config), carrier)
    if (against := against_of(beside, plan, pipeline_engine, stage, place)) is not None:
        with watcher.phase(UNHURRIED):
            data, about["reference"] = reference.attached(data, against, opened.path, resumed and resumed[0].parent)
        batches = prepare.micro_batches(plan.data, data, place.replica, place.replicas)
    resumed_at = progress.step if resumed is not None and resumed[0].parent == opened.path else None
    trackers = partial(Trackers, config.trackers, config.tracker_options, config.tracker_project)
    metrics = metrics_of(opened.path, resumed_at or 0, progress.settled, recorded, trackers, place)
    state = RunState(optimizer, place.device, place.number, place.replica == 0, about)
    write = artifact_writer(plan, stage, place, config.save_dtype, config.train_logit_scale, data.stops, carrier)
    say_memory(place)
    return Trainer(
        engine=pipeline_engine,
        place=place,
        optimizer=optimizer,
        batches=batches,
        evaluations=prepare.evaluation_batches(plan.data, data, place.replica, place.replicas),
        objective=objective,
        learning_rate=schedule(plan.updates, batches.steps_per_epoch(batches.at_hand.epoch)),
        adapter_norms=partial(families.norms, stage, plan.trained.adapter) if plan.trained.adapter else None,
        measuring=[one for one in (routers, beside, LayerGradients(optimizer, config.grad_norm_steps)) if one],
        step_totals=totals,
        unmoved=unmoved_of(plan, optimizer),
        intervals=plan.intervals,
        epochs=plan.data.epochs,
        max_steps=plan.data.max_steps,
        folder=opened,
        saver=Saver(opened.path, opened.launch, place, state, metrics, write, config.keep_states, resumed_at, carrier),
        state=state,
        metrics=metrics,
        samples=samples_of(plan, data, stage, place, metrics, watcher),
        negatives=negatives_of(plan, data, stage, place, against, opened.path, progress.step, watcher),
        reports=Reports(opened.path, config.report_every_minutes),
        step_times=times,
        memory=StepMemory(engine.held_tensors(pipeline_engine, optimizer)),
        watcher=watcher,
        resume_line=run_folder.resume_line(command, opened.path),
        progress=progress,
        first_step_done=partial(planned.say_overflow, run_plan, place, arena),
        outcome=partial(planned.say_outcome, run_plan, place, opened.path, arena),
    )


def metrics_of(
    run_dir: Path,
    resumed_at: int,
    settled: bool,
    recorded: dict[str, Any],
    trackers: Callable[[Path, dict[str, Any]], Trackers],
    place: engine.Place,
) -> Metrics:
    """The files of a run, and what follows them; UserError on every process where a tracker does not begin."""
    with engine.agreement(place):
        following = trackers(run_dir, recorded)
    return Metrics(run_dir, resumed_at, settled, following)


def begin(
    plan: Resolved, init_adapter: str | None, stage: Stage, place: engine.Place, batches: prepare.TrainBatches
) -> Progress:
    """A new run: the adapter it goes on from into the stage, if there is one."""
    if init_adapter:
        with engine.agreement(place):
            initial_adapter.put(stage, resolve.initial_adapter_of(plan.trained, init_adapter))
    return Progress(order=batches.order_hash(0))


def batches_of(plan: Resolved, data: prepare.Data, place: engine.Place, watcher: Watcher) -> prepare.TrainBatches:
    """The micro-batches of this replica; to make a window of a stream counts as getting on."""
    if data.stream:
        data.stream.windows.alive = lambda count: watcher.doing(f"making a window, {count:,} rows read")
    return prepare.micro_batches(plan.data, data, place.replica, place.replicas)


def samples_of(
    plan: Resolved, data: prepare.Data, stage: Stage, place: engine.Place, metrics: Metrics, watcher: Watcher
) -> Samples | None:
    """What the model is asked while it is trained, if anything."""
    if plan.data.samples is None or data.questions is None:
        return None
    return Samples(plan.data.samples, data.questions, stage, place, plan.base.dtype, metrics, watcher.doing)


def measures_of(stage: Stage, plan: Resolved) -> tuple[RouterLoss | None, StepTotals | None]:
    """What notes something of a step: the routers of our stage, and preference training, if the run has them."""
    routers = RouterLoss(stage, plan.router_loss) if plan.router_loss else None
    return routers, StepTotals() if plan.objective else None


def against_of(
    beside: Beside | None, plan: Resolved, built: PipelineEngine, stage: Stage, place: engine.Place
) -> reference.Pass | None:
    """What scores rows by the reference, where a loss reads that. What our stage is compared with in every step, if the run
    does that, it has from here on: the base, or a folder's adapter, which is read now."""
    if beside is not None and plan.objective is not None:
        beside.as_reference = reference.in_every_step(reference.Pass(plan, plan.objective, built, stage, place))
    if plan.objective is None or not plan.objective.cached:
        return None
    return reference.Pass(plan, plan.objective, built, stage, place)


def negatives_of(
    plan: Resolved,
    data: prepare.Data,
    stage: Stage,
    place: engine.Place,
    against: reference.Pass | None,
    run_dir: Path,
    step: int,
    watcher: Watcher,
) -> Negatives | None:
    """What gives the rejected answers, where the model does. `step`: the last completed one."""
    if plan.data.generation is None or data.spoken is None:
        return None
    asker = RunAsker(stage, place, plan.base.dtype, partial(watcher.doing, "writing rejected answers", True))
    return Negatives(plan.data.generation, data.spoken, asker, against, run_dir, step)


def build_stage(
    plan: Resolved,
    run_plan: planned.RunPlan,
    place: engine.Place,
    arena: HostArena | None,
    neftune_alpha: float | None,
) -> Stage:
    """Our part of the model with its weights, adapters, kernels and activation memory."""
    first, end = run_plan.ranges[place.stage]
    if run_plan.ranges != plan.ranges:  # chosen by 'auto'
        resolve.check_tiny(plan, run_plan.ranges)
    stage = Stage(plan.meta_model.make(), first, end)
    stage.kept_apart_by = plan.kept_apart_by
    with engine.agreement(place), unsupported.named(plan.meta_model.config.model_type, "putting its stage together"):
        check_room(stage, place)
        parts.put_quantised(stage, plan.base.scheme)
        weights.load(stage, plan.base.folder, plan.base.dtype, place.device)
        stage.to(place.device)  # RoPE tables and other buffers
        if stage.is_last:
            check_head(stage)
        parts.put_trained(stage, plan.trained)
    with log_if_slow("starting: looking where the kernels fit"):
        kernel_places.put(stage, plan.layout.kernels, place)
    keeping = dict(enumerate(run_plan.keeping[place.stage], start=first))
    first_trained = engine.first_trained_stage(bool(trainable(stage)), place)
    if neftune_alpha:
        neftune.apply(stage, neftune_alpha)
    activation.apply(stage, keeping, arena, place.stage > first_trained)
    return stage


def check_room(stage: Stage, place: engine.Place) -> None:
    """Raise UserError if the stage's weights alone do not fit on the GPU, before any is read."""
    if place.device.type != "cuda":
        return
    needed = sum(p.numel() * p.element_size() for p in stage.parameters()) - saved_bytes(stage)
    free, _ = torch.cuda.mem_get_info(place.device)
    if needed > free:
        raise UserError(
            f"stage {place.stage} has {gib(needed)} of weights, its GPU has {gib(free)} free: "
            "use more stages, or layers_per_stage"
        )


def optimizer_of(plan: Resolved, stage: Stage, place: engine.Place) -> PipelineOptimizer:
    """Over this stage's trained parameters; a family that shares ranks out among all stages does so after its updates."""
    optimizer = build_optimizer(plan.updates, stage, place)
    families.share_ranks(stage, optimizer, plan.trained.adapter)
    return optimizer


def build_optimizer(updates: Updates, stage: Stage, place: engine.Place) -> PipelineOptimizer:
    """Over this stage's trained parameters, which may be none."""
    table = updates.optimizer
    parameters = trainable(stage)
    # A tied head on a stage of its own is the embedding once more.
    copies = {} if stage.is_first else tied_head(stage.model)
    shared = {name: p.numel() for name, p in parameters.items() if is_shared(name)}
    own = sum(p.numel() for name, p in parameters.items() if name not in copies and name not in shared)
    told: list[tuple[int, int, dict[str, int]]] = [(0, 0, {})] * place.world
    dist.all_gather_object(told, (place.stage, own, shared))
    common = {name: size for _, _, held in told for name, size in held.items()}
    total = sum(count for _, count, _ in told) // place.replicas + sum(common.values())
    if not total:
        raise UserError("nothing to train: target_modules matches no parameter")
    faster = f"; B learns at {table.loraplus:g} times the rate (LoRA+)" if table.loraplus != 1 else ""
    log(f"trained:  {total:,} parameters{faster}")
    held_down = updates.product_decay or updates.largest_norm
    factors = regularisation.factors_of(stage) if held_down else {}
    undecayed = {f"{module}.{letter}" for module in factors for letter in "AB"} if updates.product_decay else ()
    # A copy of the embedding must make the same update as the embedding, so it goes by its name.
    named = {copies.get(name, name): p for name, p in parameters.items()}
    groups = parameter_groups.build(
        named,
        fast_ratio=table.loraplus,
        weight_decay=table.weight_decay,
        undecayed=undecayed,
        specials=parameter_groups.specials(table),
    )
    betas = table.beta1, table.beta2
    inner = make_inner(table.type, groups, lr=table.lr, betas=betas, eps=table.eps, weight_decay=table.weight_decay)
    optimizer = PipelineOptimizer(parameters, inner, updates.clip)
    if common and place.stages > 1:  # one tensor for modules of several stages, as a tied embedding is
        earlier = {name for stage_of, _, held in told if stage_of < place.stage for name in held}
        optimizer.share(dict(sorted(common.items())), frozenset(earlier))
    regularisation.attach(optimizer, factors, updates.product_decay, updates.largest_norm)
    families.after_updates(stage, inner)
    return optimizer


def objective_of(
    stage: Stage,
    train_logit_scale: float,
    routers: RouterLoss | None = None,
    preference: ObjectiveSpec | None = None,
    totals: StepTotals | None = None,
    beside: Beside | None = None,
) -> Objective:
    """The loss; only the last stage, which has the head, computes it. `totals`: of preference training."""
    head, transform = stage.head if stage.is_last else None, logit_transform(stage.model.config)
    objective: Objective = LanguageModelling(head, transform, train_logit_scale)
    if preference is not None and totals is not None:
        of_answers, slots = None, preference.slots
        if preference.mixture is not None:
            live = beside.take_reference if beside and preference.live else None
            objective = of_answers = Preference(head, transform, preference.mixture, slots, totals, live)
        if beside is not None and preference.taps:
            objective = WithTaps(of_answers, preference.taps, slots, totals, beside.take)
    return WithRouterLoss(objective, routers.coefficient, routers.take) if routers else objective


def unmoved_of(plan: Resolved, optimizer: PipelineOptimizer) -> Unmoved | None:
    """What is asked later which adapter tensors of this stage have not moved."""
    if plan.trained.adapter is None:
        return None
    named = {name: p for name, p in optimizer.parameters_by_name.items() if name not in plan.trained.in_full}
    return Unmoved(named, partial(value, optimizer.inner))


def beside_of(stage: Stage, spec: ObjectiveSpec | None) -> Beside | None:
    """The reference beside our stage's rows, and the taps on its layers, if the run has either."""
    if spec is None or not (slots := spec.reference_slots):
        return None
    return Beside(stage, spec.taps, spec.slots, slots, partial(adapters_off, stage), scores=spec.live)


def build_engine(
    plan: Resolved,
    place: engine.Place,
    stage: Stage,
    optimizer: PipelineOptimizer,
    objective: Objective,
    batches: prepare.TrainBatches,
    watcher: Watcher,
    times: StepTimes,
) -> PipelineEngine:
    """DeepSpeed's engine over our stage; it tells the watcher, and those who take times, what it is about to do."""

    def doing(what: str, waits: bool) -> None:
        watcher.doing(what, waits)
        times.doing(what, waits)

    built = engine.build(
        stage,
        place,
        objective,
        optimizer,
        plan.data.accumulation,
        dynamic_shape=batches.fixed_shape is None,
        first_trained=engine.first_trained_stage(bool(optimizer.parameters_by_name), place),
    )
    engine.announce(built, doing)
    tie_trained_embeddings(stage, optimizer, place)
    return built


def tie_trained_embeddings(stage: Stage, optimizer: PipelineOptimizer, place: engine.Place) -> None:
    """Trained tied embeddings on two stages are one weight: gradients are summed, and both make the same update."""
    tied = tied_head(stage.model)
    if place.stages == 1 or not tied:
        return
    own = [name for name in optimizer.parameters_by_name if name in {*tied, *tied.values()}]
    group = None
    for replica in range(place.replicas):  # every process takes part in making every group
        ranks = [place.topology.get_rank(pipe=s, data=replica) for s in (0, place.stages - 1)]
        candidate = dist.new_group(ranks)
        group = candidate if place.rank in ranks else group
    if own:
        optimizer.tie(frozenset(own), group, counts=stage.is_first)


@log_if_slow("starting: reading the checkpoint")
def put_back(
    folder: Path,
    manifest: dict[str, Any],
    about: dict[str, Any],
    stage: Stage,
    optimizer: PipelineOptimizer,
    place: engine.Place,
    batches: prepare.TrainBatches,
    objective: ObjectiveSpec | None,
    carrier: Carrier | None,
) -> Progress:
    """The checkpoint's state into optimizer, weights and generators; says what differs from its configuration.

    `about`: what this run's checkpoints say about it (`facts`). Gives how far the run was, in this run's order of the data.
    """
    recorded = about["config"]
    if lines := run_folder.differences(manifest["config"], recorded):
        log("changed since the checkpoint:\n" + "\n".join(lines))
    aliases = tied_head(stage.model)
    same_layout = manifest["layout"] == about["layout"]
    with engine.agreement(place):
        run_folder.check_continues(manifest, recorded, set(about["trained"]), aliases)
        if objective is not None and place.rank == 0:  # who reads it
            reference.check_kept(folder.parent, manifest, objective.reference)
        order = batches.order_hash(manifest["epoch"])
        if manifest["rows"] and order != manifest["order"]:
            raise UserError(
                "the training data or its order is not the checkpoint's, so its position in the data means nothing; "
                "restore the datasets, their settings and the seed, or start a new run"
            )
    needs = partial(needed, names=optimizer.parameters_by_name, aliases=aliases, number=place.number)
    with engine.agreement(place), brought(carrier, folder, manifest, needs) as (there, of_it):
        progress = restore(
            there,
            of_it,
            optimizer,
            place.device,
            place.number,
            aliases=aliases,
            optimizer_states=recorded["load_optimizer_states"],
            same_layout=same_layout,
        )
    if not same_layout:
        torch.manual_seed(recorded["seed"] + place.number + 1000003 * progress.step)
    log(f"resumed:  after step {progress.step}, from {folder}")
    return progress._replace(order=order)


def schedule(updates: Updates, steps_in_epoch: int) -> Callable[[int, int], float]:
    """(step, total steps) → learning rate."""
    if (constant := updates.constant_lr) is not None:
        return lambda step, total: constant
    warmup = warmup_steps(updates.warmup, steps_in_epoch)
    peak, shape, lowest = updates.optimizer.lr, updates.lr_shape, updates.optimizer.lr_min
    return lambda step, total: learning_rate(step, peak=peak, warmup=warmup, total=total, shape=shape, lowest=lowest)


def artifact_writer(
    plan: Resolved,
    stage: Stage,
    place: engine.Place,
    save_dtype: str | None,
    train_logit_scale: float,
    stops: Sequence[int],
    carrier: Carrier | None,
) -> Callable[[Path, int], None]:
    """What writes the adapter, or the model, as it is at a step, into a folder. `stops`: ids at which it learns to stop."""
    dtype = DTYPES[save_dtype] if save_dtype else None
    base, tied = plan.base, plan.trained.tied
    if plan.trained.adapter is None:
        return lambda folder, step: saving.save_model(
            folder, step, place, stage, Path(base.folder), dtype, stops, carrier
        )
    write = families.writer(plan.trained.adapter, base, train_logit_scale, tied, stops)

    def save(folder: Path, step: int) -> None:
        tensors = {name: t for name, t in written(stage).items() if name not in tied}
        saving.save_adapter(folder, step, place, tensors, dtype, write, carrier)

    return save


def names_on_all_stages(optimizer: PipelineOptimizer, place: engine.Place) -> list[str]:
    """The trained parameters of the whole model."""
    names: list[list[str]] = [[] for _ in range(place.world)]
    dist.all_gather_object(names, list(optimizer.parameters_by_name))
    return sorted({name for each in names for name in each})


def facts(recorded: dict[str, Any], place: engine.Place, trained: list[str]) -> dict[str, Any]:
    """What every checkpoint of the run says about itself."""
    return {
        "trained": trained,
        "config": recorded,
        "layout": [place.stages, place.replicas],
        "versions": record.versions(),
    }


def say_memory(place: engine.Place) -> None:
    """Each process's peak memory so far, which is that of loading its stage."""
    peaks: list[int] = [0] * place.world
    dist.all_gather_object(peaks, peak_memory())
    shown = ", ".join(f"rank {rank} {gib(peak)}" for rank, peak in enumerate(peaks))
    log(f"memory:   {shown} at most while loading")
