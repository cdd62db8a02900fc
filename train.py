"""Train: `deepspeed train.py --config config_creative_writer.toml`.

Takes a TOML file; gives a run's folder with adapters, checkpoints and metrics. `--check` resolves everything that needs
no weights and ends; `--preview N` prints N chunks as the model will read them. Exit codes: 0 done, 2 config or data,
3 checkpoint, 4 a loss or gradient that is not finite, 5 out of memory, 6 a process was lost, 28 disk full, 75 stopped
and resumable, 130 aborted.
"""

from pipeline.training.run.stop import Watcher, hold_signals

HELD = hold_signals()  # before torch and its libraries start threads of their own

import argparse  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from pipeline.config import loading  # noqa: E402
from pipeline.config.schema import Config  # noqa: E402
from pipeline.console import EXIT_DONE, TERMINAL, debug, log_if_slow, rank, run_command  # noqa: E402
from pipeline.log_file import LogFile  # noqa: E402
from pipeline.training.start import launch  # noqa: E402
from pipeline.training.start.arguments import parse  # noqa: E402
from pipeline.version import NAME, full  # noqa: E402

IMPORTING = "starting: importing torch, transformers and DeepSpeed"


def main() -> int:
    """Parse, validate, then check, preview or train."""
    arguments = parse()
    watcher, log_file = Watcher(HELD), LogFile()
    trains = not (arguments.plan or arguments.check or arguments.preview is not None)
    TERMINAL.show_from(arguments.log_level if trains else "info")
    debug(f"version:  {NAME} {full()}")
    debug(f"command:  {shlex.join(sys.argv)}")
    config = loading.load(arguments.config, arguments.deepspeed_config, arguments.set)
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ.get("TRANSFORMERS_VERBOSITY", "error")
    if arguments.plan:
        with log_if_slow(IMPORTING):
            from pipeline.training.start import plan as planned
        return planned.show(config, arguments.devices)
    if arguments.check or arguments.preview is not None:
        with log_if_slow(IMPORTING):
            from pipeline.training.start.check import look
        return look(config, arguments.preview)
    launch.check_processes(config.pipeline_stages)
    with log_if_slow(IMPORTING):
        from pipeline.training.run import assemble, errors  # noqa: F401 (the first imports all that takes long)
    with errors.out_of_space_explained(Path(config.output_dir)):
        return train(config, arguments, watcher, log_file)


def train(config: Config, arguments: argparse.Namespace, watcher: Watcher, log_file: LogFile) -> int:
    """The run itself. Errors of the data and the config come before any process waits for another."""
    from pipeline.training.engine import engine, selftest
    from pipeline.training.run import after_training, assemble, errors, folder, profiler
    from pipeline.training.run.record import RunRecord
    from pipeline.training.start import prepare, resolve

    engine.check_version()
    resume = arguments.resume_from_checkpoint or config.resume_from_checkpoint
    plan = resolve.resolve(config, resumes=bool(resume))
    prepare.check_files(config.model, config.output_dir, plan.meta_model)
    after_training.check(config.after_training, config.model, config.output_dir, plan.trained, config.trainable_modules)
    data = prepare.read_data(plan.data, prepare.tokenizer_for(plan, config.model), plan)
    resumed = folder.find_checkpoint(Path(config.output_dir), resume) if rank() == 0 else None
    rendezvous = engine.rendezvous_in(Path(config.output_dir))
    try:
        place = engine.initialise(config.pipeline_stages, rendezvous, config.use_column_major_topology)
        watcher.meet(Path(f"{rendezvous}-peers"), place.rank, place.world, config.hang_timeout_minutes)
        batches = prepare.micro_batches(plan.data, data, place.replica, place.replicas)
        prepare.describe_steps(plan.data, plan.updates, batches, place.replicas)
        with errors.explained(watcher, save=lambda: None):
            selftest.run(place, config.gradient_accumulation_steps)
            run = assemble.trainer(config, plan, data, place, watcher, resumed, sys.argv)
            log_file.open(run.saver.run_dir)
        if arguments.profile:
            run.around_step = profiler.StepProfiler(run.saver.run_dir, place.rank, arguments.profile).step
        with errors.explained(watcher, run.save_between_boundaries):
            record = RunRecord(run.saver.run_dir, place, data, run.step)
            code = run.run()
            record.end(run.step)
        engine.shutdown()
        if code == EXIT_DONE and rank() == 0:
            run_folder, step, resume_line = run.folder, run.step, run.resume_line  # the folder stays locked
            engine.let_go(run.engine)
            del run, plan  # and with them the stage's weights
            after_training.follow(
                config.after_training,
                watcher,
                run_dir=run_folder.path,
                step=step,
                base=Path(config.model),
                resume_line=resume_line,
                repository=config.hub_model_id,
                private=config.hub_private_repo,
            )
        return code
    finally:
        if rank() == 0:
            rendezvous.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main)
