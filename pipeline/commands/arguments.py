"""Options that several commands have, each with one name, one default and one meaning.

Takes an argparse parser, or a group of one, and what the option does in this command; adds the option to it. Needs no torch.
"""

import argparse
import os
from pathlib import Path

from pipeline.families import KINDS
from pipeline.formats.choices import BASE_QUANTS, DTYPE_NAMES
from pipeline.version import ShowVersion

Options = argparse._ActionsContainer


def add_base(command: Options) -> None:
    """--input, required."""
    command.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="BASE",
        help="folder of the base model, or OWNER/NAME[@REVISION] on the Hub",
    )


def add_base_quant(command: Options, *, why: str, dtype: str) -> None:
    """--base-quant and --base-dtype: the base as it was in 4 bits. `why` and `dtype` are their help."""
    command.add_argument("--base-quant", choices=BASE_QUANTS, help=why)
    command.add_argument("--base-dtype", choices=DTYPE_NAMES, help=dtype)


def add_kind(command: Options) -> None:
    """--kind, where an adapter's files leave it open."""
    command.add_argument(
        "--kind", choices=KINDS, help="what LORA adapters on square weights are, where their shapes cannot tell"
    )


def add_device(command: Options, where: str, *, prefers_gpu: bool = False) -> None:
    """--device; `where` begins its help. `prefers_gpu`: without it None, which the command takes for a GPU where there is one."""
    default = "a GPU where there is one" if prefers_gpu else "cpu"
    command.add_argument(
        "--device", default=None if prefers_gpu else "cpu", help=f"{where}: cpu, cuda, cuda:1 (default {default})"
    )


def add_dry_run(command: Options) -> None:
    """--dry-run."""
    command.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")


def add_force(command: Options, replace: str) -> None:
    """--force; `replace` is its help."""
    command.add_argument("--force", action="store_true", help=replace)


def parse(command: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given on the command line."""
    complete(command)
    return command.parse_args()


def complete(command: argparse.ArgumentParser) -> None:
    """Where a shell asks how the command line may go on (argcomplete), say it and end."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(command)


def add_version(command: Options) -> None:
    """--version."""
    command.add_argument("--version", action=ShowVersion)
