"""Weights that were trained in full beside an adapter, found among an adapter's tensors.

Takes the tensors that are no adapter's, the configuration and our own facts; gives them by their names in the model, or
refuses what nobody announced. Three things announce one: PEFT's `modules_to_save` (a module, or a module's last name, or
one that contains others), PEFT's `bias` (trained biases), and "full" and "tied" of our own facts, which name tensors.
PEFT's `save_embedding_layers` announces nothing: it puts embedding and head beside the adapter where either is adapted, or
the vocabulary was resized, and loads them again.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.adapter.full import holds_numbers
from pipeline.artifacts.adapter.write import CONFIG_FILE, PEFT_PREFIX
from pipeline.console import UserError
from pipeline.names import HEAD_MODULE, is_embedding, is_head


def read_full(
    folder: Path, rest: dict[str, torch.Tensor], config: dict[str, Any], own: dict[str, Any], expected: str
) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """{name in the model: tensor}, and those of the names that nothing announces, or that lie beneath an adapter of the same
    module: of embedding or head.

    `expected`: in words, what a tensor would have to be that is none of these.

    Raises UserError for a tensor that is not announced, one that is announced and missing, one that is there twice, and
    NaN or infinite values.
    """
    named = {_plain(name): tensor for name, tensor in rest.items()}
    if len(named) < len(rest):
        twice = next(name for name in named if sum(_plain(stored) == name for stored in rest) > 1)
        raise UserError(f"{folder}: {twice} is in the file more than once. One of them would be lost: leave one.")
    modules = config.get("modules_to_save") or []
    ties = [HEAD_MODULE] if config.get("ensure_weight_tying") else []  # PEFT saves a tied head and does not list it
    announced = {*own.get("full", ()), *own.get("tied", ())}
    biases = str(config.get("bias") or "none") != "none"
    unannounced = [
        name
        for name in named
        if not (name in announced if own else any(_within(name, module) for module in [*modules, *ties]))
        and not (biases and name.endswith(".bias"))
    ]
    unknown = [name for name in unannounced if own or not _is_table(name)]
    if unknown:
        raise UserError(f"{folder}: {len(unknown)} tensors are no {expected}: {unknown[0]} first.")
    missing = sorted(announced - named.keys()) if own else [m for m in modules if not any(_within(n, m) for n in named)]
    if missing:
        raise UserError(
            f"{folder}: {missing[0]} was trained in full by its {CONFIG_FILE}, and is not in the file. The adapter is "
            "incomplete."
        )
    for name, tensor in named.items():
        if not holds_numbers(tensor):
            raise UserError(f"{folder}: {name} holds NaN or infinite values, or integers. Its training diverged.")
    beneath = {_plain(name) for name in rest if ".base_layer." in name}
    return named, frozenset([*unannounced, *(n for n in beneath if _is_table(n))])


def _plain(name: str) -> str:
    """A tensor's name in the model."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def _within(name: str, module: str) -> bool:
    """Whether PEFT takes a tensor's module, or one that contains it, for `module`: where its name ends so ('norm' is
    'model.norm', and 'input_layernorm' too)."""
    parts = name.split(".")
    return any(".".join(parts[:n]).endswith(module) for n in range(1, len(parts)))


def _is_table(name: str) -> bool:
    """Whether a tensor is of the embedding or of the head."""
    module = name.rpartition(".")[0]
    return is_embedding(module) or is_head(module)
