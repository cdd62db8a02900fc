# PYTHON_ARGCOMPLETE_OK
"""A configuration for your model, data and GPUs:  python new_config.py --model M --data D --kind books --gpus 2x48GiB

Takes a model's folder or its name on the Hub, data of a kind and GPUs, from flags or by asking at the terminal; writes a
commented TOML with what the planner chose and why, which `train.py --check` accepts. Exit codes: 0 done, 2 nothing fits or the
request cannot be carried out.
"""

import argparse
import shlex
import sys
from pathlib import Path

from pipeline.commands import arguments
from pipeline.console import EXIT_DONE, UserError, leave_on_sigterm, log, run_command

KINDS = ("books", "chat", "preference")
QUESTIONS = {
    "model": "The base model: a folder, or OWNER/NAME on the Hub",
    "kind": f"The data is of which kind ({', '.join(KINDS)})",
    "data": "Where it is: a path, a pattern such as books/*.txt, or hub:OWNER/NAME",
    "gpus": "The GPUs, such as 2x48GiB, 2x3090 or 1xH100",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="A configuration for your model, data and GPUs, chosen by the planner. What is not given is asked for.",
        epilog="example: python new_config.py --model c4ai-command-r-v01 --kind books --data 'books/*.txt' --gpus 2x48GiB",
        allow_abbrev=False,
    )
    command.add_argument("--model", metavar="M", help=QUESTIONS["model"])
    command.add_argument("--kind", choices=KINDS, help="what the data is")
    command.add_argument("--data", metavar="D", help=QUESTIONS["data"])
    command.add_argument("--gpus", metavar="G", help=QUESTIONS["gpus"])
    command.add_argument("--sequence-len", type=int, metavar="N", help="tokens of a row; default the longest that fits")
    command.add_argument(
        "--output-dir", default="runs", metavar="DIR", help="where runs will be written (default runs)"
    )
    command.add_argument("--output", type=Path, default=Path("config.toml"), metavar="TOML", help="default config.toml")
    arguments.add_force(command, "replace what stands at --output")
    arguments.add_version(command)
    return command


def main() -> int:
    """Parse the command line, ask for what is missing, choose, write."""
    asked = arguments.parse(parser())
    leave_on_sigterm()
    given = {name: getattr(asked, name) or _answer(name) for name in QUESTIONS}
    if given["kind"] not in KINDS:
        raise UserError(f"--kind {given['kind']}: is none of {', '.join(KINDS)}")
    from pipeline.files import atomic_file, check_file_free  # and torch: only now that it is known what is asked
    from pipeline.formats.hub import model_folder
    from pipeline.recipes.choose import Wish, choose
    from pipeline.recipes.write import as_toml

    check_file_free(asked.output, replace=asked.force)
    folder = Path(model_folder(given["model"], "--model", weights=False))
    wish = Wish(
        folder, given["model"], given["kind"], given["data"], given["gpus"], asked.output_dir, asked.sequence_len
    )
    chosen = choose(wish)
    flags = [word for name in QUESTIONS for word in (f"--{name}", given[name])]
    text = as_toml(
        chosen,
        f"{given['model']} on {given['gpus']}, trained on {given['kind']}",
        shlex.join(["python", "new_config.py", *flags]),
        str(Path(__file__).resolve().parent / "configs" / "schema.json"),
    )
    with atomic_file(asked.output, replace=asked.force) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    log("\n".join([*chosen.reasons, "", chosen.plan, "", f"written: {asked.output}. Next:"]))
    log(f"  {shlex.join(['python', 'train.py', '--config', str(asked.output), '--check'])}")
    return EXIT_DONE


def _answer(name: str) -> str:
    """What the user types; UserError where nobody sits at a terminal."""
    if not sys.stdin.isatty():
        raise UserError(f"--{name}: give it; there is no terminal to ask at")
    return input(f"{QUESTIONS[name]}: ").strip()


if __name__ == "__main__":
    run_command(main)
