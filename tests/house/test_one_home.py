"""The house: what has one home is written nowhere else: numbers of layers, the head, dtypes, the disk. Read from the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "pipeline").rglob("*.py")])

# A layer's number cut out of a name: a pattern of digits between dots, or the part after a prefix.
CUT_OUT = (r"\\\.\(\\d\+\)", r"int\([^\n]*\.split\(\"\.\"\)", r"\.isdecimal\(\)")
LAYER_NUMBERS = {
    "pipeline/names.py": "the one parser",
    "pipeline/artifacts/adapter/directions.py": "defines the names '3', 'layers.3' and 'model.layers.3' of a file of directions",
    "pipeline/training/engine/engine.py": "DeepSpeed's version",
}
HEAD_NAMES = re.compile(r"lm_head(\.weight)?|embed_tokens(\.weight)?")
OF_HEAD = {"pipeline/names.py": "the one pair of constants"}

DTYPE = re.compile(r"(torch\.)?(bfloat16|float16|float32|BF16|F16|F32)")
DTYPE_TABLES = {
    "pipeline/formats/dtypes.py": "the one table",
    "pipeline/artifacts/export/gguf.py": "GGUF's types, and numpy's",
    "pipeline/config/peers.py": "what other trainers' options are called here",
}


def path(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def texts(source: Path) -> Iterator[str]:
    """The string constants of a file, parts of f-strings too, without docstrings."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.mark.parametrize("source", SOURCES, ids=path)
def test_the_number_of_a_layer_is_parsed_in_one_place(source: Path) -> None:
    if path(source) not in LAYER_NUMBERS:
        found = [
            line for line in source.read_text(encoding="utf-8").splitlines() if any(re.search(p, line) for p in CUT_OUT)
        ]
        assert not found, "pipeline.names has layer_of, layers_of, within_layer"


@pytest.mark.parametrize("source", SOURCES, ids=path)
def test_head_and_embedding_are_named_in_one_place(source: Path) -> None:
    if path(source) not in OF_HEAD:
        assert not [text for text in texts(source) if HEAD_NAMES.fullmatch(text.strip("."))], (
            "pipeline.names has HEAD, EMBEDDING"
        )


@pytest.mark.parametrize("source", SOURCES, ids=path)
def test_there_is_one_table_of_dtypes(source: Path) -> None:
    tables = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Dict)]
    keys = [[ast.unparse(key).strip("'") for key in table.keys if key is not None] for table in tables]
    if path(source) not in DTYPE_TABLES:
        assert not [names for names in keys if any(DTYPE.fullmatch(name) for name in names)], (
            "use pipeline.formats.dtypes"
        )


@pytest.mark.parametrize("source", SOURCES, ids=path)
def test_there_is_one_writer(source: Path) -> None:
    """What is put on the disk, or gets its name, goes through pipeline/files.py."""
    names = {"os.fsync", "os.rename", "os.replace"}
    nodes = [
        node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    ]
    if path(source) != "pipeline/files.py":
        assert not [n for n in nodes if ast.unparse(n) in names or n.attr == "rename"], "use pipeline.files"


def test_the_exceptions_are_there() -> None:
    assert all((ROOT / file).is_file() for file in (*LAYER_NUMBERS, *OF_HEAD, *DTYPE_TABLES))
