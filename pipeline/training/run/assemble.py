"""Puts a run together on one process: stage, weights, adapters, engine, state.

Takes the config, what was resolved and read of it, and our place in the pipeline; gives a `Trainer` at the step to go on
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
from pipeline.console import gib, log
from pipeline.formats.dtypes import DTYPES
from pipeline.model.adapters.base import written
from pipeline.model.adapters.switch import adapters_off
from pipeline.model.router_loss import RouterLoss
from pipeline.model.stage import Stage
from pipeline.model.structure.build import logit_transform
from pipeline.objectives.language_modelling import LanguageModelling
from pipeline.objectives.objective import Objective
from pipeline.objectives.preference import Preference, StepTotals
from pipeline.objectives.representation import WithTaps
from pipeline.objectives.with_router_loss import WithRouterLoss
from pipeline.publishing.report.beside import Reports
from pipeline.training.checkpoint import trained as saving
from pipeline.training.checkpoint.saver import Saver
from pipeline.training.checkpoint.state import RunState
from pipeline.training.data.batches import TrainBatches, evaluation_batches, micro_batches
from pipeline.training.data.read import Data
from pipeline.training.engine import engine, reference
from pipeline.training.engine.asking import RunAsker
from pipeline.training.engine.on_policy import Negatives
from pipeline.training.engine.samples import Samples
from pipeline.training.metrics import Metrics, StepMemory, peak_memory
from pipeline.training.nodes.carrying import Carrier
from pipeline.training.optim.inner import value
from pipeline.training.optim.pipeline_optimizer import PipelineOptimizer
from pipeline.training.run import folder as run_folder
from pipeline.training.run.begin import begin, facts, names_on_all_stages, put_back
from pipeline.training.run.peers import UNHURRIED
from pipeline.training.run.stop import Watcher
from pipeline.training.run.trainer import Trainer
from pipeline.training.stage import families
from pipeline.training.stage.beside import Beside
from pipeline.training.stage.build import build_stage
from pipeline.training.stage.optimizer import optimizer_of, schedule, tie_trained_embeddings
from pipeline.training.stage.unmoved import Unmoved
from pipeline.training.start import plan as planned
from pipeline.training.start.objective import ObjectiveSpec
from pipeline.training.start.resolved import Resolved
from pipeline.training.step_measures import LayerGradients, StepTimes
from pipeline.training.trackers import Trackers


def trainer(
    config: Config,
    plan: Resolved,
    data: Data,
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
        batches = micro_batches(plan.data, data, place.replica, place.replicas)
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
        evaluations=evaluation_batches(plan.data, data, place.replica, place.replicas),
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


def batches_of(plan: Resolved, data: Data, place: engine.Place, watcher: Watcher) -> TrainBatches:
    """The micro-batches of this replica; to make a window of a stream counts as getting on."""
    if data.stream:
        data.stream.windows.alive = lambda count: watcher.doing(f"making a window, {count:,} rows read")
    return micro_batches(plan.data, data, place.replica, place.replicas)


def samples_of(
    plan: Resolved, data: Data, stage: Stage, place: engine.Place, metrics: Metrics, watcher: Watcher
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
    data: Data,
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
    batches: TrainBatches,
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


def say_memory(place: engine.Place) -> None:
    """Each process's peak memory so far, which is that of loading its stage."""
    peaks: list[int] = [0] * place.world
    dist.all_gather_object(peaks, peak_memory())
    shown = ", ".join(f"rank {rank} {gib(peak)}" for rank, peak in enumerate(peaks))
    log(f"memory:   {shown} at most while loading")
