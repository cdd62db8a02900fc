"""The report of a run, in a process of its own:  python -m pipeline.publishing.report RUN

The trainer starts it while a run goes on, so that drawing takes nothing from the steps.
"""

import os
import sys
from pathlib import Path

from pipeline.console import run_command
from pipeline.publishing.report.page import write


def main() -> int:
    """Write the report of the run in the folder that is named."""
    os.nice(10)
    write(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    run_command(main)
