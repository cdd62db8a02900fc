"""LoRA of parameters that are no linear module's weight (PEFT's target_parameters): above all those of all experts of a layer.

Takes a model and names of parameters; gives the stage with PEFT's own wrapper around the modules that hold them, one for each:

    P_e' = P_e + s·B_e·A_e  of each matrix P_e of P [E, D_out, D_in], or, of a module whose inputs come first, s·A_eᵀ·B_eᵀ

A [R·E, D_in] and B [D_out, R·E]. The module runs as it is, with P' in the place of P: P' of all experts is made for each forward.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.console import UserError
from pipeline.model.adapters.base import draw, owned
from pipeline.model.quantized import marked
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import parts_of
from pipeline.names import within_layer


def resolve(model: PreTrainedModel, names: list[str], layers: list[int]) -> list[str]:
    """Full names of the parameters of `layers` that `names` name, each module's in the order in which it holds them.

    A name matches a parameter whose name within its layer is the name or ends in '.name', as in PEFT. UserError for a name that
    matches none, and for a quantised parameter.
    """
    found = {full: (within, module) for full, within, module in _of_layers(model, layers)}
    for name in names:
        if not any(_ends(within, name) for within, _ in found.values()):
            there = sorted({within for within, _ in found.values()})
            raise UserError(
                f"target_parameters: no parameter '{name}' of two or three dimensions in the chosen layers that is no linear "
                f"module's weight; there are {', '.join(there) or 'none'}"
            )
    chosen = [full for full, (within, _) in found.items() if any(_ends(within, name) for name in names)]
    for full in chosen:
        if full.rpartition(".")[2] in marked(found[full][1]):
            raise UserError(
                f"target_parameters: {full} is quantised, and PEFT adds to the experts' own tensors, which 4 or 8 bits do "
                "not show; "
                "keep it in 16 bits with llm_int8_skip_modules = ['experts'], or adapt what the experts write: adapter_type = "
                "'multiplicative_lora' with target_modules = ['experts']"
            )
    return chosen


def shapes(model: PreTrainedModel, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Of parameters by their names."""
    return {name: tuple(model.get_parameter(name).shape) for name in names}


def among(model: nn.Module, names: list[str]) -> list[str]:
    """Those of `names` that are parameters: of a module that is there, and no module themselves."""
    modules = dict(model.named_modules())
    return [name for name in names if name not in modules]


@torch.no_grad()
def inject(
    stage: Stage, targets: list[str], rank: int, alpha: float, dtype: torch.dtype, seed: int, use_rslora: bool = False
) -> None:
    """PEFT's LoRA on those of the parameters `targets` that the stage owns, in `dtype`; A Kaiming-uniform, B zero.

    UserError for experts that are quantised.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper

    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, bias="none", target_modules=[])
    for name in owned(stage, targets):
        module_name, _, own = name.rpartition(".")
        module: Any = stage.model.get_submodule(module_name)
        held = innermost(module)
        if own not in held._parameters:
            raise UserError(
                f"{name}: it is quantised, and PEFT adds to the experts' own tensors; leave the experts in 16 bits"
            )
        wrapper = ParamWrapper(module, "default", own, config, r=rank, lora_alpha=alpha)
        wrapper.lora_A.to(dtype)
        wrapper.lora_B.to(dtype)
        draw(wrapper.lora_A["default"].weight, f"{name}.A", seed)
        stage.model.set_submodule(module_name, wrapper)


def innermost(module: Any) -> nn.Module:
    """The model's own module within wrappers of its parameters."""
    while hasattr(module, "parameter_name"):
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def wrapper_of(model: nn.Module, name: str) -> nn.Module:
    """The wrapper of the parameter `name`."""
    module_name, _, own = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    while module.parameter_name != own:
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def describe(chosen: Mapping[str, tuple[int, ...]]) -> str:
    """What is adapted, each kind once, with its shape."""
    kinds = dict.fromkeys((within_layer(name), shape) for name, shape in chosen.items())
    listed = [f"{name} ({' × '.join(map(str, shape))})" for name, shape in kinds]
    return f"and a pair for each matrix of the parameters {', '.join(listed)}"


def _of_layers(model: PreTrainedModel, layers: list[int]) -> Iterator[tuple[str, str, nn.Module]]:
    """Full name, name within its layer, and module of every parameter that a LoRA may be of."""
    for index in layers:
        prefix = parts_of(model).layer(index)
        for holder, module in model.get_submodule(prefix).named_modules():
            if isinstance(module, nn.Linear):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                if (parameter.dim() == 3 and min(parameter.shape) > 1) or (parameter.dim() == 2 and own == "weight"):
                    within = f"{holder}.{own}".removeprefix(".")
                    yield f"{prefix}.{within}", within, module


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
