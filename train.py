# PYTHON_ARGCOMPLETE_OK
"""Train: `deepspeed train.py --config config_creative_writer.toml`.

Takes a TOML file; gives a run's folder with adapters, checkpoints and metrics. `--check` resolves everything that needs
no weights and ends; `--preview N` prints N rows as the model will read them; `--prepare` puts the data into the cache. Exit
codes: 0 done, 2 config or data, 3 checkpoint, 4 a loss or gradient that is not finite, 5 out of memory, 6 a process was
lost, 28 disk full, 75 stopped and resumable, 130 aborted.
"""

from pipeline.training.run.stop import Watcher, hold_signals

HELD = hold_signals()  # before torch and its libraries start threads of their own

import os  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from pipeline.console import TERMINAL, debug, log_if_slow, run_command  # noqa: E402
from pipeline.log_file import LogFile  # noqa: E402
from pipeline.training.start import launch  # noqa: E402
from pipeline.training.start.arguments import parse  # noqa: E402
from pipeline.training.start.times import StartTimes  # noqa: E402
from pipeline.version import NAME, full  # noqa: E402

IMPORTING = "starting: importing torch, transformers and DeepSpeed"


def main() -> int:
    """Parse, validate, then check, preview or train; each imports what it needs, once it is known which it is."""
    arguments = parse()
    watcher, log_file = Watcher(HELD), LogFile()
    trains = not (arguments.plan or arguments.prepare or arguments.check or arguments.preview is not None)
    TERMINAL.show_from(arguments.log_level if trains else "info")
    debug(f"version:  {NAME} {full()}")
    debug(f"command:  {shlex.join(sys.argv)}")
    times = StartTimes()
    from pipeline.config import loading

    times.ended("imports")
    config = loading.load(arguments.config, arguments.deepspeed_config, arguments.set)
    times.ended("config")
    if trains:
        launch.check_processes(config.pipeline_stages)
    config = loading.with_model_here(config, weights=trains)
    times.ended("download")
    os.environ["TRANSFORMERS_VERBOSITY"] = os.environ.get("TRANSFORMERS_VERBOSITY", "error")
    if arguments.plan:
        with log_if_slow(IMPORTING):
            from pipeline.training.start import plan as planned
        return planned.show(config, arguments.devices)
    if not trains:
        with log_if_slow(IMPORTING):
            from pipeline.training.start import check
        return check.prepare_data(config) if arguments.prepare else check.check(config, arguments.preview)
    with log_if_slow(IMPORTING):
        from pipeline.training.run import errors
        from pipeline.training.run.train import train
    times.ended("imports")
    with errors.out_of_space_explained(Path(config.output_dir)):
        return train(config, arguments, watcher, log_file, times)


if __name__ == "__main__":
    run_command(main)
