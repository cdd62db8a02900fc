"""A run from its config to its exit code, on every process: check, read the data, meet, assemble, train, and what follows.

Takes the config, the parsed command line, and what has listened since the process began (stops, the log, the times of the
start). Errors of the data and the config come before any process waits for another.
"""

import argparse
import sys
from pathlib import Path

from pipeline.artifacts import saved_at
from pipeline.config.schema import Config
from pipeline.console import EXIT_DONE, EXIT_STOPPED, log, rank, warn
from pipeline.formats.base_model import read_base
from pipeline.formats.fingerprint import fingerprint
from pipeline.log_file import LogFile
from pipeline.model.trial import attention_check
from pipeline.publishing import next_steps
from pipeline.training import trackers
from pipeline.training.data.batches import describe_steps, micro_batches
from pipeline.training.data.read import read_data
from pipeline.training.engine import engine, selftest
from pipeline.training.nodes import meeting
from pipeline.training.nodes.records import Exchanged, Mapped, Records
from pipeline.training.run import after_training, assemble, errors, folder, profiler
from pipeline.training.run.peers import RECORD
from pipeline.training.run.record import RunRecord
from pipeline.training.run.stop import Watcher
from pipeline.training.start import prepare, resolve
from pipeline.training.start.times import StartTimes


def train(config: Config, arguments: argparse.Namespace, watcher: Watcher, log_file: LogFile, times: StartTimes) -> int:
    """The run; its exit code."""
    restarted = folder.of_this_launch(Path(config.output_dir))
    if folder.was_stopped(restarted):
        log(f"{restarted[0]} was stopped, and is not restarted")
        return EXIT_STOPPED
    store = meeting.launchers_store()
    with meeting.telling(store):
        engine.check_version()
        resume = arguments.resume_from_checkpoint or config.resume_from_checkpoint
        plan = resolve.resolve(config, resumes=bool(resume))
        prepare.check_files(config.model, config.output_dir, plan.meta_model)
        after_training.check(config.after_training, config.model, config.output_dir, plan, config.trainable_modules)
        trackers.check(config.trackers)
        times.ended("checks")
        data = read_data(plan.data, prepare.tokenizer_for(plan, config.model), plan)
        times.ended("data")
        resumed = folder.find_checkpoint(Path(config.output_dir), resume, restarted) if rank() == 0 else None
    file = meeting.file_in(Path(config.output_dir))
    try:
        place = engine.initialise(config.pipeline_stages, store or file, config.use_column_major_topology)
        watch(watcher, place, file, config.hang_timeout_minutes)
        carrier = folder.find_carrier(Path(config.output_dir), place)
        times.ended("meeting")
        batches = micro_batches(plan.data, data, place.replica, place.replicas)
        check_same_on_nodes(place, Path(config.model), batches.order_hash(0))
        describe_steps(plan.data, plan.updates, batches, place.replicas, plan.trained.adapter)
        attention_check.check_device(config.attn_implementation, place.device)
        with errors.explained(watcher, save=lambda: None):
            selftest.run(place, config.gradient_accumulation_steps)
            times.ended("self-test")
            run = assemble.trainer(config, plan, data, place, watcher, resumed, sys.argv, carrier)
            log_file.open(run.saver.run_dir)
        times.ended("model")
        run.times = times
        if arguments.profile:
            run.around_step = profiler.StepProfiler(run.saver.run_dir, place.rank, arguments.profile).step
        with errors.explained(watcher, run.save_between_boundaries):
            record = RunRecord(run.saver.run_dir, place, data, run.step, times.seconds)
            code = run.run()
            record.end(run.step)
        for line in data.warnings if code == EXIT_DONE else ():
            warn(line)
        watcher.part()
        run.saver.close()
        engine.shutdown()
        if code == EXIT_DONE and rank() == 0:
            run_folder, step, resume_line = run.folder, run.step, run.resume_line  # the folder stays locked
            run.reports.run_ended()
            engine.let_go(run.engine)
            del run, plan  # and with them the stage's weights
            saved = last_or_best(run_folder.path, step, config.load_best_at_end)
            follows = next_steps.after_run(
                run_folder.path, saved.folder, Path(config.model), is_adapter=not config.full_fine_tune
            )
            log(f"what can come next:\n{next_steps.lines(follows)}")
            after_training.follow(
                config.after_training,
                watcher,
                run_dir=run_folder.path,
                saved=saved,
                base=Path(config.model),
                resume_line=resume_line,
                repository=config.hub_model_id,
                private=config.hub_private_repo,
            )
        return code
    finally:
        if rank() == 0:
            file.unlink(missing_ok=True)


def last_or_best(run_dir: Path, step: int, best: bool) -> saved_at.Saved:
    """What is gone on with after a run of so many steps; says where that is not the `best` although it should be."""
    saved = saved_at.last_or_best(run_dir, step, best=best)
    if best and saved.folder.name != saved_at.BEST:
        warn(
            "load_best_at_end: no evaluation was better than the one before the first step; "
            f"what follows takes {saved.folder.name}/"
        )
    return saved


def check_same_on_nodes(place: engine.Place, model: Path, order: str) -> None:
    """UserError, everywhere, where a node has another model in its folder, or other training data (`order`: their hash)."""
    if not place.over_nodes:
        return
    meeting.check_same({"the model's folder": fingerprint(read_base(model, "model")), "the training data": order})


def watch(watcher: Watcher, place: engine.Place, file: Path, hang_timeout_minutes: float) -> None:
    """From here on every process sees where the others are; on one node through memory mapped from beside `file`."""
    try:
        if place.over_nodes:
            records: Records = Exchanged(meeting.store_for_a_thread(), RECORD, place.rank, place.world)
        else:
            records = Mapped(file.with_name(f"{file.name}-peers"), RECORD, place.world)
    except OSError as error:
        warn(f"{file.parent}: {error.strerror}; a process that hangs will not be noticed")
        return
    watcher.meet(records, place.rank, place.world, hang_timeout_minutes)
