"""Whether the tokenizer's ids and the chunks' length fit the model: its embedding's rows, the positions it knows.

Takes the model without weights, the tokenizer and what the stores report; gives a warning or one UserError. The ids that
occur decide, not how many tokens the tokenizer lists.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError, warn
from pipeline.foreign import printable, read_object


def embedding_rows(model: PreTrainedModel) -> int:
    """Ids that the model can both read and predict."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(end.weight.shape[0]) for end in ends if end is not None)  # type: ignore[arg-type, union-attr, index]


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


def check_length(what: str, tokens: int, key: str, model: PreTrainedModel) -> None:
    """Warn of rows longer than the positions the model was made for; UserError where it has no others.

    `what` has `tokens`; `key` is the config's, to be lowered.
    """
    known = positions(model.config)
    if known is None or tokens <= known:
        return
    said = f"{what} is more than the model's max_position_embeddings = {known:,}"
    if name := _learned_positions(model, tokens):
        raise UserError(f"{said}, and it has a learned vector for each of these only ({name}): lower {key}")
    warn(f"{said}: it has not learned to read so far back, and may read worse even where it could; lower {key} to that")


def positions(config: PretrainedConfig) -> int | None:
    """Positions the model was made for, with RoPE stretched as its config says; None if the config does not say."""
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):  # of all layers, or of each type of layer
        if isinstance(kind, dict) and kind.get("factor") and kind.get("original_max_position_embeddings"):
            known = max(known, int(kind["factor"] * kind["original_max_position_embeddings"]))
    return known


def _learned_positions(model: PreTrainedModel, sequence_len: int) -> str | None:
    """The name of a table with a vector for each position, and none for the last of `sequence_len`."""
    tokens = model.get_input_embeddings()
    return next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and module is not tokens
            and module.num_embeddings < sequence_len
            and any(word in name.rsplit(".", 1)[-1] for word in ("wpe", "position", "pos_emb"))
        ),
        None,
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
