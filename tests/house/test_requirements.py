"""What is imported is required, what is required is used, and the versions that were tested are written down once."""

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

SHIPPED = [
    *ROOT.glob("*.py"),
    *(p for part in ("pipeline", "kernels", "docs", "benchmarks") for p in (ROOT / part).rglob("*.py")),
]
TESTS = list((ROOT / "tests").rglob("*.py"))
OURS = {"pipeline", "kernels", "docs", "benchmarks", "tests", *(p.stem for p in [*ROOT.glob("*.py"), *TESTS])}
# Imported where they are there.
OPTIONAL = {
    "triton": "comes with a CUDA build of torch",
    "liger_kernel": "a benchmark compares with it",
    "lm_eval": "evaluate_lora.py --tasks",
    "wandb": "a tracker, as any other that accelerate knows",
}
# Required without an import of ours.
USED_BY_OTHERS = {"tensorboard": "torch.utils.tensorboard", "datasets": "for data, in what comes next"}
TOOLS = {"ruff", "mypy", "pytest-timeout", "pytest-xdist", "triton", "trl"}


def required(name: str) -> dict[str, Requirement]:
    """By canonical name, what a requirements file asks for itself."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-r")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins() -> dict[str, str]:
    """constraints.txt: by canonical name, the one version that was tested."""
    found = {}
    for name, requirement in required("constraints.txt").items():
        (only,) = requirement.specifier
        assert only.operator == "==", requirement
        assert "+" not in only.version, requirement
        assert not requirement.marker, requirement
        found[name] = only.version
    return found


def imported(sources: list[Path]) -> dict[str, list[str]]:
    """Top-level packages of others that the files import, inside functions too, with where."""
    found: dict[str, list[str]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for package in {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names) - set(OPTIONAL):
                found.setdefault(package, []).append(source.relative_to(ROOT).as_posix())
    return found


known_distributions = functools.cache(importlib.metadata.packages_distributions)


def distributions(packages: dict[str, list[str]]) -> dict[str, list[str]]:
    """What to install for them, by canonical name."""
    known = known_distributions()
    return {canonicalize_name(known[package][0]): where for package, where in packages.items()}


@pytest.mark.parametrize(
    ("sources", "files"),
    [(SHIPPED, ["requirements.txt"]), (TESTS, ["requirements.txt", "requirements-dev.txt"])],
    ids=["shipped", "tests"],
)
def test_what_is_imported_is_required(sources: list[Path], files: list[str]) -> None:
    listed = {name for file in files for name in required(file)}
    needed = distributions(imported(sources))
    assert len(needed) > 10, "this test reads something"
    assert not {name: where for name, where in needed.items() if name not in listed}


@pytest.mark.slow
def test_what_is_required_is_imported() -> None:
    """And what only the tests import is in requirements-dev.txt."""
    by_the_program, by_the_tests = distributions(imported(SHIPPED)), distributions(imported(TESTS))
    assert not required("requirements.txt").keys() - by_the_program.keys() - USED_BY_OTHERS.keys()
    assert not required("requirements-dev.txt").keys() - by_the_tests.keys() - TOOLS


def test_what_was_tested_is_within_the_ranges() -> None:
    tested = pins()
    for name, requirement in {**required("requirements.txt"), **required("requirements-dev.txt")}.items():
        if name not in OPTIONAL:
            assert requirement.specifier.contains(tested[name]), f"{requirement}: constraints.txt has {tested[name]}"


def test_whatever_would_be_installed_is_pinned() -> None:
    """All that is asked for, and what that asks for in turn, as far as it is installed."""
    tested = pins()
    todo, seen = [*required("requirements.txt"), *required("requirements-dev.txt")], set[str]()
    while todo:
        if (name := todo.pop()) in seen:
            continue
        seen.add(name)
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version.partition("+")[0] != tested.get(name, installed.version):
            pytest.skip(f"{name} {installed.version} is installed, not what constraints.txt says")
        asked = [Requirement(line) for line in installed.requires or ()]
        todo += [canonicalize_name(r.name) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert len(seen) > 30
    assert not seen - tested.keys() - OPTIONAL.keys()


def test_the_readme_names_the_versions_that_were_tested() -> None:
    readme, tested = (ROOT / "README.md").read_text(encoding="utf-8"), pins()
    named = re.findall(r"\b(torch|DeepSpeed|transformers|PEFT|bitsandbytes) (\d+\.\d+\.\d+)", readme)
    assert {name for name, _ in named} == {"torch", "DeepSpeed", "transformers", "PEFT", "bitsandbytes"}
    assert not [(name, version) for name, version in named if tested[canonicalize_name(name)] != version]


def test_the_makefile_installs_them_and_again_when_they_change() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^\$\(VENV\)/\.installed:(.*)\n((?:\t.*\n)+)", makefile, re.M)
    assert rule
    assert "constraints.txt" in rule.group(1)
    assert "-c constraints.txt" in rule.group(2)
