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
from pipeline.console import EXIT_DONE, LEVELS, TERMINAL, UserError, debug, rank, run_command, said_if_slow  # noqa: E402
from pipeline.log_file import LogFile  # noqa: E402
from pipeline.training.start import launch  # noqa: E402
from pipeline.version import NAME, ShowVersion, full  # noqa: E402

IMPORTING = "starting: importing torch, transformers and DeepSpeed"


def parse() -> argparse.Namespace:
    """The command line. `--local_rank` comes from the launcher; `--deepspeed` is qlora-pipe's and means nothing here."""
    parser = argparse.ArgumentParser(description="Train an adapter or a model over stages.", allow_abbrev=False)
    parser.add_argument("--config", metavar="TOML", help="in the current folder or in configs/")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="a DeepSpeed JSON as qlora-pipe takes it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. optimizer.lr=1e-5"
    )
    parser.add_argument("--check", action="store_true", help="resolve everything that needs no weights, then end")
    parser.add_argument(
        "--plan", action="store_true", help="show each stage's memory and the run's time without weights or GPU"
    )
    parser.add_argument("--devices", metavar="2x48GiB", help="with --plan: the GPUs, e.g. 2xA6000, 48GiB,80GiB")
    parser.add_argument("--preview", "--debug_dataset", type=int, metavar="N", help="print N training chunks, then end")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        metavar="PATH",
        help="go on from the newest complete checkpoint, or from that of PATH",
    )
    parser.add_argument(
        "--log_level", choices=LEVELS, default="info", help="what a run shows (default info); its log.txt has all of it"
    )
    parser.add_argument("--version", action=ShowVersion)
    for ignored in ("--no_quantiles", "--deepspeed"):
        parser.add_argument(ignored, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(f"unknown argument(s): {' '.join(unknown)}; --help lists those there are")
    if arguments.config is None:
        raise UserError("--config is missing: give a TOML file, in the current folder or in configs/")
    if arguments.preview is not None and arguments.preview < 1:
        raise UserError(f"--preview {arguments.preview}: give a number of chunks, 1 or more")
    if arguments.plan and (arguments.check or arguments.preview is not None):
        raise UserError(
            "--plan, --check and --preview each end the program: give one (--plan checks the model as well)"
        )
    if arguments.devices and not arguments.plan:
        raise UserError("--devices names the GPUs of a --plan: add --plan, or leave it out")
    return arguments


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
        with said_if_slow(IMPORTING):
            from pipeline.training.start import plan as planned
        return planned.show(config, arguments.devices)
    if arguments.check or arguments.preview is not None:
        with said_if_slow(IMPORTING):
            from pipeline.training.start.check import look
        return look(config, arguments.preview)
    launch.check_processes(config.pipeline_stages)
    with said_if_slow(IMPORTING):
        from pipeline.training.run import assemble, errors  # noqa: F401 (the first imports all that takes long)
    with errors.out_of_space_explained(Path(config.output_dir)):
        return train(config, arguments.resume_from_checkpoint or config.resume_from_checkpoint, watcher, log_file)


def train(config: Config, resume: bool | str, watcher: Watcher, log_file: LogFile) -> int:
    """The run itself. Errors of the data and the config come before any process waits for another."""
    from pipeline.training.engine import engine, selftest
    from pipeline.training.run import after_training, assemble, errors, folder
    from pipeline.training.run.record import RunRecord
    from pipeline.training.start import prepare

    engine.check_version()
    plan = prepare.plan_model(config, resumes=bool(resume))
    prepare.check_files(config, plan.shell)
    after_training.check(config, plan)
    data = prepare.read_data(config, prepare.tokenizer_for(plan, config.model), plan)
    resumed = folder.find_checkpoint(Path(config.output_dir), resume) if rank() == 0 else None
    rendezvous = engine.rendezvous_in(Path(config.output_dir))
    try:
        place = engine.initialise(config.pipeline_stages, rendezvous, config.use_column_major_topology)
        watcher.meet(Path(f"{rendezvous}-peers"), place.rank, place.world, config.hang_timeout_minutes)
        batches = prepare.micro_batches(config, data, place.replica, place.replicas)
        prepare.describe_steps(config, batches, place.replicas)
        with errors.explained(watcher, save=lambda: None):
            selftest.run(place, config.gradient_accumulation_steps)
            run = assemble.trainer(config, plan, data, place, watcher, resumed, sys.argv)
            log_file.open(run.saver.run_dir)
        with errors.explained(watcher, run.save_between_boundaries):
            record = RunRecord(run.saver.run_dir, place, data, run.step)
            code = run.run()
            record.end(run.step)
        engine.shutdown()
        if code == EXIT_DONE and rank() == 0:
            done = run.saver.run_dir, run.step, run.resume_line
            engine.let_go(run.engine)
            del run, plan  # and with them the stage's weights
            after_training.follow(config, *done, watcher)
        return code
    finally:
        if rank() == 0:
            rendezvous.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main)
