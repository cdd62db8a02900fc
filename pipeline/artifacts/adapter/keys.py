"""The keys of an adapter's configuration: which of them change what the adapter computes.

Takes `adapter_config.json` of one of PEFT's types; refuses, by the key's name, what a fold would leave out or compute
otherwise. A key that is not known here is refused as well: it may be either.
"""

from pathlib import Path
from typing import Any

from pipeline.artifacts.adapter.adapter import CONFIG_FILE
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA, SAVED
from pipeline.foreign import printable

# Keys that change nothing about the tensors of the file once the adapter is trained. (How the base stores its weights is for
# the base to say, as in PEFT, which sets fan_in_fan_out right by the module it meets: stored_form.)
COMMON = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Keys that change what the adapter computes, with what they mean. null, false and empty switch off.
UNFOLDABLE = {
    "trainable_token_indices": "single token embeddings were trained beside the adapter",
    "layer_replication": "layers were repeated",
    "alora_invocation_tokens": "it is active on some tokens only, which no fold can express",
    "use_qalora": "QA-LoRA pools the input",
    "megatron_config": "it was trained on Megatron's parallel layers",
    "coft": "the rotations are held near the identity in each forward pass, after the last update too",
}
# Starts that leave the base weight alone. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) train against a changed one.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError where the configuration says of an adapter of PEFT's, PEANUT apart, what a fold leaves out."""
    peft_type = str(config.get("peft_type"))
    harmless = {key for family in SAVED.values() if family.peft_type == peft_type for key in family.harmless}
    for key, value in config.items():
        if not value or key in COMMON or key in harmless:
            continue
        shown = f"{printable(key, 80)} = {printable(repr(value), 100)}"
        if key in UNFOLDABLE:
            raise UserError(f"{folder}: {shown}: {UNFOLDABLE[key]}. That is not folded.")
        raise UserError(
            f"{folder}/{CONFIG_FILE}: {shown} is not known here, and may change what the adapter computes. "
            "If it does not, remove the key and run again."
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise UserError(f"{folder}: use_dora with lora_bias, a bias of lora_B: DoRA's scale and it do not go together.")
    start = config.get("init_lora_weights", True)
    if peft_type == FAMILIES[LORA].peft_type and start not in PLAIN_STARTS:
        raise UserError(
            f"{folder}: init_lora_weights = {start!r} trains against a base whose weights were changed first, so it "
            "cannot be folded into the original. Save it in PEFT with path_initial_model_for_weight_conversion."
        )


def check_peanut_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError where a PEANUT adapter is no multiplicative LoRA."""
    depth, activation = config.get("depth", 0), config.get("act_fn", "relu")
    if depth != 0 or activation != "linear":
        raise UserError(
            f"{folder}: a PEANUT adapter with depth {depth} and act_fn {activation!r} is not linear. "
            "Only depth 0 with act_fn 'linear' is a multiplicative LoRA."
        )
