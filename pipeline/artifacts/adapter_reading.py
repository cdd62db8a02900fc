"""Reading an adapter from disk.

Takes a folder written by us, by PEFT (LORA, PEANUT) or by the founding method's hacked PEFT; gives an `Adapter` with
one (A, B, s) per module, or refuses with the name of what it holds that a fold would leave out. `adapter_model.bin`, in
which the founding method's adapters were saved, is a pickle: it is read with `weights_only=True`, which runs no code.
"""

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.artifacts.adapter_files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    KINDS,
    METADATA_KEY,
    OWN_TYPE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    Adapter,
    Kind,
    Pair,
    natural_order,
)
from pipeline.artifacts.base_files import read_json
from pipeline.artifacts.safetensors_stream import read_header
from pipeline.console import UserError

# Keys of a LORA config that change what the adapter computes, with what they mean. null, false and empty switch off.
UNFOLDABLE = {
    "use_dora": "DoRA scales the rows of the merged weight as well",
    "modules_to_save": "whole modules were trained beside the adapter",
    "lora_bias": "lora_B has a bias",
    "trainable_token_indices": "single token embeddings were trained beside the adapter",
    "layer_replication": "layers were repeated",
    "target_parameters": "it targets parameters that are not a Linear module's weight",
    "fan_in_fan_out": "the weights are stored transposed",
    "alora_invocation_tokens": "it is active on some tokens only, which no fold can express",
    "use_qalora": "QA-LoRA pools the input",
    "megatron_config": "it was trained on Megatron's parallel layers",
}
# Keys that change nothing about A, B and s once the adapter is trained.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Starts that leave the base weight alone. The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) train against a changed one.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def load_adapter(folder: Path) -> Adapter:
    """Read the adapter in `folder`; tensors keep their dtype. Raises UserError with what is wrong or not foldable."""
    if not folder.is_dir():
        raise UserError(f"--lora: there is no folder {folder}.")
    config = read_json(folder / CONFIG_FILE, "--lora: an adapter's folder has one")
    own, tensors = _read_tensors(folder)
    peft_type = config.get("peft_type")
    if peft_type == "LORA":
        _check_lora_config(folder, config)
        pairs = _pairs(folder, tensors, "lora", config, own)
    elif peft_type in ("PEANUT", OWN_TYPE):
        _check_peanut_config(folder, config)
        pairs = _pairs(folder, tensors, "peanut", config, own)
    else:
        raise UserError(f"{folder} is an adapter of type {peft_type!r}. LORA and PEANUT are what can be folded.")
    kind = _kind(folder, peft_type, own)
    _check_agreement(folder, own, pairs)
    scale, name = float(own.get("train_logit_scale", 1.0)), own.get("base_model", config.get("base_model_name_or_path"))
    # Stock PEANUT changes the weight alone; ours, and the hacked LORA, were trained on the output with its bias.
    return Adapter(folder, kind, pairs, bool(own) or peft_type == "LORA", scale, name)


def _read_tensors(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Our own facts (empty where others wrote it) and the tensors, whose memory is mapped where that is possible."""
    if (folder / WEIGHTS_FILE).is_file():
        header = read_header(folder / WEIGHTS_FILE)  # says in plain words what is wrong with a damaged file
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as stored:
            tensors = {entry.name: stored.get_tensor(entry.name) for entry in header.tensors}
        return _own_facts(folder, header.metadata or {}), tensors
    if (folder / "adapter_model.bin").is_file():
        try:
            tensors = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}/adapter_model.bin is a pickle that holds more than tensors: {reason}") from None
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise UserError(f"{folder}/adapter_model.bin does not hold named tensors.")
        return {}, tensors
    raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor adapter_model.bin.")


def _own_facts(folder: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        own = json.loads(metadata[METADATA_KEY])
        version = int(own["format_version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/{WEIGHTS_FILE}: its metadata does not read. The file is damaged.") from None
    if version > FORMAT_VERSION:
        raise UserError(f"{folder} was written by a newer mulora-pipe (format {version}; {FORMAT_VERSION} is known).")
    return own


def _check_lora_config(folder: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if not value or key in HARMLESS or (key == "bias" and value == "none"):
            continue
        if key == "bias":
            raise UserError(
                f"{folder}: bias = {value!r}: biases were trained beside the adapter. That is not folded yet."
            )
        if key in UNFOLDABLE:
            raise UserError(f"{folder}: {key} = {value!r}: {UNFOLDABLE[key]}. That is not folded yet.")
        raise UserError(
            f"{folder}/{CONFIG_FILE}: {key} = {value!r} is not known here, and may change what the adapter computes. "
            "If it does not, remove the key and run again."
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{folder}: init_lora_weights = {start!r} trains against a base whose weights were changed first, so it "
            "cannot be folded into the original. Save it in PEFT with path_initial_model_for_weight_conversion."
        )


def _check_peanut_config(folder: Path, config: dict[str, Any]) -> None:
    depth, activation = config.get("depth", 0), config.get("act_fn", "relu")
    if depth != 0 or activation != "linear":
        raise UserError(
            f"{folder}: a PEANUT adapter with depth {depth} and act_fn {activation!r} is not linear. "
            "Only depth 0 with act_fn 'linear' is a multiplicative LoRA."
        )
    key = "modules_to_save"
    if config.get(key):
        raise UserError(f"{folder}: {key} = {config[key]!r}: {UNFOLDABLE[key]}. That is not folded yet.")


def _pairs(
    folder: Path, tensors: dict[str, torch.Tensor], stem: str, config: dict[str, Any], own: dict[str, Any]
) -> dict[str, Pair]:
    """Group the tensors by module; each must be one half of exactly one pair."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.{stem}_([AB])\.weight", name)
        if match is None or match.group(2) in halves.setdefault(match.group(1), {}):
            unknown.append(name)
        else:
            halves[match.group(1)][match.group(2)] = tensor
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors are no {stem}_A or {stem}_B of a module: {unknown[0]} first."
        )
    if not halves:
        raise UserError(f"{folder} holds no tensors: there is nothing to fold.")
    single = [module for module, half in halves.items() if len(half) == 1]
    if single:
        raise UserError(
            f"{folder}: {single[0]} has {stem}_{next(iter(halves[single[0]]))} only. The adapter is incomplete."
        )
    return {
        module: _pair(folder, module, halves[module]["A"], halves[module]["B"], config, own)
        for module in sorted(halves, key=natural_order)
    }


