"""Does a model keep documents that share a row apart? Asked before a weight is read, where rows are to be packed.

Takes the model's config; runs a tiny copy on two documents whose positions each begin at 0. What the second one gives must
not change with the first one's tokens, and be what it gives alone. UserError where not: a mask built without positions
(gpt_oss), a recurrence (mamba, qwen3_next and other hybrids), or a bias by distance (bloom, mpt).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pipeline.console import UserError
from pipeline.model.tiny_copy import TOKENS, VOCABULARY, NoCopyError, tiny_copy, token_ids
from pipeline.model.unsupported import named

TOLERANCE = 1e-5  # of the largest logit; families that keep documents apart differ by rounding, the others by per cents
FIRST = 5  # tokens of the first document; the second has the rest, more than a shrunken window


@torch.no_grad()
def check(config: PretrainedConfig, sequence_len: int) -> None:
    """UserError if documents in a row of `sequence_len` tokens would see each other, or if that cannot be tried out."""
    kind = config.model_type
    if (threshold := _switches_at(config)) is not None and sequence_len > threshold:
        raise UserError(
            f"model_type '{kind}': its rotary embedding changes with the longest position of a micro-batch (from "
            f"{threshold:,} on), so a document would depend on what it is packed with: set packing = 'none', or lower "
            f"sequence_len to {threshold:,}"
        )
    try:
        whole, _ = tiny_copy(config)
    except NoCopyError as error:
        raise UserError(
            f"model_type '{kind}': no tiny copy of it can be run to see whether it keeps packed documents apart ({error}); set "
            "packing = 'none'"
        ) from error
    ids = token_ids()
    others = torch.cat([(ids[:, :FIRST] + 17) % VOCABULARY, ids[:, FIRST:]], dim=1)
    positions = torch.cat([torch.arange(FIRST), torch.arange(TOKENS - FIRST)])[None]

    def logits(given: Tensor, at: Tensor) -> Tensor:
        found: Tensor = whole(input_ids=given, position_ids=at, use_cache=False).logits
        return found

    with named(kind, "packing two documents into a row, tried on a tiny copy,"):
        packed = logits(ids, positions)[:, FIRST:]
        leak = packed - logits(others, positions)[:, FIRST:]
        off = packed - logits(ids[:, FIRST:], positions[:, FIRST:])
    largest = max(float(leak.abs().max()), float(off.abs().max())) / float(packed.abs().max())
    if not largest <= TOLERANCE:
        raise UserError(
            f"model_type '{kind}' does not keep documents apart that share a row: on a tiny copy one changes the other's logits "
            f"by {largest:.2g} of the largest; set packing = 'none'"
        )


def _switches_at(config: PretrainedConfig) -> int | None:
    """The length from which a rotary embedding has other frequencies; None where it is the same for all lengths."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            known = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(known or getattr(config, "max_position_embeddings", None) or 0)
    return None
