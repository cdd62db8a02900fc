"""The Dockerfile and the devcontainer: made of what the project itself is made of.

A build is not among these tests: it takes a daemon and a base image. What an image is built of is held here.
"""

import json
import re
import shlex

from tests.helpers.builders import ROOT


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: (FROM, RUN, …; the rest of the line, continuations joined)."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [
        (line.split(" ", 1)[0], " ".join(line.split(" ", 1)[1].split())) for line in text.splitlines() if line.strip()
    ]


def test_the_image_has_the_python_of_the_makefile() -> None:
    python = re.search(r"(?m)^PYTHON \?= python(\S+)$", (ROOT / "Makefile").read_text())
    assert python is not None
    assert instructions()[0] == ("FROM", f"python:{python[1]}-slim")


def test_the_image_installs_what_the_makefile_installs_for_training() -> None:
    """requirements.txt in the versions of constraints.txt, both copied before; the tests' own packages are left out."""
    found = instructions()
    (install,) = [place for place, (_, rest) in enumerate(found) if rest.startswith("pip install")]
    words = shlex.split(found[install][1])
    assert words[words.index("-c") + 1] == "constraints.txt"
    assert words[words.index("-r") + 1] == "requirements.txt"
    copied = {name for kind, rest in found[:install] if kind == "COPY" for name in rest.split()[:-1]}
    assert copied == {"constraints.txt", "requirements.txt"}
    assert ("COPY", ". .") in found[install:]
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_has_what_the_makefile_calls() -> None:
    """make itself, git for the version, and a C compiler with its headers for Triton."""
    (apt,) = [rest for kind, rest in instructions() if kind == "RUN" and "apt-get install" in rest]
    assert {"gcc", "libc6-dev", "git", "make"} <= set(apt.split())


def test_what_the_image_starts_is_there_and_not_left_out_of_it() -> None:
    (command,) = [json.loads(rest) for kind, rest in instructions() if kind == "CMD"]
    assert (ROOT / command[-1]).is_file()
    left_out = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    assert left_out == [".git", ".venv*", ".*_cache", ".hypothesis", "runs"], "nothing that git has but .git itself"


def test_the_devcontainer_is_that_image_and_sets_up_as_the_readme_does() -> None:
    content = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    folder = ROOT / ".devcontainer"
    assert (folder / content["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / content["build"]["context"]).resolve() == ROOT
    assert content["postCreateCommand"] == "make setup"
    assert re.search(r"(?m)^setup:", (ROOT / "Makefile").read_text())
    assert content["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"].endswith(
        "/.venv/bin/python"
    )
