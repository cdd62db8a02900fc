"""The command line of train.py.

Gives the parsed arguments, or one UserError for those that contradict each other. Needs neither torch nor DeepSpeed.
"""

import argparse

from pipeline.commands.arguments import complete
from pipeline.commands.known_models import ShowModels
from pipeline.console import LEVELS, UserError
from pipeline.version import ShowVersion

MOST_PROFILED = 100  # steps
EXAMPLES = """\
examples:
  python train.py --config my_run.toml --check                       before anything is loaded; needs no GPU
  python train.py --config my_run.toml --plan --devices 2x48GiB      memory and time on GPUs that need not be there
  deepspeed train.py --config my_run.toml                            on all GPUs of this machine
  deepspeed --num_gpus 2 train.py --config my_run.toml               on two of them, or in two processes without any
  deepspeed train.py --config my_run.toml --resume_from_checkpoint   go on with the newest run
  torchrun --nproc_per_node 2 train.py --config my_run.toml          by torch's launcher; several machines: docs/clusters.md

deepspeed, torchrun and python are those in .venv/bin.
"""


def parser() -> argparse.ArgumentParser:
    """The options. `--local_rank` comes from the launcher; `--deepspeed` is qlora-pipe's and means nothing here."""
    command = argparse.ArgumentParser(
        description="Train an adapter or a model over stages. A training is started by a launcher, deepspeed or torchrun.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--config", metavar="TOML", help="in the current folder or in configs/")
    command.add_argument("--deepspeed_config", metavar="JSON", help="a DeepSpeed JSON as qlora-pipe takes it")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. optimizer.lr=1e-5"
    )
    command.add_argument("--check", action="store_true", help="resolve everything that needs no weights, then end")
    command.add_argument(
        "--plan", action="store_true", help="show each stage's memory and the run's time without weights or GPU"
    )
    command.add_argument("--devices", metavar="2x48GiB", help="with --plan: the GPUs, e.g. 2xA6000, 48GiB,80GiB")
    command.add_argument("--preview", "--debug_dataset", type=int, metavar="N", help="print N training rows, then end")
    command.add_argument(
        "--prepare", action="store_true", help="tokenise the data into the cache, say what it is, then end"
    )
    command.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        metavar="PATH",
        help="go on from the newest complete checkpoint, or from that of PATH",
    )
    command.add_argument(
        "--log_level", choices=LEVELS, default="info", help="what a run shows (default info); its log.txt has all of it"
    )
    command.add_argument("--profile", type=int, metavar="N", help="trace N steps, from the second on, into profile/")
    command.add_argument("--list-models", "--list_models", action=ShowModels)
    command.add_argument("--version", action=ShowVersion)
    for ignored in ("--no_quantiles", "--deepspeed"):
        command.add_argument(ignored, action="store_true", help=argparse.SUPPRESS)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return command


def parse() -> argparse.Namespace:
    """The command line."""
    command = parser()
    complete(command)
    arguments, unknown = command.parse_known_args()
    if unknown:
        raise UserError(f"unknown argument(s): {' '.join(unknown)}; --help lists those there are")
    if arguments.config is None:
        raise UserError("--config is missing: give a TOML file, in the current folder or in configs/")
    if arguments.preview is not None and arguments.preview < 1:
        raise UserError(f"--preview {arguments.preview}: give a number of rows, 1 or more")
    if arguments.profile is not None and not 1 <= arguments.profile <= MOST_PROFILED:
        raise UserError(
            f"--profile {arguments.profile}: give a number of steps, 1 to {MOST_PROFILED}: all events are in memory"
        )
    checks = arguments.check or arguments.preview is not None
    if arguments.plan + checks + arguments.prepare > 1:
        raise UserError(
            "--plan, --prepare, and --check with --preview each end the program: give one (--plan checks the model as well)"
        )
    if arguments.devices and not arguments.plan:
        raise UserError("--devices names the GPUs of a --plan: add --plan, or leave it out")
    return arguments
