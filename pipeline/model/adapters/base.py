"""What is trained: the multiplicative LoRA, PEFT's LoRA, or the model's own weights; other families stand on this.

Takes a stage and the names of the modules to adapt; gives the stage with exactly the trainable parameters it should
have. Parameters are named by the whole model's module names, and drawn from a generator seeded by that name, so that a
run has the same adapter whatever the number of stages.
"""

import math
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.config.schema import layer_ranges
from pipeline.console import UserError
from pipeline.families import MULTIPLICATIVE
from pipeline.model.stage import Stage, tied_head
from pipeline.names import EMBEDDING_MODULE, HEAD_MODULE, layer_of, within_layer

# Linear modules of a mixture of experts or of sparse attention that only choose: by a part of their name within a layer.
ROUTER = re.compile(r"(^|\.)(gate|shared_expert_gate|\w*router\w*|\w*indexer\w*)(\.|$)")


class Settings(NamedTuple):
    """With what a family is put on modules of one size; each reads of it what it needs.

    `s`: alpha / rank, or with `use_rslora` alpha / √rank. `start`: True, or the name of a start from the weight. `feedforward`:
    full names of the modules with a factor for each input.
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


# Puts a family on those of the named modules that the stage owns.
Injector = Callable[[Stage, list[str], Settings], None]


class MultiplicativeLoRA(nn.Module):
    """h' = h + s·B·A·h on the output h of any linear-like module: W' = (I + s·B·A)·W.

    A [R, D_out] looks for R directions in the output, B [D_out, R] holds the vector that is added for each, s = alpha/R.
    Needs only the module's output, so the module may hold bf16, 4-bit or 8-bit weights. (jukofyork, creative-writer
    v0.1, "The multiplicative-LoRA method".) A is Kaiming-uniform, B zero, as in LoRA (Hu et al. 2021, §4.1).
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, alpha: float, dropout: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        width = int(base_layer.out_features)  # type: ignore[arg-type]
        self.A = nn.Parameter(torch.empty(rank, width, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(width, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] → [..., D_out] in the dtype of the base layer's output."""
        h = self.base_layer(x)
        z = nn.functional.linear(self.dropout(h).to(self.A.dtype), self.A)
        return (h + nn.functional.linear(z, self.B) * self.scaling).to(h.dtype)


def resolve_layers(text: str | None, n_layers: int) -> list[int]:
    """'0:38' on 40 layers → [0, …, 38]; None → all. UserError for layers the model does not have."""
    if text is None:
        return list(range(n_layers))
    wanted = sorted({index for low, high in layer_ranges(text) for index in range(low, high + 1)})
    if wanted[-1] >= n_layers:
        raise UserError(
            f"layers_to_transform = '{text}': the model has {n_layers} decoder layers, 0 to {n_layers - 1} "
            "(both ends of a range are included)"
        )
    return wanted


def resolve_targets(model: PreTrainedModel, target_modules: list[str] | str, layers: list[int]) -> list[str]:
    """Full names of the linear modules to adapt, in model order. UserError if a name matches nothing that can be adapted.

    A target matches a module whose name within its layer is the target or ends in '.target'; 'all-linear' matches every
    linear module of the decoder layers but routers and indexers, which only choose (`routers` names them).
    """
    found = _linear_modules(model, layers)
    if target_modules == "all-linear":
        wanted = [name for name in found if not ROUTER.search(name)]
    else:
        wanted = [name for name in found if any(_ends(name, target) for target in target_modules)]
        for target in target_modules:
            if not any(_ends(name, target) for name in wanted):
                raise UserError(
                    f"target_modules: no linear module '{target}' in the chosen layers{_what_it_is(model, target, layers)}; "
                    f"there are {', '.join(sorted(found)) or 'none'}"
                )
    if not wanted:
        raise UserError(f"target_modules = '{target_modules}': the chosen layers have no linear module to adapt")
    chosen = {full for name in wanted for full in found[name]}
    return [name for name, _ in model.named_modules() if name in chosen]


def routers(model: PreTrainedModel, layers: list[int]) -> list[str]:
    """Names within a layer of the linear modules that 'all-linear' leaves out because they only choose."""
    return [name for name in _linear_modules(model, layers) if ROUTER.search(name)]


def describe_targets(model: PreTrainedModel, targets: list[str], layers: list[int]) -> list[str]:
    """Lines: how many of the chosen `layers` have an adapter in each kind of module, and the share of weights in these.

    'in 3 of 4 layers: mlp.down_proj; in 1: mlp.shared_expert.down_proj', 'on 12.3 % of the weights of all layers'.
    """
    layers_with: dict[str, set[int | None]] = {}
    for full in targets:
        layers_with.setdefault(_kind(within_layer(full)), set()).add(layer_of(full))
    kinds_in: dict[int, list[str]] = {}
    for name, those in layers_with.items():
        kinds_in.setdefault(len(those), []).append(name)
    counts = [f"{n} of {len(layers)} layers: {', '.join(kinds_in[n])}" for n in sorted(kinds_in, reverse=True)]
    held = sum(model.get_submodule(name).weight.numel() for name in targets)  # type: ignore[operator,union-attr]
    share = held / sum(p.numel() for p in model.base_model.layers.parameters())
    return [f"in {'; in '.join(counts)}", f"on {100 * share:.3g} % of the weights of all layers"]


def _linear_modules(model: PreTrainedModel, layers: list[int]) -> dict[str, list[str]]:
    """Name within a layer → full names, of all modules of `layers` that compute x·Wᵀ + b as nn.Linear does."""
    prefix = f"{model.base_model_prefix}.layers"
    found: dict[str, list[str]] = {}
    for index in layers:
        for name, module in model.get_submodule(f"{prefix}.{index}").named_modules():
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                found.setdefault(name, []).append(f"{prefix}.{index}.{name}")
    return found


def _what_it_is(model: PreTrainedModel, target: str, layers: list[int]) -> str:
    """What `target` names in the layers that is no linear module."""
    for index in layers:
        layer = model.get_submodule(f"{model.base_model_prefix}.layers.{index}")
        for name, module in layer.named_modules():
            if name and _ends(name, target):
                return f" (in layer {index} it is a {type(module).__name__})"
    return ""


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _kind(name: str) -> str:
    """'mlp.experts.3.w1' → 'mlp.experts.*.w1'."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def describe_layers(layers: list[int], n_layers: int) -> str:
    """The resolved layers in words: 'layers 0 to 38 (39 of 40: all but the last)'."""
    runs: list[list[int]] = []
    for index in layers:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    words = ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    extent = "all" if len(layers) == n_layers else f"{len(layers)} of {n_layers}"
    if layers == list(range(n_layers - 1)):
        extent += ": all but the last"
    return f"layers {words} ({extent})"


def inject_multiplicative(
    stage: Stage, targets: list[str], rank: int, alpha: float, dropout: float, dtype: torch.dtype, seed: int
) -> None:
    """Wrap those of `targets` that the stage owns in a `MultiplicativeLoRA`."""

    def make(name: str, base_layer: nn.Module) -> nn.Module:
        adapter = MultiplicativeLoRA(base_layer, rank, alpha, dropout, dtype, device_of(base_layer))
        draw(adapter.A, f"{name}.A", seed)
        return adapter

    wrap(stage, targets, make)


def inject_lora(
    stage: Stage,
    targets: list[str],
    rank: int,
    alpha: float,
    dropout: float,
    dtype: torch.dtype,
    seed: int,
    use_rslora: bool = False,
) -> None:
    """PEFT's LoRA on those of `targets` that the stage owns, in `dtype`; s = alpha/R, or alpha/√R with `use_rslora`."""
    from peft import LoraConfig

    mine = inject_peft(
        stage,
        targets,
        lambda names: LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=names,
            bias="none",
            use_rslora=use_rslora,
        ),
    )
    for name in mine:
        module = stage.model.get_submodule(name)
        module.lora_A.to(dtype)
        module.lora_B.to(dtype)
        draw(module.lora_A["default"].weight, f"{name}.A", seed)


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
    prefix, layers = f"{stage.model.base_model_prefix}.layers.", stage.model.base_model.layers
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


def unfreeze(stage: Stage, target_modules: list[str] | None) -> None:
    """Full fine-tuning: every parameter, or those with one of `target_modules` as a part of their name.

    A tied head and embedding are one weight, wherever they are: naming one of them names both.
    """
    targets = set(target_modules or ())
    if tied_head(stage.model) and targets & {EMBEDDING_MODULE, HEAD_MODULE}:
        targets |= {EMBEDDING_MODULE, HEAD_MODULE}
    for name, parameter in stage.model.named_parameters():
        wanted = target_modules is None or bool(targets & set(name.split(".")))
        parameter.requires_grad_(wanted and parameter.is_floating_point())


def trainable(stage: Stage) -> dict[str, nn.Parameter]:
    """Trained parameters by their name in the whole model; those of a LoRA end in '.A' and '.B'."""
    return {_plain(name): p for name, p in stage.model.named_parameters() if p.requires_grad}


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


def owned(stage: Stage, targets: list[str]) -> list[str]:
    """Those of `targets` whose layer the stage has."""
    return [name for name in targets if layer_of(name) in stage.layer_indices]


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are."""
    return next(module.parameters()).device


@torch.no_grad()
def draw(parameter: Tensor, name: str, seed: int) -> None:
    """Kaiming-uniform with a = √5 (U(±1/√fan_in)), from a generator of the parameter's own."""
    # One 32-bit number: torch's CPU generator ignores the upper half of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    parameter.copy_(values)


def _plain(name: str) -> str:
    """PEFT's 'x.lora_A.default.weight' → 'x.A', 'x.ia3_l.default' → 'x.ia3_l'."""
    match = re.fullmatch(r"(.+)\.(?:lora_(?=[AB]\.))?(\w+)\.default(?:\.weight)?", name)
    return f"{match[1]}.{match[2]}" if match else name


# In each of these modules: the families that it serves.
INJECTORS: dict[str, Injector] = {
    MULTIPLICATIVE: lambda stage, targets, to: inject_multiplicative(
        stage, targets, to.rank, to.alpha, to.dropout, to.dtype, to.seed
    ),
}
