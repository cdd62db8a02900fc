"""Rules between the keys of a configuration: what a family takes, which options go with it, what may follow a training.

Takes plain values; gives messages, each with its key first. The keys themselves are in pipeline/config/schema.py, what a family
is in pipeline/families.py. What a fold or an export of a family allows is for these to say (publishing/after_training.py asks
at the start of a run).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from pipeline.families import CONFIGURED
from pipeline.peft import types as peft_types

# Every key that has a meaning for some families only.
FAMILY_KEYS = tuple(dict.fromkeys(key for row in CONFIGURED.values() for key in (*row.required, *row.optional)))
# Options that speak of the product s·B·A of each module, and all that full fine-tuning has no use for.
OF_PRODUCTS = ("composite_weight_decay", "scale_weight_norms")
OF_ADAPTERS = (*OF_PRODUCTS, "rank_pattern", "alpha_pattern", "init_adapter", "trainable_modules")
# What a family lacks that has no use for a key, where that says more than that it has none.
LACKING = dict.fromkeys(OF_PRODUCTS, "product s·B·A") | dict.fromkeys(
    ("rank_pattern", "alpha_pattern"), "rank and alpha by module"
)

# What needs something to evaluate; the last of them goes with the one before it.
OF_EVALUATION = (
    "eval_steps",
    "eval_before_first_step",
    "eval_after_last_step",
    "load_best_at_end",
    "early_stopping_patience",
    "early_stopping_min_delta",
)

REFUSED_TYPES = {
    "peanut": "PEANuT of depth 0 is 'multiplicative_lora'; with hidden layers it is 'peft' with [peft] type = 'PEANUT'",
}
STARTS = r"pissa|pissa_niter_\d{1,3}|olora"
STARTS_SCHEMA: Any = {"anyOf": [{"const": True}, {"type": "string", "pattern": f"^({STARTS})$"}]}

Part = Literal["merge", "export:peft", "export:gguf", "card", "push"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order in which they are done
PARTS_OF_ADAPTERS: tuple[Part, ...] = ("merge", "export:peft", "export:gguf")
HUB_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
LONGEST_HUB_ID = 96


def known_family(value: Any) -> Any:
    """`value`, or ValueError with the reason where it is a family that is refused."""
    if not isinstance(value, str):
        return value
    name = value.lower().replace("-", "").replace("_", "")
    if reason := REFUSED_TYPES.get(name):
        raise ValueError(reason)
    if name not in CONFIGURED:
        types = {one.replace("_", "").lower(): one for one in (*peft_types.LOCAL, *peft_types.REFUSED)}
        if one := types.get(name):
            peft_types.known(one)  # raises for a type that does not train
            raise ValueError(f"a type of PEFT's own: set adapter_type = '{peft_types.PEFT}' and [peft] type = '{one}'")
    return value


def known_start(value: bool | str) -> bool | str:
    """A value of init_lora_weights, or ValueError."""
    if value is not True and not re.fullmatch(STARTS, str(value)):
        raise ValueError("should be true, 'pissa', 'pissa_niter_4' (or another number of iterations) or 'olora'")
    return value


def hub_id(value: str) -> str:
    """`value`, or ValueError where the Hub would not take it as a repository's id."""
    strange = not re.fullmatch(f"{HUB_NAME}/{HUB_NAME}", value) or len(value) > LONGEST_HUB_ID
    if strange or "--" in value or ".." in value or value.endswith(".git"):
        raise ValueError("not a repository's id on the Hub, which is OWNER/NAME of letters, digits, '-', '_' and '.'")
    return value


def family_conflicts(
    family: str, given: Collection[str], values: Mapping[str, Any], *, quantised: bool, loraplus: bool
) -> Iterator[str]:
    """What is wrong with the keys of an adapter. `given`: keys that the user wrote; `values`: FAMILY_KEYS, OF_ADAPTERS."""
    row = CONFIGURED[family]
    for key in row.required:
        if values[key] is None:
            where = "unless full_fine_tune = true" if key.startswith("lora_") else f"with adapter_type = '{family}'"
            yield f"{key}: required {where}"
    for key in FAMILY_KEYS:
        idle = not values[key] or (key == "init_lora_weights" and values[key] is True)
        if key in given and not idle and key not in (*row.required, *row.optional):
            yield f"{key}: {_without_meaning(family, key)}"
    if row.even_rank and (values["lora_rank"] or 0) % 2:
        yield f"lora_rank: must be even with adapter_type = '{family}', not {values['lora_rank']}: {row.even_rank}"
    if quantised and row.not_over_quantised:
        yield f"adapter_type: '{family}': {row.not_over_quantised}"
    if loraplus and not row.fast:
        fast = _listed(name for name, other in CONFIGURED.items() if other.fast)
        yield f"optimizer.loraplus_lr_ratio: adapter_type = '{family}' has no B to learn faster; it is for {fast}"
    if values["init_lora_weights"] is not True:
        yield from _start_conflicts(values, quantised)
    if values["target_parameters"] and "target_parameters" in row.optional:
        yield from _parameter_conflicts(values)


