"""The model's config after a fold: its dtype, the factor of its logits, and whether head and embedding are one.

Takes the config as JSON has it and what the fold does; gives the new one, or None where it stays as it is.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

from pipeline.artifacts.fold.match import Part
from pipeline.console import UserError
from pipeline.formats.base_model import untie

# Where a family keeps the factor of its logits, and whether it multiplies (1) or divides (-1) them.
LOGIT_KEYS = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "cohere2_moe": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "granitemoe": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
}


def logit_factor(parts: Sequence[Part], unmerge: bool) -> float:
    """The product of the factors by which the trainings multiplied the logits; its inverse where they are undone."""
    factor = 1.0
    for part in parts:
        factor *= part.adapter.train_logit_scale
    return 1 / factor if unmerge else factor


def new_config(config: dict[str, Any], dtype: str, logit_factor: float, untied: bool = False) -> dict[str, Any] | None:
    """The model's config after the fold, or None where it stays as it is.

    A changed dtype is written wherever the config or one of its parts names one; `logit_factor` multiplies the logits;
    `untied`: head and embedding are no longer one.
    Raises UserError where the family has no key for such a factor.
    """
    changed = copy.deepcopy(config)
    if untied:
        untie(changed)
    if dtype != "keep" and not _set_dtype(changed, dtype):
        changed["torch_dtype"] = dtype  # the older name of the key: old and new readers know it
    if logit_factor != 1.0:
        key, exponent = LOGIT_KEYS.get(config.get("model_type", ""), ("", 0))
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
            raise UserError(
                f"--keep-logit-scale: a {config.get('model_type')!r} config has no key that scales the logits, so the "
                f"factor {logit_factor:g} of the training cannot be kept in it. Fold without the flag: it is dropped."
            )
        changed[key] = value * logit_factor**exponent
    return changed if changed != config else None


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Replace float dtypes in `config` and its sub-configs; whether the top level named one."""
    found = False
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key], found = dtype, True
        elif isinstance(value, dict):
            _set_dtype(value, dtype)
    return found
