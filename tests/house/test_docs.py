"""What the documents for those who change the code say is so: paths and names in architecture.md, the walk and README's tree;
the site has every page."""

import re
from pathlib import Path

import yaml

import pipeline
from tests.helpers.builders import ROOT
from tests.helpers.docs import defined_in, spans


def test_the_paths_of_the_architecture_exist() -> None:
    """As they are from the root, or within pipeline/ without its name; `a/b.name` is `name` in a/b.py."""
    for span in spans((ROOT / "docs/architecture.md").read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w.]+(/[\w.]+)+/?", span) and not span.startswith(("output_dir/", "bnb/")):
            assert any(is_there(root / span) for root in (ROOT, ROOT / "pipeline")), span


def is_there(path: Path) -> bool:
    if path.exists() or path.with_name(f"{path.name}.py").exists():
        return True
    module, _, name = path.name.partition(".")
    file = path.with_name(f"{module}.py")
    return file.exists() and name.split(".")[0] in defined_in(file)


def test_the_walk_names_what_is_there() -> None:
    lines = re.findall(r"(?m)^    ([a-z_]+(?:\.\w+)+|[a-z_]+)  +\S", pipeline.__doc__ or "")
    assert len(lines) > 12
    for dotted in lines:
        path = Path(pipeline.__path__[0])
        parts = dotted.split(".")
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        if parts:
            file = path / f"{parts.pop(0)}.py"
            assert file.exists(), dotted
            assert set(parts) <= defined_in(file), dotted


def test_the_tree_of_the_readme_has_every_room() -> None:
    """Every package of pipeline/ by its path, but for those within artifacts/, and every module beside them."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("\n## ")[0]
    named = {word.rstrip(",") for word in re.findall(r"\S+", tree)}
    packages = [path.parent.relative_to(ROOT / "pipeline") for path in (ROOT / "pipeline").rglob("__init__.py")]
    rooms = {f"{path}/" for path in map(str, packages) if path not in (".", "training") and "artifacts/" not in path}
    modules = {path.name for path in [*(ROOT / "pipeline").glob("*.py"), *ROOT.glob("*.py")]}
    assert not (rooms | modules) - named


def test_the_site_has_every_page_once() -> None:
    sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [page for section in sections for entries in section.values() for one in entries for page in one.values()]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
