"""The house: what has one home is written nowhere else: numbers of layers, the head, dtypes, the disk. Read from the source."""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.sources import SOURCES, nodes, path, text

PACKAGE = [source for source in SOURCES if not path(source).startswith("kernels/")]

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


def texts(source: Path) -> Iterator[str]:
    """The string constants of a file, parts of f-strings too, without docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in nodes(source)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def others(homes: Collection[str]) -> Iterator[Path]:
    """All files but those."""
    return (source for source in PACKAGE if path(source) not in homes)


def test_the_number_of_a_layer_is_parsed_in_one_place() -> None:
    cut_out = re.compile("|".join(CUT_OUT))
    found = [
        (path(source), line)
        for source in others(LAYER_NUMBERS)
        for line in text(source).splitlines()
        if cut_out.search(line)
    ]
    assert not found, "pipeline.names has layer_of, layers_of, within_layer"


def test_head_and_embedding_are_named_in_one_place() -> None:
    found = [(path(s), found) for s in others(OF_HEAD) for found in texts(s) if HEAD_NAMES.fullmatch(found.strip("."))]
    assert not found, "pipeline.names has HEAD, EMBEDDING"


def test_there_is_one_table_of_dtypes() -> None:
    found = []
    for source in others(DTYPE_TABLES):
        for table in (node for node in nodes(source) if isinstance(node, ast.Dict)):
            keys = [ast.unparse(key).strip("'") for key in table.keys if key is not None]
            found += [(path(source), key) for key in keys if DTYPE.fullmatch(key)]
    assert not found, "use pipeline.formats.dtypes"


def test_there_is_one_writer() -> None:
    """What is put on the disk, or gets its name, goes through pipeline/files.py."""
    names = {"os.fsync", "os.rename", "os.replace"}
    found = [
        (path(source), node.lineno)
        for source in others({"pipeline/files.py"})
        for node in nodes(source)
        if isinstance(node, ast.Attribute) and (node.attr == "rename" or ast.unparse(node) in names)
    ]
    assert not found, "use pipeline.files"


def test_the_exceptions_are_there() -> None:
    assert all((ROOT / file).is_file() for file in (*LAYER_NUMBERS, *OF_HEAD, *DTYPE_TABLES))
