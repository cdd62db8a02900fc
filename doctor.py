# PYTHON_ARGCOMPLETE_OK
"""What this machine has, and what to mend:  python doctor.py [--folder OUTPUT_DIR]

Looks at GPUs, drivers, copy rates, two processes that talk, 16-bit products, libraries, memory, limits and the disk; each line
says ok, slow or broken, with the mend. What it measures between stages is what `train.py --plan` takes here from then on. Exit
codes: 0 a run works here, 2 something is broken.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_CONFIG, EXIT_DONE, leave_on_sigterm, log, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="What this machine has, how fast it is, and what to mend before a run.",
        epilog="example: python doctor.py --folder /mnt/data/runs",
        allow_abbrev=False,
    )
    command.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="where runs will be written (output_dir; default the current folder)",
    )
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line, look, say."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.machine import accelerators, system  # torch: only now that the command line is right
    from pipeline.machine.findings import lines, verdict

    found = [*system.look(asked.folder), *accelerators.look()]
    log(lines(found))
    log(verdict(found))
    return EXIT_CONFIG if any(finding.state == "broken" for finding in found) else EXIT_DONE


if __name__ == "__main__":
    run_command(main)
