"""The house: who imports whom, how long a function may be, where no Python lies. Read from the source."""

import ast
import sys
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.sources import SOURCES, nodes, path, text, tree

MAX_FUNCTION_LINES, MAX_TRAIN_LINES = 70, 120
MAX_CONFIG_TAKERS = 13  # functions outside pipeline/config/

# The one package in which each may be imported, as path prefixes.
CONFINED = {
    "huggingface_hub": ("pipeline/publishing/", "pipeline/formats/hub.py", "pipeline/data/reading/hub.py"),
    "deepspeed": ("pipeline/training/",),
    "bitsandbytes": ("pipeline/model/quantized_bnb.py", "pipeline/training/optim/inner.py"),
}
# What a part may not import: layers above it, and libraries it must do without.
FORBIDDEN = {
    "pipeline/artifacts/": ("transformers", "deepspeed", "peft", "datasets"),
    "pipeline/formats/": ("transformers", "deepspeed", "peft", "datasets"),
    "merge_lora.py": ("transformers", "deepspeed", "peft", "datasets"),
    "export_lora.py": ("transformers", "deepspeed", "peft", "datasets"),
    "inspect_lora.py": ("transformers", "torch", "deepspeed"),
    "make_adapter.py": ("transformers", "torch", "deepspeed"),
    "generate.py": ("transformers", "torch", "deepspeed"),
    "evaluate_lora.py": ("transformers", "torch", "deepspeed"),
    "pipeline/commands/": ("pipeline.training", "deepspeed", "peft", "datasets"),
    "pipeline/config/": ("transformers", "torch"),
    "pipeline/console.py": ("transformers", "torch", "pipeline"),
    "pipeline/families.py": ("transformers", "torch"),
    "pipeline/peft/types.py": ("transformers", "torch", "peft"),
    "pipeline/data/": ("pipeline.model", "pipeline.training", "pipeline.objectives", "pipeline.artifacts"),
    "pipeline/model/": ("pipeline.training", "pipeline.objectives", "pipeline.data", "pipeline.artifacts"),
    "pipeline/objectives/": ("pipeline.training", "pipeline.data", "pipeline.artifacts"),
    "pipeline/planning/": ("pipeline.training", "pipeline.objectives", "pipeline.data", "pipeline.artifacts"),
    "pipeline/publishing/": ("pipeline.training", "pipeline.model", "transformers", "deepspeed", "peft"),
    "pipeline/inspection/": ("pipeline.training", "deepspeed", "peft"),
    "pipeline/generation/": ("pipeline.training", "pipeline.objectives", "pipeline.config", "deepspeed", "datasets"),
    "pipeline/evaluation/": ("deepspeed", "peft", "datasets"),
    "pipeline/training/": ("pipeline.evaluation",),
    "pipeline/": (
        "train",
        "quickstart",
        "merge_lora",
        "export_lora",
        "make_adapter",
        "inspect_lora",
        "generate",
        "evaluate_lora",
        "compare_runs",
        "tests",
    ),
}
# The one file of such a part that may all the same, inside its functions: the names it gives are transformers' own.
ASKS_TRANSFORMERS = "pipeline/formats/stored_names.py"
# What everything may stand on.
GROUND = (
    "pipeline.console",
    "pipeline.families",
    "pipeline.files",
    "pipeline.foreign",
    "pipeline.names",
    "pipeline.patterns",
    "pipeline.peft.types",
    "pipeline.processes",
    "pipeline.version",
)
# Beside it, inside functions only: it imports PEFT, and with it transformers.
LATE = "pipeline.peft.layers"
# What a part may import of this project, where that is all.
ONLY_OURS = {
    "pipeline/artifacts/": ("pipeline.artifacts", "pipeline.formats", *GROUND, LATE),
    "pipeline/formats/": ("pipeline.formats", *GROUND),
    "pipeline/families.py": ("pipeline.console", "pipeline.peft.types"),
    "pipeline/peft/types.py": (),
    "pipeline/peft/layers.py": ("pipeline.peft", *GROUND),
    "pipeline/files.py": GROUND,
    "pipeline/foreign.py": GROUND,
    "pipeline/patterns.py": GROUND,
    "pipeline/commands/arguments.py": ("pipeline.formats.choices", *GROUND),
    "merge_lora.py": (
        "pipeline.artifacts",
        "pipeline.formats",
        "pipeline.commands",
        "pipeline.publishing.next_steps",
        *GROUND,
    ),
    "export_lora.py": (
        "pipeline.artifacts",
        "pipeline.formats",
        "pipeline.commands",
        "pipeline.publishing.next_steps",
        *GROUND,
    ),
    "inspect_lora.py": ("pipeline.commands", *GROUND),
    "make_adapter.py": ("pipeline.commands", "pipeline.formats.choices", *GROUND),
    "generate.py": ("pipeline.commands", "pipeline.formats.choices", *GROUND),
    "evaluate_lora.py": ("pipeline.commands", *GROUND),
    "compare_runs.py": ("pipeline.commands", "pipeline.publishing.report", *GROUND),
    "pipeline/publishing/next_steps.py": (),
    "kernels/": ("pipeline.kernels",),
}


@cache
def imports(source: Path) -> frozenset[str]:
    """Every module a file imports, inside functions too: `from a.b import c` gives 'a.b' and 'a.b.c'."""
    return frozenset(_imported(source))


def _imported(source: Path) -> Iterator[str]:
    package = path(source).removesuffix(".py").split("/")[:-1]
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_this_test_reads_something() -> None:
    assert len(SOURCES) > 30
    assert "pipeline.kernels.cross_entropy.LogitTransform" in imports(ROOT / "pipeline/model/structure/build.py")
    assert any("deepspeed" in imports(source) for source in SOURCES)


