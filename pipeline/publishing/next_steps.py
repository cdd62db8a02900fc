"""What can be done with what a command has made, as lines to paste.

Takes folders; gives commands of this program with them. Needs neither torch nor the folders themselves.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PROMPT = "It was"  # for whoever wants to hear the model at once


class Command(NamedTuple):
    """`what` it does, and the `line` to type."""

    what: str
    line: str


def after_run(run_dir: Path, saved: Path, base: Path, *, is_adapter: bool) -> list[Command]:
    """Of a run that has put what it trained into `saved`."""
    if not is_adapter:
        return [_hear("Hear the model:", "--model", str(saved))]
    return [
        _hear(
            "Hear the model, with the adapter and without it:", "--model", str(base), "--lora", str(saved), "--compare"
        ),
        _command("Look into the adapter:", "inspect_lora.py", str(saved), "--input", str(base)),
        fold(base, saved, run_dir / "merged"),
    ]


def fold(base: Path, adapter: Path, output: Path) -> Command:
    """The fold of an adapter into its base."""
    places = ["--input", str(base), "--lora", str(adapter), "--output", str(output)]
    return _command("Fold it into the base's weights:", "merge_lora.py", *places)


def after_fold(output: Path) -> list[Command]:
    """Of a model that an adapter was folded into."""
    return [_hear("Hear it:", "--model", str(output))]


def after_export(base: Path, output: Path, *, gguf: bool) -> list[Command]:
    """Of an adapter in its additive form."""
    if gguf:
        line = shlex.join(["llama-server", "-m", f"{base.name}.gguf", "--lora", str(output)])
        return [Command("Serve it with llama.cpp, over the base as GGUF:", line)]
    return [
        _hear("Hear it, with the adapter and without it:", "--model", str(base), "--lora", str(output), "--compare")
    ]


def after_making(base: Path, adapter: Path) -> list[Command]:
    """Of an adapter that was made without training."""
    return [
        _hear("Hear it, with the adapter and without it:", "--model", str(base), "--lora", str(adapter), "--compare"),
        fold(base, adapter, adapter.with_name(f"{adapter.name}-merged")),
    ]


def lines(commands: Sequence[Command]) -> str:
    """For the console."""
    return "\n".join(f"{command.what}\n  {command.line}" for command in commands)


def _hear(what: str, *places: str) -> Command:
    return _command(what, "generate.py", *places, "--prompt", PROMPT)


def _command(what: str, script: str, *arguments: str) -> Command:
    return Command(what, shlex.join(["python", script, *arguments]))
