"""What every family of adapters has: its settings, how it gets into a stage, how its tensors are named and drawn.

Parameters are named by the whole model's module names, and drawn from a generator seeded by that name, so that a run
has the same adapter whatever the number of stages.
"""

import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.console import UserError
from pipeline.kernels.packed_experts import PackedExperts
from pipeline.model.stage import Stage
from pipeline.model.structure.parts import layers_of_model, parts_of
from pipeline.names import layer_of
from pipeline.peft.types import SHARED, Asked


class Settings(NamedTuple):
    """With what a family is put on modules of one size; each reads of it what it needs.

    `s`: alpha / rank, or with `use_rslora` alpha / √rank. `start`: True, or the name of a start from the weight. `feedforward`:
    full names of the modules with a factor for each input. `by_peft`: of a type of PEFT's own, all that is said of it.
    """

    rank: int
    alpha: float
    s: float
    dropout: float
    dtype: torch.dtype
    seed: int
    use_rslora: bool
    start: bool | str
    block_size: int
    feedforward: list[str]
    by_peft: Asked | None = None


# Puts a family on those of the named modules that the stage owns.
Injector = Callable[[Stage, list[str], Settings], None]


def inject_peft(stage: Stage, targets: list[str], config_for: Callable[[list[str]], Any]) -> list[str]:
    """PEFT's adapter on those of `targets` that the stage owns, whose full names it returns.

    `config_for`: PEFT's config for names of modules. UserError unless PEFT puts an adapter into each, and in nothing else.
    """
    mine = owned(stage, targets)
    if not mine:
        return []
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Not into the model: by its type PEFT rewrites names such as gate_proj into parameters of a mixture's experts, and the
    # modules named here would have no adapter. The layers alone have no type.
    prefix, layers = f"{parts_of(stage.model).layers}.", layers_of_model(stage.model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # by which PEFT chooses its layer
        setattr(layers, flag, getattr(stage.model, flag, False))

    def wrapped() -> set[str]:
        return {f"{prefix}{name}" for name, module in layers.named_modules() if isinstance(module, BaseTunerLayer)}

    before = wrapped()
    inject_adapter_in_model(config_for([name.removeprefix(prefix) for name in mine]), layers)
    new = wrapped() - before
    if differing := sorted(set(mine) ^ new):
        amiss = "an adapter into {}, which is none of them" if differing[0] in new else "no adapter into {}"
        raise UserError(f"target_modules: PEFT puts {amiss.format(differing[0])}; name other modules")
    return mine


def wrap(stage: Stage, targets: list[str], make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Put make(name, module) in the place of each of `targets` that the stage owns."""
    for name in owned(stage, targets):
        stage.model.set_submodule(name, make(name, stage.model.get_submodule(name)))


def trainable(stage: Stage) -> dict[str, nn.Parameter]:
    """Trained parameters by their name in the whole model; those of a LoRA end in '.A' and '.B', and of one of a parameter begin
    with that one's name."""
    holders = {f"{n}.": m.parameter_name for n, m in stage.model.named_modules() if hasattr(m, "parameter_name")}
    found = {}
    for name, parameter in stage.model.named_parameters():
        if parameter.requires_grad:
            holder, lora, rest = name.partition("lora_")
            wrapper = holders.get(holder) if lora else None
            found[_plain(name) if wrapper is None else _of_parameter(holder, wrapper, rest)] = parameter
    return found


def written(stage: Stage) -> dict[str, Tensor]:
    """What a save of the stage's adapters holds, by global name: what is trained, or what a family writes instead.

    A module with a method `written` stands for its own parameters (pipeline/model/adapters/control.py is one).
    """
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in trainable(stage).items()}
    for name, module in stage.model.named_modules():
        if hasattr(module, "written"):
            for own, _ in module.named_parameters(recurse=False):
                tensors.pop(f"{name}.{own}", None)
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.written().items()}
    return tensors


def frozen(stage: Stage) -> dict[str, Tensor]:
    """What PEFT's layers need beside what is trained, such as which entries of a weight they change: by its name in a save."""
    own = trainable(stage)
    layers = {
        name: vars(module)["written"] for name, module in stage.model.named_modules() if "written" in vars(module)
    }
    found = {f"{name}.{key}": tensor for name, by_name in layers.items() for key, tensor in by_name().items()}
    return {name: tensor for name, tensor in found.items() if name not in own}


def owned(stage: Stage, targets: list[str]) -> list[str]:
    """Those of `targets` whose layer the stage has."""
    return [name for name in targets if layer_of(name) in stage.layer_indices]


def outputs_of(model: PreTrainedModel, module: nn.Module) -> int:
    """How many numbers a module gives for each token: a linear one's rows; any other target writes to the hidden state."""
    sizes = sizes_of(module)
    return int(model.config.get_text_config().hidden_size) if sizes is None else sizes[1]


def sizes_of(module: Any) -> tuple[int, int] | None:
    """(D_in, D_out) of a linear module, whichever way its weight lies; None for any other."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    inputs, outputs = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return None if inputs is None or outputs is None else (int(inputs), int(outputs))


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are."""
    if (parameter := next(module.parameters(), None)) is not None:
        return parameter.device
    return next(
        held.device for part in module.modules() for held in vars(part).values() if isinstance(held, PackedExperts)
    )


@torch.no_grad()
def draw(parameter: Tensor, name: str, seed: int) -> None:
    """Kaiming-uniform with a = √5 (U(±1/√fan_in)), from a generator of the parameter's own."""
    values = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=_generator(name, seed))
    parameter.copy_(values)


@torch.no_grad()
def draw_normal(parameter: Tensor, name: str, seed: int, deviation: float) -> None:
    """Normal around 0 with this standard deviation, from a generator of the parameter's own."""
    values = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.copy_(nn.init.normal_(values, std=deviation, generator=_generator(name, seed)))


def _generator(name: str, seed: int) -> torch.Generator:
    # One 32-bit number: torch's CPU generator ignores the upper half of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def _of_parameter(holder: str, own: str, rest: str) -> str:
    """'x.base_layer.', 'down_proj', 'A.default.weight' → 'x.down_proj.A'."""
    module = re.sub(r"(\.base_layer)*\.$", "", holder)
    return f"{module}.{own}.{rest.partition('.')[0]}"


def _plain(name: str) -> str:
    """PEFT's 'x.lora_A.default.weight' → 'x.A', 'x.vblora_vector_bank.default' → 'vblora_vector_bank' (whichever module has it),
    'x.oft_R.default.weight' → 'x.oft_R', 'x.hada_w1_a.default' → 'x.hada_w1_a'."""
    match = re.fullmatch(r"(.+)\.(?:lora_(?=[AB]\.)|(?=(?:oft_R|lora_magnitude_vector)\.))(\w+)\.default\.weight", name)
    plain = f"{match[1]}.{match[2]}" if match else re.sub(r"\.default(?=\.|$)", "", name)
    return re.sub(rf"^.+\.(?=(?:{'|'.join(SHARED)})(?:\.|$))", "", plain)
