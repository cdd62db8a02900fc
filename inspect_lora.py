# PYTHON_ARGCOMPLETE_OK
"""Read an adapter:  python inspect_lora.py ADAPTER [--input BASE] [--text FILE] [--html OUT]

Takes an adapter's folder (ours, PEFT's LoRA, or the founding method's hacked PEFT); gives a table of what each module
detects, writes, and does to a direction. With the base model's folder: the tokens behind it. With a text as well: where it
fires. --html writes the whole as one page. Exit codes: 0 done, 2 the request cannot be carried out, 28 disk full.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Read an adapter: what it looks for, what it writes, how strongly, and where in a text.",
        epilog="example: python inspect_lora.py runs/x/step100 --input models/base --text book.txt --html step100.html",
    )
    command.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of the adapter")
    command.add_argument(
        "--input",
        type=Path,
        metavar="BASE",
        help="folder of its base model, or OWNER/NAME[@REVISION] on the Hub: shows tokens",
    )
    command.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text: shows where in it the adapter fires")
    command.add_argument("--html", type=Path, metavar="OUT", help="write all of it as one page, readable offline")
    command.add_argument(
        "--directions", type=int, default=4, metavar="N", help="directions a module to show in words (default 4)"
    )
    command.add_argument(
        "--tokens", type=int, default=8192, metavar="T", help="tokens of the text to read (default 8192)"
    )
    arguments.add_device(command, "where the base runs for --text")
    arguments.add_force(command, "replace the page if it exists")
    arguments.add_kind(command)
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line, read, show."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.commands.inspect_adapter import inspect  # torch: only now that the command line is right

    inspect(asked)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