def test_imports_point_one_way() -> None:
    wrong = [problem for source in SOURCES for problem in wrong_imports(path(source), imports(source))]
    assert not wrong, "\n".join(wrong)


def wrong_imports(where: str, found: Collection[str]) -> Iterator[str]:
    """What of `found` a file may not import."""
    for package, homes in CONFINED.items():
        if not where.startswith(homes) and (one := [m for m in found if within(m, package)]):
            yield f"{where} imports {one[0]}; {package} belongs into {homes}"
    for part, packages in FORBIDDEN.items():
        banned = [p for p in packages if not (where == ASKS_TRANSFORMERS and p == "transformers")]
        if where.startswith(part) and (one := [m for m in found if any(within(m, p) for p in banned)]):
            yield f"{where} imports {one[0]}; {part} does without {packages}"
    for part, allowed in ONLY_OURS.items():
        ours = [m for m in found if within(m, "pipeline") and m != "pipeline"]
        if where.startswith(part) and (one := [m for m in ours if not any(within(m, p) for p in allowed)]):
            yield f"{where} imports {one[0]}; {part} imports {allowed} only"


def test_a_wrong_import_is_seen() -> None:
    assert [*wrong_imports("pipeline/data/x.py", ["pipeline.model.stage"])]
    assert [*wrong_imports("pipeline/model/x.py", ["deepspeed"])]
    assert [*wrong_imports("kernels/x.py", ["pipeline.model"])]
    assert not [*wrong_imports("pipeline/training/x.py", ["deepspeed", "pipeline.model.stage"])]


def test_transformers_is_imported_late_where_it_is_asked() -> None:
    top = [
        ast.unparse(node)
        for node in tree(ROOT / ASKS_TRANSFORMERS).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not [line for line in top if "transformers" in line or "accelerate" in line]


def test_pefts_layers_are_imported_late() -> None:
    """By all but what is imported late itself: a fold of our own families needs no PEFT."""
    for source in SOURCES:
        top = [ast.unparse(node) for node in tree(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [line for line in top if LATE in line or ("pipeline.peft import" in line and "layers" in line)], (
            path(source)
        )


def test_kernels_import_torch_triton_and_the_standard_library() -> None:
    for source in (s for s in SOURCES if path(s).startswith("kernels/")):
        others = {
            module for module in imports(source) if not within(module, "pipeline.kernels") and module != "pipeline"
        }
        roots = {module.split(".")[0] for module in others}
        assert roots <= {"torch", "triton"} | set(sys.stdlib_module_names), path(source)


def test_nothing_below_training_sees_the_config_object() -> None:
    """Functions of pipeline.config (such as layer_ranges) may be used there; its classes and the module may not."""
    classes = {"Config", "Optimizer", "Dataset", "EvalDataset", "Section"}
    modules = {f"pipeline.config.{name}" for name in ("loading", "tables", "data_tables")}
    banned = {f"pipeline.config.{name}" for name in classes} | modules
    below = ("pipeline/data/", "pipeline/model/", "pipeline/objectives/", "kernels/")
    for source in (s for s in SOURCES if path(s).startswith(below)):
        assert not imports(source) & banned, path(source)
        whole_module = [
            n
            for n in nodes(source)
            if (isinstance(n, ast.Import) and any(a.name == "pipeline.config" for a in n.names))
            or (isinstance(n, ast.ImportFrom) and n.module == "pipeline" and any(a.name == "config" for a in n.names))
        ]
        assert not whole_module, f"{path(source)}: import the function, not the module"


def test_the_config_ends_at_the_door() -> None:
    """Few functions take it (train.py, --check, --plan, start/resolve.py, run/assemble.trainer); nobody makes up another."""
    takers = []
    for source in SOURCES:
        if path(source).startswith("pipeline/config/"):
            continue
        for node in nodes(source):
            if isinstance(node, ast.FunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if any(a.annotation is not None and ast.unparse(a.annotation) == "Config" for a in arguments):
                    takers.append(f"{path(source)}: {node.name}")
            made_up = isinstance(node, ast.Attribute) and node.attr == "model_copy"
            assert not made_up, f"{path(source)}: only what was read is a Config"
    assert 0 < len(takers) <= MAX_CONFIG_TAKERS, takers


def test_folders_that_shadow_packages_hold_no_package() -> None:
    """`kernels` and `datasets` are Hugging Face's names: an __init__.py here, or under tests/, would replace theirs."""
    for name in ("kernels", "datasets"):
        for folder in (ROOT / name, ROOT / "tests" / name):
            assert not (folder / "__init__.py").exists(), folder
    assert not list((ROOT / "datasets").rglob("*.py")), "datasets/ holds data only"


def test_functions_are_short_enough_to_see() -> None:
    assert len(text(ROOT / "train.py").splitlines()) <= MAX_TRAIN_LINES
    for source in SOURCES:
        for node in nodes(source):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path(source)}: {node.name} has {length} lines"


def test_every_file_says_what_it_is() -> None:
    assert not [path(source) for source in SOURCES if not ast.get_docstring(tree(source))]


MOST_FILES = 12
FOLDERS = sorted({source.parent for source in SOURCES})


@pytest.mark.parametrize("folder", FOLDERS, ids=path)
def test_a_folder_is_seen_at_once(folder: Path) -> None:
    """A folder with more files than that holds several rooms."""
    files = sorted(file.name for file in folder.glob("*.py"))
    assert len(files) <= MOST_FILES, files
