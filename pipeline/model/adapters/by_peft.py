"""PEFT's own types that are local to a module (pipeline/peft/types.py), by PEFT's own layers.

Takes a stage and names of modules; gives the stage with PEFT's layers around those that it owns. Each is made by itself and drawn
from a seed of its name, so a run begins alike on any number of stages; of types with projections or trained tensors that
modules share, the stage's modules are made together, and share them.
"""

import zlib
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pipeline.model.adapters.base import Injector, Settings, device_of, owned
from pipeline.model.stage import Stage
from pipeline.peft.types import LOCAL, PEFT, Asked

WHERE = f"{PEFT}."  # before a key of the table


def inject(stage: Stage, targets: list[str], to: Settings) -> None:
    """PEFT's layers on those of `targets` that the stage owns, trained numbers in `to.dtype`."""
    from pipeline.peft import layers as peft_layers

    if to.by_peft is None:
        raise ValueError("this family is of a type of PEFT's own, and none is given")
    peft_type, settings, shapes, _ = to.by_peft
    together = LOCAL[peft_type].projections or LOCAL[peft_type].shared
    mine = owned(stage, targets)
    flags = [flag for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(stage.model, flag, False)]
    for group in ([mine] if together else [[name] for name in mine]) if mine else ():
        modules = {name: stage.model.get_submodule(name) for name in group}
        own = peft_layers.of_module(settings, group[0], WHERE)
        with peft_layers.drawn(zlib.crc32(f"{to.seed} {group[0]}".encode()), device_of(modules[group[0]])):
            layers = peft_layers.put_around(modules, peft_type, own, shapes=shapes, quantised=flags)
        if LOCAL[peft_type].shared:
            peft_layers.start_shared(layers, peft_type, own, lambda name: zlib.crc32(f"{to.seed} {name}".encode()))
        for name, layer in layers.items():
            _in_dtype(layer, to)
            stage.model.set_submodule(name, layer)


def check_fits(model: PreTrainedModel, targets: list[str], asked: Asked) -> None:
    """UserError, without a weight, where PEFT makes no layer around one of `targets`."""
    from pipeline.peft import layers as peft_layers

    tried = set()
    for name in targets:
        module: Any = model.get_submodule(name)
        own = peft_layers.of_module(asked.settings, name, WHERE)
        alike = (module.in_features, module.out_features, module.bias is None, repr(own))
        if alike not in tried:
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            peft_layers.put_around({name: plain}, asked.type, own, shapes=asked.shapes)
            tried.add(alike)


def shapes_of(model: PreTrainedModel, targets: list[str]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each of `targets`, in their order."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    return {name: (module.out_features, module.in_features) for name, module in modules.items()}


def _in_dtype(layer: nn.Module, to: Settings) -> None:
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(to.dtype)


INJECTORS: dict[str, Injector] = {PEFT: inject}
