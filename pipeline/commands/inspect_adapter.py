"""inspect_lora.py behind its command line: reads an adapter, with its base and a text where they are given, and shows it.

Takes the parsed arguments; gives a table on the console and, with --html, a page. Raises UserError before anything is read
where the arguments alone are wrong.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.adapter.adapter import Adapter
from pipeline.artifacts.adapter.read import load_pairs
from pipeline.artifacts.fold.match import pair_kind
from pipeline.console import UserError, log
from pipeline.families import Kind
from pipeline.files import atomic_file, check_file_free
from pipeline.formats.base_model import Base, read_base, warn_of_remarks
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.hub import model_folder
from pipeline.inspection import page, reading, terminal
from pipeline.inspection.passages import Text, read_text


def inspect(asked: argparse.Namespace) -> None:
    """Read and show."""
    _check(asked)
    base_folder = Path(model_folder(asked.input, "--input")) if asked.input else None
    adapter = load_pairs(asked.adapter)
    base, kind = _base_and_kind(adapter, base_folder, asked.kind)
    tokenizer, text = _tokenizer_and_text(base, asked.text, asked.tokens)
    inspection = reading.read(
        adapter,
        kind,
        base=base,
        tokenizer=tokenizer,
        text=text,
        directions=asked.directions,
        device=torch.device(asked.device),
        dtype=_dtype(base) if base else torch.float32,
    )
    log(terminal.describe(inspection, width=shutil.get_terminal_size((terminal.WIDTH, 24)).columns))
    if asked.html:
        with atomic_file(asked.html, replace=asked.force) as temporary:
            temporary.write_text(page.page(inspection), encoding="utf-8")
        log(f"\npage: {asked.html}")


def _check(asked: argparse.Namespace) -> None:
    """What can be known to be wrong from the command line alone, all at once."""
    problems = []
    if not asked.adapter.is_dir():
        problems.append(f"ADAPTER: there is no folder {asked.adapter}")
    if asked.text and not asked.input:
        problems.append("--text needs the base model to run over it: give its folder with --input")
    if asked.text and not asked.text.is_file():
        problems.append(f"--text: there is no file {asked.text}")
    problems += [
        f"--{name} {value}: give 1 or more" for name in ("directions", "tokens") if (value := getattr(asked, name)) < 1
    ]
    try:
        torch.empty(0, device=asked.device)
    except (RuntimeError, AssertionError) as error:
        problems.append(f"--device {asked.device}: {str(error).splitlines()[0]}")
    if problems:
        raise UserError("\n       ".join(problems))
    if asked.html:
        check_file_free(asked.html, replace=asked.force)


def _base_and_kind(adapter: Adapter, folder: Path | None, asked: Kind | None) -> tuple[Base | None, Kind]:
    """The base, where one is given, matched with the adapter; and what kind the adapter is."""
    if folder is None:
        return None, reading.kind_without_base(adapter, asked)
    base = read_base(folder)
    warn_of_remarks(base)
    return base, pair_kind(base, adapter, kind=asked, kind_is_meant=True)


def _tokenizer_and_text(base: Base | None, file: Path | None, limit: int) -> tuple[Any, Text | None]:
    """The base's tokenizer and the text it cuts, where they are wanted. transformers is imported only then."""
    if base is None:
        return None, None
    from pipeline.data.tokenizer import load as load_tokenizer
    from pipeline.model.stage import read_model_config

    tokenizer = load_tokenizer(str(base.folder))
    if file is None:
        return tokenizer, None
    rows = read_model_config(str(base.folder)).vocab_size
    return tokenizer, read_text(file, tokenizer, limit=limit, embedding_rows=rows)


def _dtype(base: Base) -> torch.dtype:
    """The dtype that most of the base's weights are stored in, in which it runs."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in base.tensors.values():
        if tensor.dtype in sizes:
            sizes[tensor.dtype] += tensor.n_bytes
    return FLOATS[max(sizes, key=lambda name: sizes[name])]
