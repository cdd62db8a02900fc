"""The model without its weights, made as often as it is needed: parameters on `meta`, layers that will be quantised marked.

A `Stage` changes the model that it is given, so each is given one of its own.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.model import quantized
from pipeline.model.stage import empty_model


@dataclass(frozen=True)
class MetaModel:
    """What `make` makes: of which config (never changed), in which dtype, quantised how."""

    config: PretrainedConfig
    dtype: torch.dtype
    attn_implementation: str | None = None
    scheme: quantized.Scheme | None = None

    def make(self) -> PreTrainedModel:
        """A new model, whole and the caller's own, as `empty_model` makes it. The random generators stay as they are.

        UserError for a structure that stages cannot be cut from, or that `scheme` does not fit.
        """
        with torch.random.fork_rng(devices=[]):
            model = empty_model(deepcopy(self.config), self.dtype, self.attn_implementation)
        if self.scheme:
            quantized.put_placeholders(model, self.scheme)
        return model

    @cached_property
    def shared(self) -> PreTrainedModel:
        """One model for all who only look at its structure: never cut it into a stage, and put nothing into it."""
        return self.make()