def _pair(
    folder: Path, module: str, A: torch.Tensor, B: torch.Tensor, config: dict[str, Any], own: dict[str, Any]
) -> Pair:
    shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or 0 in A.shape + B.shape:
        raise UserError(f"{folder}: {module}: {shapes} are not R × D and D × R.")
    if not (A.is_floating_point() and B.is_floating_point()):
        raise UserError(f"{folder}: {module}: the adapter's tensors are {A.dtype} and {B.dtype}, not floating point.")
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise UserError(f"{folder}: {module}: the adapter holds NaN or infinite values. Its training diverged.")
    rank = A.shape[0]
    try:
        scaling, origin = _scaling(folder, module, rank, config, own)
        declared = _matching(config.get("rank_pattern"), module) or [int(config["r"])]
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{folder}/{CONFIG_FILE}: the rank or the scaling of {module} does not read ({error!r})."
        ) from None
    if rank not in declared:
        raise UserError(f"{folder}: {module} has rank {rank} ({shapes}), but {CONFIG_FILE} says {declared[0]}.")
    if not math.isfinite(scaling):
        raise UserError(f"{folder}/{CONFIG_FILE}: the scaling of {module} is {scaling}.")
    return Pair(A, B, scaling, origin)


def _scaling(folder: Path, module: str, rank: int, config: dict[str, Any], own: dict[str, Any]) -> tuple[float, str]:
    """A module's s and where it comes from."""
    if config["peft_type"] != "LORA":
        origin = f"alpha / rank = {own['alpha']:g} / {own['rank']}" if own else f"scaling of {CONFIG_FILE}"
        return float(config["scaling"]), origin
    alphas = _matching(config.get("alpha_pattern"), module) or [float(config["lora_alpha"])]
    if len(set(alphas)) > 1:
        raise UserError(
            f"{folder}/{CONFIG_FILE}: several entries of alpha_pattern match {module}, with {alphas}. PEFT takes the "
            "first, but saves them in alphabetical order, so which one the training took is lost: leave that one."
        )
    if config.get("use_rslora"):  # rsLoRA, arXiv 2312.03732
        return alphas[0] / math.sqrt(rank), f"alpha / sqrt(rank) = {alphas[0]:g} / sqrt({rank})"
    return alphas[0] / rank, f"alpha / rank = {alphas[0]:g} / {rank}"


def _matching(patterns: dict[str, Any] | None, module: str) -> list[Any]:
    """The values of PEFT's rank_pattern or alpha_pattern for a module: of all patterns that match its name's end."""
    return [value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)]


def _kind(folder: Path, peft_type: str, own: dict[str, Any]) -> Kind | None:
    if own:
        if own.get("kind") not in KINDS or (own["kind"] == "lora") != (peft_type == "LORA"):
            raise UserError(f"{folder}: {CONFIG_FILE} says {peft_type}, the weights' metadata {own.get('kind')!r}.")
        return own["kind"]
    return None if peft_type == "LORA" else "multiplicative_lora"


def _check_agreement(folder: Path, own: dict[str, Any], pairs: dict[str, Pair]) -> None:
    for module, pair in pairs.items():
        if own and not math.isclose(pair.scaling, own.get("scaling", math.nan), rel_tol=1e-6):
            raise UserError(
                f"{folder}: the scaling of {module} is {pair.scaling:g} by {CONFIG_FILE} and {own.get('scaling')} by "
                "the weights' metadata. To fold with another strength, leave the files as they are and use --scale."
            )
