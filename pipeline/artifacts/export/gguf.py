"""An additive form as a GGUF LoRA: what llama.cpp and the programs built on it read.

Takes an `AdditiveForm` and the model's config; gives one file with `general.type` "adapter", the model's architecture,
`adapter.lora.alpha` (llama.cpp divides it by each pair's rank) and the pairs `<weight>.lora_a` [R, D_in] and `.lora_b`
[D_out, R]. Names come from the gguf package's own table; one tensor is in memory at a time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from pipeline import version
from pipeline.artifacts.export.additive import AdditiveForm, lora_A, lora_B
from pipeline.console import UserError
from pipeline.formats.safetensors import tensor_bytes
from pipeline.names import layers_of

# transformers' model_type → GGUF's name of the architecture, for families whose conversion to GGUF leaves the matrices
# that write to the residual stream as they are, and stores each under one name.
ARCHITECTURES = {
    "cohere": "command-r",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm4": "glm4",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
# What a layer writes to the residual stream: the attention's output and the MLP's, o_proj and down_proj in most models.
OUTPUT_SIDE = (gguf.MODEL_TENSOR.ATTN_OUT, gguf.MODEL_TENSOR.FFN_DOWN, gguf.MODEL_TENSOR.FFN_DOWN_SHEXP)
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "BF16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}

NUMBERS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # numpy has no bfloat16: its bits


def architecture(config: dict[str, Any]) -> str:
    """GGUF's name for a model's family. Raises UserError where the family is not one of `ARCHITECTURES`."""
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(
            f"no GGUF adapter is written for model_type {family!r}: it is not among {', '.join(ARCHITECTURES)}. "
            "Use --format peft, and llama.cpp's convert_lora_to_gguf.py if it knows the family."
        )
    return ARCHITECTURES[family]


def gguf_names(modules: Sequence[str], biased: Sequence[str], arch: str) -> dict[str, str]:
    """{module: the name of its weight in a GGUF model of architecture `arch`}.

    `biased`: those of `modules` with a bias that moves. Raises UserError where there is one, or where a module is not one
    that writes to the residual stream.
    """
    table = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 1 + max(layers_of(modules), default=0)
    )
    found = {module: table.get_type_and_name(module) for module in modules}
    refused = [module for module, entry in found.items() if entry is None or entry[0] not in OUTPUT_SIDE]
    if refused:
        raise UserError(
            f"{len(refused)} of the adapter's {len(found)} modules are not what a layer writes out (o_proj, down_proj "
            f"and their like): {', '.join(refused[:3])}{' ...' if len(refused) > 3 else ''}. A conversion to GGUF may "
            "reorder the rows of the others (q_proj and k_proj of Llama-like models), split or join them, and the "
            "adapter would be wrong without a sign of it. Use --format peft, and llama.cpp's convert_lora_to_gguf.py, "
            "which does to the adapter what it does to the model."
        )
    if biased:
        raise UserError(
            f"{len(biased)} of the adapter's modules have a bias, {biased[0]} first. The adapter moves it by s·B·A·b, "
            "and a GGUF adapter has no place for that. Fold the adapter (merge_lora.py), or use --format peft."
        )
    return {module: f"{entry[1]}.weight" for module, entry in found.items() if entry is not None}


def write_gguf(
    file: Path,
    form: AdditiveForm,
    *,
    arch: str,
    names: dict[str, str],
    base_model: str,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Write the adapter to `file`. `arch` and `names` as the functions above give them, `base_model`: its public name."""
    tensor_type, file_type = TYPES[form.dtype]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(file_type)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_model)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_string("mulora_pipe.version", version.full())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, form.alpha)
    numbers = np.dtype(NUMBERS[form.dtype])
    makers: list[Callable[[], torch.Tensor]] = []
    for target in form.targets:
        rows, columns = target.weight.shape
        pair: tuple[tuple[str, tuple[int, int], Callable[[], torch.Tensor]], ...] = (
            ("lora_a", (form.rank, columns), partial(lora_A, form, target, device)),
            ("lora_b", (rows, form.rank), partial(lora_B, form, target)),
        )
        for suffix, shape, make in pair:
            n_bytes = shape[0] * shape[1] * numbers.itemsize
            writer.add_tensor_info(f"{names[target.module]}.{suffix}", shape, numbers, n_bytes, tensor_type)
            makers.append(make)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for make in makers:
            written = np.frombuffer(tensor_bytes(make()), numbers)
            writer.write_tensor_data(written)
            advance(written.nbytes)
    finally:
        writer.close()
