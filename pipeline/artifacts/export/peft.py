"""An additive form as PEFT's LoRA: what PEFT, vLLM and most other programs read.

Takes an `AdditiveForm` and an empty folder; gives `adapter_model.safetensors` and `adapter_config.json` in it, one
tensor in memory at a time. s = lora_alpha / r, without patterns and without rsLoRA. Where biases move, the constants
are the bias of lora_B (`lora_bias`), which PEFT multiplies by s like the rest. What was trained in full beside the adapter
is written as it is, as PEFT's `modules_to_save`.
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline import version
from pipeline.artifacts.adapter import full as full_tensors
from pipeline.artifacts.adapter.adapter import CONFIG_FILE, FORMAT_VERSION, METADATA_KEY, PEFT_PREFIX, WEIGHTS_FILE
from pipeline.artifacts.export.additive import AdditiveForm, lora_A, lora_B, lora_B_bias
from pipeline.families import FAMILIES, LORA, settings
from pipeline.files import write_json
from pipeline.formats.dtypes import CODES
from pipeline.formats.safetensors import TensorSpec, tensor_bytes, write_safetensors
from pipeline.names import loadable_name, public_name


def write_peft(
    folder: Path,
    form: AdditiveForm,
    *,
    base_model: str,
    base_folder: Path,
    train_logit_scale: float,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Write the two files into `folder`. `advance` is told of the bytes written.

    `base_model`: as the adapter names it; where that is no Hub id, PEFT is told of `base_folder`.
    """
    biased = any(target.constant is not None for target in form.targets)
    makers: dict[str, Callable[[], torch.Tensor]] = {}
    specs = []
    for target in form.targets:
        rows, columns = target.weight.shape
        name = f"{PEFT_PREFIX}{target.module}.lora_"
        tensors: list[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]] = [
            (f"{name}A.weight", (form.rank, columns), partial(lora_A, form, target, device)),
            (f"{name}B.weight", (rows, form.rank), partial(lora_B, form, target)),
        ]
        if biased:  # PEFT's switch is one for all modules
            tensors.append((f"{name}B.bias", (rows,), partial(lora_B_bias, form, target)))
        for stored, shape, make in tensors:
            specs.append(TensorSpec(stored, form.dtype, shape))
            makers[stored] = make
    for name, tensor in full_tensors.named(form.full, form.tied).items():
        specs.append(TensorSpec(f"{PEFT_PREFIX}{name}", CODES[tensor.dtype], tuple(tensor.shape)))
        makers[f"{PEFT_PREFIX}{name}"] = tensor.contiguous

    def pieces(name: str) -> Iterable[memoryview]:
        piece = tensor_bytes(makers[name]())
        yield piece
        advance(len(piece))

    base_name = public_name(base_model)
    loadable = base_name if "/" in base_name else loadable_name(str(base_folder))
    own = _own_facts(form, base_name, train_logit_scale)
    metadata = {"format": "pt", METADATA_KEY: json.dumps(own)}
    write_safetensors(folder / WEIGHTS_FILE, specs, pieces, metadata)
    write_json(folder / CONFIG_FILE, _config(form, loadable, biased))


def _config(form: AdditiveForm, base_model: str, biased: bool) -> dict[str, Any]:
    """`lora_alpha` is whole where it can be: the key is an integer in PEFT's and vLLM's own definitions."""
    row = FAMILIES[LORA]
    alpha = int(form.alpha) if form.alpha.is_integer() else form.alpha
    values = {"lora_rank": form.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False}
    return {
        "peft_type": row.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": [target.module for target in form.targets],
        **settings(row, values),
        "lora_bias": biased,
        **full_tensors.for_config(form.full, form.tied, row.peft_type),
    }


def _own_facts(form: AdditiveForm, base_model: str, train_logit_scale: float) -> dict[str, Any]:
    """The facts by which our own programs know the result for an additive adapter, on square weights too."""
    return {
        "format_version": FORMAT_VERSION,
        "version": version.full(),
        "kind": LORA,
        "rank": form.rank,
        "alpha": form.alpha,
        "scaling": form.scaling,
        "train_logit_scale": train_logit_scale,
        "base_model": base_model,
        "modules": [target.module for target in form.targets],
        "exported_from": form.kind,
        **full_tensors.for_metadata(form.full, form.tied),
    }
