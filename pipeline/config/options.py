"""Which training options go with which adapter.

Takes plain values of a config; gives messages. pipeline/config/schema.py describes the keys themselves.
"""

from collections.abc import Iterator
from typing import Any

# Options that speak of the product s·B·A of each module.
OF_PRODUCTS = ("composite_weight_decay", "scale_weight_norms")
PATTERNS = ("rank_pattern", "alpha_pattern")
OF_ADAPTERS = (*OF_PRODUCTS, *PATTERNS, "init_adapter", "trainable_modules")
WITH_PRODUCTS = ("multiplicative_lora", "lora")
WITH_FAST_PART = (*WITH_PRODUCTS, "moslora")


def conflicts(family: str | None, values: dict[str, Any], starts_from_weight: bool, loraplus: bool) -> Iterator[str]:
    """What is wrong. `family`: adapter_type, or None for full fine-tuning; `values`: all of OF_ADAPTERS.

    `starts_from_weight`: PiSSA or OLoRA, in which s·B·A begins as a part of the weight.
    """
    given = [key for key in OF_ADAPTERS if values[key]]
    if family is None:
        for key in given:
            yield f"{key}: has no meaning with full_fine_tune = true; remove one of them"
        if loraplus:
            yield "optimizer.loraplus_lr_ratio: there is no B to learn faster with full_fine_tune = true; remove one of them"
        return
    for key in given:
        if key in OF_PRODUCTS and family not in WITH_PRODUCTS:
            yield f"{key}: adapter_type = '{family}' has no product s·B·A; it is for {_listed(WITH_PRODUCTS)}"
        elif key in OF_PRODUCTS and starts_from_weight:
            yield f"{key}: with this init_lora_weights s·B·A begins as a part of the weight, and should not be held down"
        elif key in PATTERNS and family not in WITH_FAST_PART:
            yield f"{key}: adapter_type = '{family}' has no rank and alpha by module; it is for {_listed(WITH_FAST_PART)}"
    if values["init_adapter"] and starts_from_weight:
        yield (
            "init_adapter: what such a run saves is a plain LoRA of twice the rank; to go on from it leave "
            "init_lora_weights out, and give twice the lora_rank and the lora_alpha with which s is the same"
        )
    if loraplus and family not in WITH_FAST_PART:
        yield (
            f"optimizer.loraplus_lr_ratio: adapter_type = '{family}' has no B to learn faster; "
            f"it is for {_listed(WITH_FAST_PART)}"
        )


def _listed(families: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in families)
