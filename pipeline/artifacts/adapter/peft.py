"""Adapters that are no pair of A and B, written as PEFT writes them: DoRA, IA³, OFT, BOFT, HRA.

Takes tensors under global names (`model.layers.3.mlp.down_proj.ia3_l`) and the family's settings; gives a folder with
`adapter_model.safetensors` and `adapter_config.json` that stock PEFT loads, with our own facts in the metadata.

    dora   m/‖W + s·B·A‖ ⊙ (W + s·B·A), by rows    .A [R, D_in], .B [D_out, R], .lora_magnitude_vector [D_out]
    ia3    l ⊙ W, by rows, or by columns where feedforward      .ia3_l [D_out, 1] or [1, D_in]
    oft    W·R, R of orthogonal blocks             .oft_R [blocks, k·(k − 1)/2]
    boft   s ⊙ W·R, by rows                        .boft_R [1, blocks, k, k], .boft_s [D_out, 1]
    hra    W·H₁·…·H_R, reflections                 .hra_u [D_in, R]
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline import version
from pipeline.artifacts.adapter import full as full_tensors
from pipeline.artifacts.adapter.write import (
    CONFIG_FILE,
    FORMAT_VERSION,
    METADATA_KEY,
    NOTHING,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    write_json,
)
from pipeline.formats.dtypes import CODES
from pipeline.formats.safetensors import TensorSpec, tensor_bytes, write_safetensors
from pipeline.names import loadable_name, natural_order, public_name

Family = Literal["dora", "ia3", "oft", "boft", "hra"]
# The family's type in PEFT, and for each tensor of a module what PEFT calls it in the file.
FAMILIES: dict[Family, tuple[str, dict[str, str]]] = {
    "dora": (
        "LORA",
        {"A": "lora_A.weight", "B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"},
    ),
    "ia3": ("IA3", {"ia3_l": "ia3_l"}),
    "oft": ("OFT", {"oft_R": "oft_R.weight"}),
    "boft": ("BOFT", {"boft_R": "boft_R", "boft_s": "boft_s"}),
    "hra": ("HRA", {"hra_u": "hra_u"}),
}


def write_peft_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    family: Family,
    settings: Mapping[str, Any],
    base_model: str,
    train_logit_scale: float,
    full: Mapping[str, torch.Tensor] = NOTHING,
    tied: Mapping[str, str] = NOTHING,
    trained_over: Mapping[str, Any] | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write an adapter's two files into `folder`, which exists without them and is the caller's to put in place.

    `tensors`: for every module those of its family, floating point. `settings`: the family's own keys of PEFT's config.
    `base_model`, `full`, `tied`, `trained_over`, `base_fingerprint`: as for `adapter_files.write_adapter`.
    Raises ValueError where a module
    lacks a tensor, has one too many, or one is not finite.
    """
    peft_type, names = FAMILIES[family]
    modules = sorted({name.rpartition(".")[0] for name in tensors}, key=natural_order)
    if not modules or {f"{module}.{key}" for module in modules for key in names} != set(tensors):
        raise ValueError(f"an adapter of the family {family} has {', '.join(names)} for every module and nothing else")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not math.isfinite(float(tensor.float().abs().sum())):
            raise ValueError(f"{name}: the adapter holds NaN or infinite values, or integers")
    base = public_name(base_model)
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loadable_name(base_model),
        "inference_mode": True,
        "target_modules": modules,
        **full_tensors.for_config(full, tied, peft_type),
        **settings,
        "peft_type": peft_type,
    }
    own = {
        "format_version": FORMAT_VERSION,
        "version": version.full(),
        "kind": family,
        "train_logit_scale": train_logit_scale,
        "base_model": base,
        "modules": modules,
        "settings": dict(settings),
        "trained_over": trained_over,
        "base_fingerprint": base_fingerprint,
        **full_tensors.for_metadata(full, tied),
    }
    stored = {
        f"{PEFT_PREFIX}{module}.{theirs}": tensors[f"{module}.{key}"].contiguous()
        for module in modules
        for key, theirs in names.items()
    }
    stored |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in full_tensors.named(full, tied).items()}
    specs = [TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()]
    metadata = {"format": "pt", METADATA_KEY: json.dumps(own)}
    write_safetensors(folder / WEIGHTS_FILE, specs, lambda name: [tensor_bytes(stored[name])], metadata)
    write_json(folder / CONFIG_FILE, config)
