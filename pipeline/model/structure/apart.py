"""What a model needs beside positions to keep documents apart that share a row: its masks, or flash attention's boundaries.

From positions that begin again transformers makes masks by itself in most models. Some make theirs without looking at
positions, and take ready ones; flash attention knows no masks, and looks at positions only in micro-batches of one row, in
every layer anew. Which of these a model needs, packing_check.py finds out.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from pipeline.model.structure.parts import text_config

Way = Literal["positions", "masks", "boundaries"]


def nothing(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """Positions are enough."""
    return {}


def masks(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """`attention_mask`: the model's masks by kind of layer, made by transformers' functions with the positions [B, T]."""
    shape = torch.empty((*positions_BT.shape, 0), dtype=model.dtype, device=positions_BT.device)
    made = create_masks_for_generate(text_config(model.config), shape, None, None, position_ids=positions_BT)
    return {"attention_mask": made}


def boundaries(model: PreTrainedModel, positions_BT: Tensor) -> dict[str, Any]:
    """Where documents begin in the micro-batch's rows, put one behind the other, int32 [documents + 1]; the longest's length."""
    (queries, keys), (longest, _) = prepare_fa_kwargs_from_position_ids(positions_BT)
    length = int(longest)
    return {"cu_seq_lens_q": queries, "cu_seq_lens_k": keys, "max_length_q": length, "max_length_k": length}


WAYS: dict[Way, Callable[[PreTrainedModel, Tensor], dict[str, Any]]] = {
    "positions": nothing,
    "masks": masks,
    "boundaries": boundaries,
}
