"""Our version, in one place, and the commit of a source tree that is a checkout.

Gives `0.2.0`, or `0.2.0+gde354ba12345.dirty`: the commit, and whether tracked files differ from it. What a run, a fold or a
benchmark writes carries it, so that a figure can be traced to the code that made it.
"""

import argparse
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

NAME = "mulora-pipe"
VERSION = "0.2.0"
GIT_TIMEOUT_S = 2.0
ROOT = Path(__file__).resolve().parents[1]


@cache
def full() -> str:
    """The version, with the commit where it is known. Asked once a process, so that what changes on disk meanwhile does not
    change what the process says of itself."""
    commit = commit_of(ROOT)
    return f"{VERSION}+g{commit}" if commit else VERSION


def commit_of(tree: Path) -> str:
    """`de354ba12345`, or `de354ba12345.dirty`; empty where `tree` is no checkout or git is missing, refuses or is slow."""
    if not (tree / ".git").exists():  # not the commit of a repository that holds a copy of ours
        return ""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().replace("-dirty", ".dirty")


class ShowVersion(argparse.Action):
    """`--version`: print it and end."""

    def __init__(self, option_strings: list[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version, with the commit where it is known")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Ask for the commit only now: git takes a moment."""
        print(NAME, full())
        parser.exit()
