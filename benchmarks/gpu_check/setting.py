"""What a check is given, what it gives, and what several of them need: sizes, a model's folder, deterministic operations."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.shapes import COMMAND_R, TINY, Shape

GIB = 2**30
# Layers of Command-R's own size with their head, logits and fp64 copies take some 50 GiB.
LARGE_CARD_BYTES = 60 * GIB
MEDIUM = COMMAND_R._replace(hidden=2048, feed_forward=5632, heads=16, layers=8, vocabulary=32000, tokens=2048)
SMALL = COMMAND_R._replace(hidden=1024, feed_forward=2816, heads=8, layers=4, vocabulary=32000, tokens=1024)
# cuBLAS sums in the same order each time only with workspaces of a fixed size.
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Setting(NamedTuple):
    """`small`: compared to the bit or with an oracle. `run`: trained by train.py. `large`: whose kernels and time are measured.

    `speed_counts`: whether times and memory are judged; those of a tiny model on the CPU mean nothing.
    """

    device: torch.device
    folder: Path
    small: Shape
    run: Shape
    large: Shape
    speed_counts: bool


class Outcome(NamedTuple):
    """What a check found. `figures`: by name, as JSON takes them. `tolerance`: with where it comes from."""

    passed: bool
    compared: str
    tolerance: str
    figures: dict[str, Any]


def setting(device: str, tiny: bool, folder: Path) -> Setting:
    """The sizes for `device` ('cuda' or 'cpu'): tiny ones, or what its memory has room for."""
    if tiny:
        return Setting(torch.device(device), folder, TINY, TINY, TINY, speed_counts=False)
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    large = COMMAND_R._replace(layers=4, tokens=4096) if memory >= LARGE_CARD_BYTES else MEDIUM
    return Setting(torch.device(device), folder, SMALL, MEDIUM, large, speed_counts=device == "cuda")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, operations that could sum in any order (attention's backward on a GPU) take one, or raise RuntimeError."""
    was, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    use_deterministic_operations()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def use_deterministic_operations() -> None:
    """For the rest of this process; before anything is multiplied on a GPU."""
    os.environ.update(CUBLAS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # passes over memory that the product does not make


def base_folder(given: Setting, shape: Shape) -> Path:
    """The folder of a model with random weights and of a tokenizer of bytes; made by the first check that asks."""
    folder = given.folder / f"base_{shape.hidden}x{shape.layers}"
    if not (folder / "tokenizer.json").exists():
        from benchmarks import variants

        variants.model(shape, given.device).save_pretrained(folder)
        _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    """A token for each byte, after PAD, BOS and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<PAD>", "<BOS>", "<EOS>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>")
    fast.save_pretrained(folder)
