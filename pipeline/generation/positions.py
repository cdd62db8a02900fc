"""How many positions a model can tell apart, by its config and its tables: asked before rows or prompts are sent through it.

Takes the model without weights and a length in tokens; gives a warning, or a UserError where it has no such position.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError, warn


def check(what: str, length: int, model: PreTrainedModel, *, lower: str) -> None:
    """Warn of a `length` beyond the positions the model was made for; UserError where it has no others.

    `what`: what is so long, for the message: 'datasets.0.sequence_len = 16,384'. `lower`: the key that mends it.
    """
    known = positions(model.config)
    if known is None or length <= known:
        return
    said = f"{what} is more than the model's max_position_embeddings = {known:,}"
    if name := _learned_positions(model, length):
        raise UserError(f"{said}, and it has a learned vector for each of these only ({name}): lower {lower}")
    warn(f"{said}: it has not learned to read so far back, and may read worse even where it could; lower {lower}")


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


def _learned_positions(model: PreTrainedModel, length: int) -> str | None:
    """The name of a table with a vector for each position, and none for the last of `length`."""
    tokens = model.get_input_embeddings()
    return next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding)
            and module is not tokens
            and module.num_embeddings < length
            and any(word in name.rsplit(".", 1)[-1] for word in ("wpe", "position", "pos_emb"))
        ),
        None,
    )
