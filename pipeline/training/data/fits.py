"""Whether the tokenizer's ids fit the model: its embedding's rows. (Positions: generation/positions.py.)

Takes the model without weights, the tokenizer and what the stores report; gives a warning or one UserError. The ids that
occur decide, not how many tokens the tokenizer lists.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.console import UserError, warn
from pipeline.foreign import printable, read_object
from pipeline.formats.base_model import Base
from pipeline.formats.safetensors import pick_rows
from pipeline.model import weights
from pipeline.model.structure.parts import embedding_of_model, head_of_model, parts_of

ROWS_COMPARED = 256  # of the embedding, evenly over all
NEVER_TRAINED = 0.1  # of the median length of these: what training leaves is of one order of magnitude


def embedding_rows(model: PreTrainedModel) -> int:
    """Ids that the model can both read and predict."""
    return min(int(end.weight.shape[0]) for end in (embedding_of_model(model), head_of_model(model)))


def check_tokenizer(tokenizer: Any, folder: str, rows: int) -> None:
    """UserError if BOS or EOS, which every chunk holds, has no trained row; a warning for tokens beyond the rows."""
    where = f"model = '{printable(folder)}'"
    for key in ("bos_token", "eos_token"):
        token, id = getattr(tokenizer, key), getattr(tokenizer, f"{key}_id")
        if id is None:
            continue
        if id >= rows:
            raise UserError(
                f"{where}: the tokenizer's {key} '{printable(token)}' has the id {id:,}, but the model only {rows:,} rows "
                f'in its embedding: name a token with a row as "{key}" in tokenizer_config.json'
            )
        if _added_by_the_library(tokenizer, str(token), Path(folder)):
            raise UserError(
                f"{where}: \"{key}\" in tokenizer_config.json is '{printable(token)}', which the tokenizer's vocabulary "
                f"does not hold; it was given the id {id:,} behind the last token, whose row of the embedding nobody has "
                f"trained: name a token of the vocabulary"
            )
    if len(tokenizer) > rows:
        warn(
            f"{where}: the tokenizer has {len(tokenizer):,} tokens, the model {rows:,} rows in its embedding: text with "
            f"one of the others in it is refused"
        )


def check_ids(name: str, largest_id: int, tokenizer: Any, rows: int) -> None:
    """UserError if the dataset `name`, whose largest id is given, holds one that the model has no row for."""
    if largest_id >= rows:
        token = tokenizer.convert_ids_to_tokens(largest_id)
        raise UserError(
            f"dataset '{name}': its text holds the token '{printable(token)}' with the id {largest_id:,}, but "
            f"the model's embedding has {rows:,} rows (ids 0 to {rows - 1:,}): take such tokens out of the text, or use "
            f"the tokenizer that belongs to the model"
        )


def check_trained(name: str, ids: Sequence[int], tokenizer: Any, model: PreTrainedModel, base: Base) -> None:
    """Warn of special tokens of the dataset `name`, by their ids, whose rows of the base's embedding nobody has trained."""
    stored = weights.source_of(f"{parts_of(model).embedding}.weight", model, base)
    if stored is None or not ids:
        return
    count, width = stored.shape
    ids = [id for id in ids if id < count]
    some = sorted({place * (count - 1) // (ROWS_COMPARED - 1) for place in range(ROWS_COMPARED)})
    sizes = {id: float(row.float().norm()) for id, row in zip(ids, pick_rows(stored, width, ids), strict=True)}
    usual = float(torch.stack([row.float().norm() for row in pick_rows(stored, width, some)]).median())
    if untrained := [id for id, size in sizes.items() if size < NEVER_TRAINED * usual]:
        tokens = ", ".join(f"'{printable(tokenizer.convert_ids_to_tokens(id))}'" for id in untrained)
        warn(
            f"dataset '{name}': {tokens}: the base's embedding of these is far shorter than of other tokens (by the median, 1/"
            f"{1 / NEVER_TRAINED:.0f} or less), so nobody has trained it, and an adapter on the layers does not: set "
            "trainable_modules = ['embed_tokens', 'lm_head'] (as the model calls them)"
        )


def _added_by_the_library(tokenizer: Any, token: str, folder: Path) -> bool:
    """Whether none of the tokenizer's files gives `token` an id, so that transformers made one up for it."""
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).get(token) is not None:
        return False
    written = set[str]()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if (folder / name).is_file():
            content = read_object(folder / name, "the tokenizer's tokens")
            added = content.get("added_tokens") or content.get("added_tokens_decoder") or {}
            entries = added.values() if isinstance(added, dict) else added
            written |= {entry["content"] for entry in entries if isinstance(entry, dict) and "content" in entry}
            written |= set(content) if name == "added_tokens.json" else set()
    return token not in written
