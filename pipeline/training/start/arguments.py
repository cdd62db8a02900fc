"""The command line of train.py.

Gives the parsed arguments, or one UserError for those that contradict each other. Needs neither torch nor DeepSpeed.
"""

import argparse

from pipeline.commands.arguments import complete
from pipeline.commands.known_models import ShowModels
from pipeline.console import LEVELS, UserError
from pipeline.version import ShowVersion

MOST_PROFILED = 100  # steps


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
    parser.add_argument("--preview", "--debug_dataset", type=int, metavar="N", help="print N training rows, then end")
    parser.add_argument(
        "--prepare", action="store_true", help="tokenise the data into the cache, say what it is, then end"
    )
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
    parser.add_argument("--profile", type=int, metavar="N", help="trace N steps, from the second on, into profile/")
    parser.add_argument("--list-models", "--list_models", action=ShowModels)
    parser.add_argument("--version", action=ShowVersion)
    for ignored in ("--no_quantiles", "--deepspeed"):
        parser.add_argument(ignored, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    complete(parser)
    arguments, unknown = parser.parse_known_args()
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
