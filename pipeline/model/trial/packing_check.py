"""Does a model keep documents that share a row apart? Asked before a weight is read, where rows are to be packed.

Takes the model's config; runs a tiny copy on two documents whose positions each begin at 0. What the second one gives must
not change with the first one's tokens, and be what it gives alone. Gives what the model needs for it beside positions
(model/structure/apart.py). UserError where nothing helps: a recurrence (mamba, qwen3_next and other hybrids), or a bias by
distance (bloom, mpt).

Flash attention runs on no CPU. What is tried in its place is that documents' boundaries come to every attention, in a
micro-batch of two rows: by an attention that goes by them and by nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.model.stage import run_base
from pipeline.model.structure.apart import WAYS, Way
from pipeline.model.structure.parts import head_of_model
from pipeline.model.tiny_copy import TOKENS, VOCABULARY, NoCopyError, tiny_copy, token_ids
from pipeline.model.unsupported import named

TOLERANCE = 1e-5  # of the largest logit; families that keep documents apart differ by rounding, the others by per cents
FIRST = 5  # tokens of the first document; the second has the rest, more than a shrunken window
STAND_IN = "by_boundaries"  # its name among transformers' attentions


@torch.no_grad()
def check(config: PretrainedConfig, attention: str | None = None, *, cut_in: int | None = None) -> Way:
    """What the model needs to keep documents in a row apart, with this implementation of attention (None: its default).

    `cut_in`: tokens of the rows that are cut out of a stream. UserError if documents would see each other, or if that cannot
    be tried out.
    """
    kind = config.model_type
    if (threshold := switches_at(config)) is not None and cut_in is not None and cut_in > threshold:
        raise UserError(
            f"model_type '{kind}': its rotary embedding changes with the longest position of a micro-batch (from "
            f"{threshold:,} on), so a document would depend on what it is packed with: set packing = 'best_fit' (for books leave "
            f"document_mask out), or lower sequence_len to {threshold:,}"
        )
    try:
        whole, _ = tiny_copy(config)
    except NoCopyError as error:
        raise UserError(
            f"model_type '{kind}': no tiny copy of it can be run to see whether it keeps packed documents apart ({error}); set "
            "packing = 'none'"
        ) from error
    flash = "flash" in (attention or "")
    leaks: list[float] = []
    ways: tuple[Way, ...] = ("boundaries",) if flash else ("positions", "masks")
    for way in ways:
        try:
            with named(kind, "packing two documents into a row, tried on a tiny copy,"):
                leaks.append(_leak_by_boundaries(whole) if flash else _leak(whole, way))
        except UserError:
            if not leaks:  # without help it has to run
                raise
            continue
        if leaks[-1] <= TOLERANCE:
            return way
    raise UserError(
        f"model_type '{kind}' does not keep documents apart that share a row: on a tiny copy one changes the other's logits "
        f"by {min(leaks):.2g} of the largest; set packing = 'none' (for books leave document_mask out)"
    )


def _leak(whole: PreTrainedModel, way: Way) -> float:
    """By how much of the largest logit the second of two documents is off beside the first, in either of two rows."""
    ids = token_ids()
    others = torch.cat([(ids[:, :FIRST] + 17) % VOCABULARY, ids[:, FIRST:]], dim=1)
    positions = torch.cat([torch.arange(FIRST), torch.arange(TOKENS - FIRST)])[None]

    def logits(given: Tensor, at: Tensor) -> Tensor:
        normed = run_base(whole, at, input_ids=given, **WAYS[way](whole, at))
        found: Tensor = head_of_model(whole)(normed)
        return found

    packed = logits(torch.cat([ids, others]), positions.expand(2, -1))[:, FIRST:]
    alone = logits(ids[:, FIRST:], positions[:, FIRST:])
    return float((packed - alone).abs().max() / alone.abs().max())


def _leak_by_boundaries(whole: PreTrainedModel) -> float:
    """The same with an attention that knows documents by their boundaries alone."""
    AttentionInterface.register(STAND_IN, attention_by_boundaries)
    AttentionMaskInterface.register(STAND_IN, lambda *_, **__: None)  # as for flash attention: none
    with _attention(whole, STAND_IN):
        return _leak(whole, "boundaries")


@contextmanager
def _attention(whole: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another attention for a while."""
    before = {module: module.config._attn_implementation for module in whole.modules() if hasattr(module, "config")}
    try:
        for module in before:
            module.config._attn_implementation = name
        yield
    finally:
        for module, own in before.items():
            module.config._attn_implementation = own


def attention_by_boundaries(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention [B, T, H, D] within documents that begin at `cu_seq_lens_q` in the rows put one behind the other."""
    rows, _, tokens, _ = query.shape
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
    if cu_seq_lens_q is not None:
        places = torch.arange(rows * tokens, device=query.device)
        document = torch.bucketize(places, cu_seq_lens_q.long(), right=True).view(rows, 1, tokens)
        seen = seen & (document[..., :, None] == document[..., None, :])
    gives = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
    return gives.transpose(1, 2).contiguous(), None


def switches_at(config: PretrainedConfig) -> int | None:
    """The length from which a rotary embedding has other frequencies; None where it is the same for all lengths."""
    rope: Any = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            known = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(known or getattr(config, "max_position_embeddings", None) or 0) or None
    return None
