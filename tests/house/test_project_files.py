"""The files by which a project is handled: changelog, citation, hooks, templates. Each says what is so."""

import re
from typing import Any

import pytest
import yaml

from pipeline.log_file import FILE
from pipeline.training.run import record
from pipeline.version import VERSION
from tests.helpers.builders import ROOT

RELEASES = re.findall(r"(?m)^## (\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text())
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_newest_release_is_the_version() -> None:
    assert ".".join(RELEASES[0][:3]) == VERSION


def test_releases_are_in_order_and_there_is_nothing_else() -> None:
    numbers, dates = [tuple(map(int, release[:3])) for release in RELEASES], [release[3] for release in RELEASES]
    assert numbers == sorted(set(numbers), reverse=True)
    assert dates == sorted(dates, reverse=True)
    headings = re.findall(r"(?m)^#+ .*$", (ROOT / "CHANGELOG.md").read_text())
    if headings[1] == "## Unreleased":
        del headings[1]
    assert len(headings) == 1 + len(RELEASES)


def test_the_citation_is_of_the_newest_release() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == VERSION
    assert str(citation["date-released"]) == RELEASES[0][3]
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()


def test_the_hooks_run_what_make_lint_runs_from_the_same_place() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    lint = re.search(r"(?m)^lint:.*\n\t(.*)$", (ROOT / "Makefile").read_text())
    assert lint is not None
    commands = [part.replace("$(RUN)/", "").replace(" .", "").replace(" --check", "") for part in lint[1].split(" && ")]
    hooks = [hook["entry"].removeprefix(".venv/bin/").replace(" --fix", "") for hook in repository["hooks"]]
    assert hooks == commands


def test_make_test_lints_first() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"(?m)^test: lint\b", makefile)
    assert re.search(r"(?m)^test-all: lint\b", makefile)
    assert "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("template", [t for t in TEMPLATES if t.name != "config.yml"], ids=lambda path: path.name)
def test_templates_have_the_form_that_github_reads(template) -> None:
    content = yaml.safe_load(template.read_text())
    assert {"name", "description", "body"} <= content.keys()
    identifiers = [field["id"] for field in content["body"]]
    assert len(identifiers) == len(set(identifiers))
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in content["body"])


def test_a_report_asks_for_files_that_a_run_has() -> None:
    text = (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text()
    assert {FILE, record.FILE, "config.toml", "metrics.jsonl", "fold_report.json"} == set(
        re.findall(r"`(\w+\.(?:txt|json|jsonl|toml))`", text)
    )
    assert "python train.py --version" in text


def test_every_configuration_says_where_its_schema_is() -> None:
    """For editors: taplo and what is built of it read this line."""
    files = sorted((ROOT / "configs").rglob("*.toml"))
    assert len(files) > 15
    for file in files:
        first = file.read_text(encoding="utf-8").split("\n", 1)[0]
        assert first.startswith("#:schema "), file
        assert (file.parent / first.removeprefix("#:schema ")).resolve() == ROOT / "configs" / "schema.json", file


def test_the_decision_log_is_in_order() -> None:
    """A heading for each release, oldest first, and for what comes next; entries have dates, none after the release."""
    text = (ROOT / "docs/decisions.md").read_text()
    sections = re.split(r"(?m)^## ", text)[2:]
    releases = [(".".join(r[:3]), r[3]) for r in reversed(RELEASES)] + [("Unreleased", "9999-12-31")]
    assert [section.split("\n")[0] for section in sections] == [name for name, _ in releases][: len(sections)]
    assert len(sections) >= len(RELEASES)
    for section, (_, released) in zip(sections, releases, strict=False):
        rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
        dates = [row[0].removeprefix("| ") for row in rows]
        assert rows
        assert dates == sorted(dates)
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
        assert dates[-1] <= released
        assert all(len(row) == 4 for row in rows)
