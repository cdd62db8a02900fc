"""Which adapter families there are, which keys each takes, and why others are refused.

Takes the value of adapter_type and plain keys; gives messages. pipeline/config/schema.py describes the keys themselves.
"""

import re
from collections.abc import Collection, Iterator
from typing import Any

FAMILIES = ("multiplicative_lora", "control_adapter", "lora", "moslora", "ia3", "oft", "boft", "hra")
# What a family must be given. A key that stands here for others only has no meaning for it.
REQUIRED = {
    "multiplicative_lora": ("lora_rank", "lora_alpha"),
    "lora": ("lora_rank", "lora_alpha"),
    "moslora": ("lora_rank", "lora_alpha"),
    "control_adapter": ("lora_rank",),
    "hra": ("lora_rank",),
    "ia3": (),
    "oft": ("oft_block_size",),
    "boft": ("boft_block_size",),
}
OPTIONAL = {
    "multiplicative_lora": ("lora_dropout",),
    "lora": ("lora_dropout", "use_rslora", "use_dora", "init_lora_weights"),
    "moslora": ("lora_dropout", "use_rslora"),
    "control_adapter": ("lora_dropout",),
    "ia3": ("feedforward_modules",),
    "hra": (),
    "oft": (),
    "boft": (),
}
KEYS = tuple(dict.fromkeys(key for keys in (*REQUIRED.values(), *OPTIONAL.values()) for key in keys))
REFUSED_TYPES = {
    "adalora": "AdaLoRA moves rank between all layers by scores that no single stage has",
    "xlora": "X-LoRA chooses experts by a forward pass of the whole model, which no stage has",
    "vera": "VeRA shares one pair of random matrices among all layers, whichever stage they are on",
    "loha": "LoHa's products need the weight itself, and over quantised weights PEFT's compute garbage; use 'lora'",
    "lokr": "LoKr's products need the weight itself, and over quantised weights PEFT's compute garbage; use 'lora'",
    "fourierft": "FourierFT is not built; use 'lora'",
    "peanut": "PEANuT of depth 0 is 'multiplicative_lora'; with hidden layers it is not linear and could not be folded",
}
OVER_QUANTISED = {
    "hra": "over quantised weights PEFT, for which it is saved, computes garbage without an error",
}


def known_family(value: Any) -> Any:
    """`value`, or ValueError with the reason where it is a family that is refused."""
    if isinstance(value, str) and (reason := REFUSED_TYPES.get(value.lower().replace("-", "").replace("_", ""))):
        raise ValueError(reason)
    return value


STARTS = r"pissa|pissa_niter_\d{1,3}|olora"
STARTS_SCHEMA: Any = {"anyOf": [{"const": True}, {"type": "string", "pattern": f"^({STARTS})$"}]}


def known_start(value: bool | str) -> bool | str:
    """A value of init_lora_weights, or ValueError."""
    if value is not True and not re.fullmatch(STARTS, str(value)):
        raise ValueError("should be true, 'pissa', 'pissa_niter_4' (or another number of iterations) or 'olora'")
    return value


def conflicts(family: str, given: Collection[str], values: dict[str, Any], quantised: bool) -> Iterator[str]:
    """What is wrong with the keys of an adapter. `given`: keys that the user wrote; `values`: all of KEYS."""
    for key in REQUIRED[family]:
        if values[key] is None:
            where = "unless full_fine_tune = true" if key.startswith("lora_") else f"with adapter_type = '{family}'"
            yield f"{key}: required {where}"
    for key in KEYS:
        idle = values[key] in (None, False, 0.0) or (key == "init_lora_weights" and values[key] is True)
        if key in given and not idle and key not in (*REQUIRED[family], *OPTIONAL[family]):
            yield f"{key}: has no meaning with adapter_type = '{family}'; {_instead(family, key)}"
    if values["init_lora_weights"] is not True:
        start = values["init_lora_weights"]
        if values["use_dora"]:
            yield f"init_lora_weights: '{start}' with use_dora would not be saved as it was trained; remove one of them"
        if quantised:
            yield f"init_lora_weights: '{start}' takes its start from the weight, of which 4 or 8 bits leave too little"
    if family == "hra" and (values["lora_rank"] or 0) % 2:
        yield f"lora_rank: {values['lora_rank']} is odd, and reflections start in pairs that cancel; give an even number"
    if quantised and family in OVER_QUANTISED:
        yield f"adapter_type: '{family}': {OVER_QUANTISED[family]}"


def _instead(family: str, key: str) -> str:
    if key == "lora_alpha" and family == "control_adapter":
        return "its scaling is 1, S alone says how strong it is. Remove it"
    families = [name for name in FAMILIES if key in (*REQUIRED[name], *OPTIONAL[name])]
    return "it is for " + ", ".join(f"'{name}'" for name in families) + ". Remove it"
