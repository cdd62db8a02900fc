"""Which modules an adapter goes to: `target_modules` and `layers_to_transform` as full names of modules.

Takes a model, of whose weights only the sizes are read, and the config's words; gives names in model order, and lines
that say what was chosen.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config.schema import layer_ranges
from pipeline.console import UserError
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights
from pipeline.model.adapters import experts, parameters
from pipeline.model.structure.parts import layers_of_model, parts_of, reads_weight
from pipeline.names import layer_of, within_layer

# Linear modules of a mixture of experts or of sparse attention that only choose: by a part of their name within a layer.
ROUTER = re.compile(r"(^|\.)(gate|shared_expert_gate|\w*router\w*|\w*indexer\w*)(\.|$)")


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


def resolve_targets(
    model: PreTrainedModel,
    target_modules: list[str] | str,
    layers: list[int],
    mixture: Mapping[str, ExpertWeights] = NO_EXPERTS,
) -> list[str]:
    """Full names of the modules to adapt, in model order. UserError if a name matches nothing that can be adapted.

    A target matches a linear module whose name within its layer is the target or ends in '.target'; 'all-linear' matches every
    linear module of the decoder layers but routers and indexers, which only choose (`routers` names them). `mixture`: the
    modules of experts that may be adapted, by their name within a layer (`experts.find`): 'experts' matches them, and so
    do their name and that of the weight with which they write ('down_proj').
    """
    found = _linear_modules(model, layers)
    of_experts = {name: _modules_called(model, name, layers) for name in mixture}
    if target_modules == "all-linear":
        wanted = [name for name in found if not ROUTER.search(name)]
    else:
        matching = {
            target: [name for name in found if _ends(name, target)]
            + [name for name in mixture if of_experts[name] and _means(target, name, mixture[name])]
            for target in target_modules
        }
        for target, names in matching.items():
            if not names:
                raise UserError(
                    f"target_modules: no linear module '{target}' in the chosen layers{_what_it_is(model, target, layers)}; "
                    f"there are {', '.join(sorted([*found, *mixture])) or 'none'}"
                )
        wanted = list(dict.fromkeys(name for names in matching.values() for name in names))
    if not wanted:
        raise UserError(
            f"target_modules = '{target_modules}': the chosen layers of model_type '{model.config.model_type}' have no "
            "linear module to adapt"
        )
    _check_apart([name for name in wanted if name in mixture], wanted)
    chosen = {full for name in wanted for full in found.get(name) or of_experts[name]}
    return [name for name, _ in model.named_modules() if name in chosen]


def routers(model: PreTrainedModel, layers: list[int]) -> list[str]:
    """Names within a layer of the linear modules that 'all-linear' leaves out because they only choose."""
    return [name for name in _linear_modules(model, layers) if ROUTER.search(name)]


def describe_targets(
    model: PreTrainedModel,
    targets: list[str],
    layers: list[int],
    mixture: Mapping[str, ExpertWeights] = NO_EXPERTS,
    of_parameters: Sequence[str] = (),
) -> list[str]:
    """Lines: how many of the chosen `layers` have an adapter in each kind of module, and the share of weights in these.

    'in 3 of 4 layers: mlp.down_proj; in 1: mlp.shared_expert.down_proj', 'on 12.3 % of the weights of all layers'. `mixture`:
    the modules of experts among `targets`, by their full names; `of_parameters`: the parameters that are adapted beside them.
    """
    layers_with: dict[str, set[int | None]] = {}
    for full in targets:
        layers_with.setdefault(_kind(within_layer(full)), set()).add(layer_of(full))
    kinds_in: dict[int, list[str]] = {}
    for name, those in layers_with.items():
        kinds_in.setdefault(len(those), []).append(name)
    counts = [f"{n} of {len(layers)} layers: {', '.join(kinds_in[n])}" for n in sorted(kinds_in, reverse=True)]
    weights = [f"{name}.{mixture[name].weight if name in mixture else 'weight'}" for name in targets]
    held = sum(model.get_parameter(name).numel() for name in [*weights, *of_parameters])
    share = held / sum(p.numel() for p in layers_of_model(model).parameters())
    lines = [f"in {'; in '.join(counts)}"] if counts else []
    if of_parameters:
        lines.append(parameters.describe(parameters.shapes(model, of_parameters)))
    lines += [f"on {100 * share:.3g} % of the weights of all layers"]
    if mixture:
        kinds = ", ".join(sorted({_kind(within_layer(name)) for name in mixture}))
        written = ", ".join(sorted({experts.leaf(form) for form in mixture.values()}))
        lines.append(
            f"{kinds}: one pair a layer on what its experts write, which changes the {written} of each of them"
        )
    elif not of_parameters and (in_experts := experts.share(model)):
        lines.append(f"{100 * in_experts:.3g} % are in the experts' own tensors, which this adapter does not reach")
    return lines


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


def _linear_modules(model: PreTrainedModel, layers: list[int]) -> dict[str, list[str]]:
    """Name within a layer → full names, of all modules of `layers` that compute x·Wᵀ + b, as nn.Linear and Conv1D do, and are
    called for it."""
    prefix = parts_of(model).layers
    found: dict[str, list[str]] = {}
    for index in layers:
        layer = model.get_submodule(f"{prefix}.{index}")
        for name, module in layer.named_modules():
            parent, _, leaf = name.rpartition(".")
            if _is_linear(type(module)) and not reads_weight(layer.get_submodule(parent), leaf):  # type: ignore[arg-type]
                found.setdefault(name, []).append(f"{prefix}.{index}.{name}")
    return found


@cache
@torch.no_grad()
def _is_linear(kind: type[nn.Module]) -> bool:
    """Whether modules of `kind` compute what nn.Linear does, whichever way their weight lies; a Linear with a forward of its own
    is tried out on random numbers."""
    if not issubclass(kind, nn.Linear) or kind.forward is nn.Linear.forward:
        return issubclass(kind, nn.Linear) or kind is Conv1D
    with torch.random.fork_rng(devices=[]), suppress(Exception):  # whatever a class says to being made so
        small, x = kind(3, 5), torch.randn(7, 3)
        return torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), atol=1e-6)
    return False


def _modules_called(model: PreTrainedModel, name: str, layers: list[int]) -> list[str]:
    """Full names of the modules of `layers` with this name within their layer."""
    prefix = parts_of(model).layers
    there = [index for index in layers if name in dict(model.get_submodule(f"{prefix}.{index}").named_modules())]
    return [f"{prefix}.{index}.{name}" for index in there if experts.holds(model, f"{prefix}.{index}.{name}")]


def _means(target: str, name: str, form: ExpertWeights) -> bool:
    """Whether `target` names this module of experts."""
    return target in (experts.EXPERTS, experts.leaf(form)) or _ends(name, target)


def _check_apart(of_experts: list[str], wanted: list[str]) -> None:
    for outer in of_experts:
        if inner := next((name for name in wanted if name.startswith(f"{outer}.")), None):
            raise UserError(
                f"target_modules: {inner} lies inside {outer}, whose output is adapted; leave one of them out"
            )


def _what_it_is(model: PreTrainedModel, target: str, layers: list[int]) -> str:
    """What `target` names in the layers that is no linear module."""
    for index in layers:
        layer = model.get_submodule(parts_of(model).layer(index))
        for name, module in layer.named_modules():
            if name and _ends(name, target):
                if _is_linear(type(module)):  # type: ignore[arg-type]
                    return f" (in layer {index} the model's code takes its weight and does not call it)"
                return f" (in layer {index} it is a {type(module).__name__})"
    return ""


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _kind(name: str) -> str:
    """'mlp.experts.3.w1' → 'mlp.experts.*.w1'."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