def _start_conflicts(values: Mapping[str, Any], quantised: bool) -> Iterator[str]:
    """What does not go with a start from the weight (PiSSA, OLoRA), in which s·B·A begins as a part of it."""
    start = values["init_lora_weights"]
    if values["use_dora"]:
        yield f"init_lora_weights: '{start}' with use_dora would not be saved as it was trained; remove one of them"
    if quantised:
        yield (
            f"init_lora_weights: '{start}' initialises from the full-precision weight, so it cannot be used over a 4- or 8-bit "
            "base"
        )
    for key in OF_PRODUCTS:
        if values[key]:
            yield f"{key}: with this init_lora_weights s·B·A begins as a part of the weight, and should not be held down"
    if values["init_adapter"]:
        yield (
            "init_adapter: what such a run saves is a plain LoRA of twice the rank; to go on from it leave "
            "init_lora_weights out, and give twice the lora_rank and the lora_alpha with which s is the same"
        )


def _parameter_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with LoRAs of parameters, which change the parameter itself and see nothing of what the module reads."""
    beside = {
        "use_dora": "PEFT has no DoRA of a parameter",
        "lora_dropout": "what is added to a parameter has no input of its own to drop",
        **dict.fromkeys(
            OF_PRODUCTS, "is of one product s·B·A a module, and a parameter has one for each of its matrices"
        ),
    }
    for key, reason in beside.items():
        if values[key]:
            yield f"{key}: not with target_parameters: {reason}; remove one of them"
    if values["init_lora_weights"] is not True:
        yield "init_lora_weights: not with target_parameters, whose A begins at random and B at zero; remove one of them"


def full_fine_tune_conflicts(values: Mapping[str, Any], *, loraplus: bool) -> Iterator[str]:
    """Keys of an adapter beside full_fine_tune = true. `values`: OF_ADAPTERS."""
    for key in OF_ADAPTERS:
        if values[key]:
            yield f"{key}: has no meaning with full_fine_tune = true; remove one of them"
    if loraplus:
        yield "optimizer.loraplus_lr_ratio: has no effect with full_fine_tune = true; remove one of the two"


def after_training_conflicts(
    after_training: Sequence[Part], hub_model_id: str | None, full_fine_tune: bool
) -> Iterator[str]:
    """What of `after_training` contradicts itself or the run."""
    for part in PARTS:
        if after_training.count(part) > 1:
            yield f"after_training: '{part}' is named more than once"
    if "push" in after_training and hub_model_id is None:
        yield "after_training: 'push' needs hub_model_id = 'OWNER/NAME', the repository on the Hub"
    if full_fine_tune and (idle := [part for part in PARTS_OF_ADAPTERS if part in after_training]):
        yield f"after_training: {_listed(idle)} with full_fine_tune = true: what is saved is a model already; remove it"


def evaluation_conflicts(values: Mapping[str, Any], evaluates: bool) -> Iterator[str]:
    """What goes by an evaluation that is not made. `values`: OF_EVALUATION; `evaluates`: there is a set to evaluate."""
    if not evaluates:
        for key in OF_EVALUATION:
            if values[key]:
                yield f"{key}: there is nothing to evaluate; give datasets.0.eval_size or [[eval_datasets]], or remove it"
        return
    if values["early_stopping_patience"] and not values["eval_steps"]:
        yield "early_stopping_patience: counts evaluations during the run; give eval_steps, or remove it"
    if values["early_stopping_min_delta"] and not values["early_stopping_patience"]:
        yield "early_stopping_min_delta: only applies with early_stopping_patience; give that, or remove it"
    if values["load_best_at_end"] and not (values["eval_steps"] or values["eval_after_last_step"]):
        yield "load_best_at_end: nothing is evaluated after a step; give eval_steps, or remove it"


def tracker_conflicts(trackers: Sequence[str], options: Collection[str]) -> Iterator[str]:
    """Options of what does not follow the run, and what is named twice."""
    for tracker in options:
        if tracker not in trackers:
            yield f"tracker_options.{tracker}: trackers does not name '{tracker}'; add it there, or remove this"
    for tracker in sorted({one for one in trackers if trackers.count(one) > 1}):
        yield f"trackers: '{tracker}' is named more than once"


def samples_conflicts(samples: Mapping[str, Any], *, full_fine_tune: bool, in_full: Sequence[str]) -> Iterator[str]:
    """What of [samples] contradicts itself or the run. `in_full`: trainable_modules."""
    if bool(samples["prompts"]) == bool(samples["prompts_file"]):
        yield "samples.prompts: give prompts = ['…'] or prompts_file, and not both"
    if not (samples["every_steps"] or samples["at_start"] or samples["at_end"]):
        yield "samples.every_steps: 0 with at_start and at_end = false asks for no samples; remove [samples]"
    if samples["compare"] and (full_fine_tune or in_full):
        key = "full_fine_tune = true" if full_fine_tune else "trainable_modules"
        yield f"samples.compare: {key} changes the base's own weights, so there is no base left to show; remove one of them"
    if samples["system"] and samples["chat"] is False:
        yield "samples.system: plain text has no system's message; remove it, or chat = false"


def _without_meaning(family: str, key: str) -> str:
    """Why `key` has no meaning for the family, and for which it has."""
    if reason := CONFIGURED[family].unneeded.get(key):
        return f"has no meaning with adapter_type = '{family}'; {reason}"
    others = _listed(name for name, row in CONFIGURED.items() if key in (*row.required, *row.optional))
    if key in LACKING:
        return f"adapter_type = '{family}' has no {LACKING[key]}; it is for {others}"
    return f"has no meaning with adapter_type = '{family}'; it is for {others}. Remove it"


def _listed(names: Collection[str] | Iterator[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
