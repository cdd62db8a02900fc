"""The Hugging Face model of a config, without weights: parameters on `meta`, real buffers.

Takes a config; gives the model of the class that the config's checkpoints are saved from. Of a model for text and images
the text half: what reads images or sound is not in it, and the names are those of the whole.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.foreign import printable
from pipeline.formats.stored_names import auto_class
from pipeline.kernels.cross_entropy import LogitTransform
from pipeline.model.structure.parts import find, text_config
from pipeline.model.unsupported import reason

# What configs call the soft cap of the logits.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

LARGE = 1 << 24  # elements of a tensor that is a weight and no table: 64 MiB in fp32


class LargeOnMeta(TorchFunctionMode):
    """Inside, new tensors of LARGE elements and more are on `meta`.

    `init_empty_weights` lets a parameter be made in memory before it moves it there, and all experts of a layer are one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn) and kwargs.get("device") is None:
            sizes = args[0] if args and isinstance(args[0], tuple | list) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build(config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    """The model on `meta`, text half alone, its parts as far as structure tells them (`parts.find`).

    UserError for a config that transformers cannot build a model of, or a structure that stages cannot be cut from.
    """
    try:
        with init_empty_weights(include_buffers=False), LargeOnMeta():
            model = auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except Exception as error:
        if attn_implementation is not None and _builds(config, dtype):
            raise UserError(
                f"attn_implementation = '{attn_implementation}': model_type '{config.model_type}' cannot have it here: "
                f"{printable(str(error).split(' Please ')[0].rstrip('.'))}; install what is missing, take another "
                "(every model has 'eager'), or leave the key out"
            ) from error
        raise UserError(f"model_type '{config.model_type}': transformers cannot build it: {reason(error)}") from error
    parts = find(model)
    if text_config(model.config) is not model.config:
        _keep_text(model, (parts.base, parts.head, parts.embedding))
        parts = find(model)
    model.__dict__["parts"] = parts
    return model


def _builds(config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether transformers builds the model with the attention that every model has."""
    try:
        with init_empty_weights(include_buffers=False), LargeOnMeta():
            auto_class(config).from_config(
                deepcopy(config), dtype=dtype, attn_implementation="eager", trust_remote_code=False
            )
    except Exception:
        return False
    return True


def logit_transform(config: PretrainedConfig) -> LogitTransform:
    """What the model does to its raw logits: Cohere's scale, Granite's division, Gemma's soft cap."""
    config = text_config(config)
    before = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(before=before, cap=next((cap for key in CAPS if (cap := getattr(config, key, None))), None))


def leaves_transform_out(config: PretrainedConfig) -> bool:
    """Whether transformers' model for text and images forgets what the text half does to its logits.

    Cohere's models of vision have logits without the scale that their text half was trained and is served with
    (transformers 5.24). Training is by the text half's own.
    """
    return text_config(config) is not config and config.model_type in ("aya_vision", "cohere2_vision")


def _keep_text(module: nn.Module, wanted: tuple[str, ...], name: str = "") -> None:
    """Take out of `module`, named `name`, whatever is neither in one of the modules `wanted` nor on the way to one."""
    for leaf, child in list(module._modules.items()):
        full = f"{name}.{leaf}".lstrip(".")
        if child is None or any(full == one or full.startswith(f"{one}.") for one in wanted):
            continue
        if any(one.startswith(f"{full}.") for one in wanted):
            _keep_text(child, wanted, full)
        else:
            module._modules[leaf] = None
