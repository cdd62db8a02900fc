# PYTHON_ARGCOMPLETE_OK
"""Compare adapters with their base:  python evaluate_lora.py --config EVAL.toml --adapters base A B …

Takes a configuration with a model and datasets, and folders of adapters, not folded; loads the base once; gives a table of
adapters by datasets with intervals and stop-lights, in the terminal and in a folder of its own with every record.
`deepspeed --num_gpus N evaluate_lora.py …` cuts the model into stages. Exit codes: 0 done, 2 the request cannot be carried
out, 28 disk full, 130 aborted.
"""

import argparse

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Compare adapters with their base on rows that were trained on and rows that were not.",
        epilog="example: python evaluate_lora.py --config eval.toml --adapters base runs/x/step100 runs/y/step100",
        allow_abbrev=False,
    )
    command.add_argument("--config", required=True, metavar="FILE", help="TOML of the evaluation (docs/evaluation.md)")
    command.add_argument(
        "--adapters",
        nargs="+",
        metavar="ADAPTER",
        help="folders of adapters; 'base' is the model without any, which is measured in any case (default: the config's)",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="of lm-evaluation-harness, which has to be installed (default: the config's)",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the config: --set datasets.0.subsample=0.1",
    )
    arguments.add_device(command, "where one process runs the model", prefers_gpu=True)
    arguments.add_kind(command)
    arguments.add_version(command)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return command


def main() -> int:
    """Parse the command line, score, show."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.commands.evaluate import evaluate  # torch: only now that the command line is right

    evaluate(asked)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
