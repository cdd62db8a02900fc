# PYTHON_ARGCOMPLETE_OK
"""Compare runs:  python compare_runs.py RUN RUN … [--html OUT]

Takes the folders of two runs or more; shows where their configurations differ and what each came to, and with --html writes
one page with their curves in one picture. Exit codes: 0 done, 2 the request cannot be carried out.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Where the configurations of runs differ, and what each came to.",
        epilog="example: python compare_runs.py runs/20261129_10-00-00 runs/20261129_14-00-00 --html comparison.html",
        allow_abbrev=False,
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, under their output_dir")
    command.add_argument("--html", type=Path, metavar="OUT", help="write a page with the curves, and a .png beside it")
    arguments.add_force(command, "replace what stands at OUT")
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line, read, show."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.publishing.report.comparison import compare  # matplotlib: only now that the command line is right

    compare(asked.runs, asked.html, force=asked.force)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
