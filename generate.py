# PYTHON_ARGCOMPLETE_OK
"""Hear a model:  python generate.py --model DIR [--lora ADAPTER] (--prompt TEXT | --prompts FILE | --chat)

Takes a model's folder and an adapter's; gives what the model says to prompts, or a conversation with it where there is a
terminal. `deepspeed --num_gpus N generate.py …` cuts the model into N stages. Exit codes: 0 done, 2 the request cannot be
carried out, 130 aborted.
"""

import argparse
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, leave_on_sigterm, run_command
from pipeline.formats.choices import DTYPE_NAMES, RUN_QUANTS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="What a model says to prompts, with an adapter and without it; interactive without --prompt and --prompts.",
        epilog="example: python generate.py --model models/base --lora runs/x/step100 --prompt 'It was a dark' --compare",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the model, or OWNER/NAME[@REVISION] on the Hub",
    )
    command.add_argument("--lora", type=Path, metavar="ADAPTER", help="folder of an adapter of it, not folded")
    asked = command.add_argument_group("what is asked")
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="to go on from; may be given several times"
    )
    asked.add_argument("--prompts", type=Path, metavar="FILE", help="a UTF-8 text with one prompt a line")
    asked.add_argument("--chat", action="store_true", help="through the model's chat template, as messages of a user")
    asked.add_argument("--system", default="", metavar="TEXT", help="with --chat: the system's message")
    asked.add_argument(
        "--chat-template",
        metavar="T",
        help="with --chat: a file or a name as in [[datasets]] (default: the tokenizer's)",
    )
    asked.add_argument(
        "--compare", action="store_true", help="with --lora: also what the base says, with the same noise"
    )
    how = command.add_argument_group("how tokens are chosen")
    how.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="of an answer at most (default 200)")
    how.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divides the logits; 0 is greedy (default 1)"
    )
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K likeliest; 0: all (default)")
    how.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="among the likeliest that together have P; 1: all (default)",
    )
    how.add_argument(
        "--min-p", type=float, default=0.01, metavar="P", help="none below P times the likeliest (default 0.01)"
    )
    how.add_argument("--temperature-last", action="store_true", help="filter first, as llama.cpp; else as transformers")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    arguments.add_device(command, "where one process runs the model", prefers_gpu=True)
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="of the weights (default: the model's own)")
    command.add_argument(
        "--base-quant", choices=RUN_QUANTS, help="the base in 4 or 8 bits, as [quantization.bnb] trains over it"
    )
    arguments.add_kind(command)
    arguments.add_version(command)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return command


def main() -> int:
    """Parse the command line, load, answer."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    from pipeline.commands.generate import generate  # torch: only now that the command line is right

    generate(asked)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
