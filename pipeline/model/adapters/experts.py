"""The experts of a mixture as one target: what they write, whichever of them wrote it.

What a layer's routed experts write is y = Σ_e g_e·(W_e·a_e + b_e), linear from the left in every W_e and b_e. So an adapter of
the output, y' = (I + s·B·A)·y, is W_e' = (I + s·B·A)·W_e and b_e' = (I + s·B·A)·b_e of every expert with one A and B: it needs
no expert's weights in training, whatever form these have, and a fold has it exactly.

Takes a model's config; gives the modules of which that is true. It is tried out, not read off a name: on a tiny copy of the
model (tiny_copy.py) each module with three-dimensional weights is run again with one of them multiplied from the left.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.console import UserError
from pipeline.formats.experts import ExpertWeights
from pipeline.model.tiny_copy import NoCopyError, tiny_copy, token_ids

EXPERTS = "experts"  # what target_modules calls them, whatever the model does
TOLERANCE = 1e-4  # of the largest output. A module that is not linear in a weight is off by percents.


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a layer has weights of all its experts in one tensor."""
    return any(next(_stacked(layer), None) for layer in model.base_model.layers)


def holds(model: PreTrainedModel, module: str) -> bool:
    """Whether the module of this name has such weights."""
    return next(_stacked(model.get_submodule(module)), None) is not None


def share(model: PreTrainedModel) -> float:
    """Of the weights of all layers, those that are in such tensors."""
    layers = model.base_model.layers
    stacked = sum(p.numel() for layer in layers for _, p in _stacked(layer))
    return stacked / max(1, sum(p.numel() for p in layers.parameters()))


@torch.no_grad()
def find(config: PretrainedConfig) -> dict[str, ExpertWeights]:
    """{name within a layer: what the module writes with} of the modules of experts; empty where there are none.

    Raises UserError where no tiny copy of the model can be run to find out.
    """
    try:
        model, _ = tiny_copy(config)
    except NoCopyError as error:
        raise UserError(
            f"target_modules: no tiny copy of model_type '{config.model_type}' can be run to find out what its experts write "
            f"with ({error}); name linear modules"
        ) from error
    candidates: dict[str, nn.Module] = {}
    for layer in model.base_model.layers:
        for child, module in layer.named_children():
            if names := [name for name, _ in _stacked(module)]:
                within = _parent_of_all(names)
                candidates.setdefault(".".join(filter(None, [child, within])), module.get_submodule(within))
    calls = _calls(model, candidates)
    found = {name: _written_with(candidates[name], *call) for name, call in calls.items()}
    return {name: form for name, form in found.items() if form}


def _stacked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that may hold a matrix for each expert. Those of convolutions have a dimension of one."""
    return ((name, p) for name, p in module.named_parameters() if p.dim() == 3 and min(p.shape) > 1)


def _parent_of_all(names: list[str]) -> str:
    """Of parameters, the innermost module that has all of them; '' for the module itself."""
    parts = [name.split(".")[:-1] for name in names]
    common = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        common.append(same[0])
    return ".".join(common)


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]  # arguments and what came of them


def _calls(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, Call]:
    """One call of each module that gives a tensor, while the model runs."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.setdefault(name, (args, kwargs, output.clone()))

        return hook

    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        model(input_ids=token_ids(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _written_with(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> ExpertWeights | None:
    """The weight, and the bias with it, of which the module's output is linear from the left; None where there is none."""
    width = output.shape[-1]
    M = torch.eye(width) + torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    expected = output @ M.T
    biases = [None, *(name for name, p in module.named_parameters() if p.dim() <= 2 and p.shape[-1] == width)]
    for name, parameter in _stacked(module):
        for transposed in (False, True):
            if parameter.shape[2 if transposed else 1] != width:
                continue
            for bias in biases:
                changed = [(parameter, parameter @ M.T if transposed else M @ parameter)]
                if bias:
                    changed.append((module.get_parameter(bias), module.get_parameter(bias) @ M.T))
                if _gives(module, changed, args, kwargs, expected):
                    return ExpertWeights(name, bias, transposed)
    return None


def _gives(
    module: nn.Module,
    changed: list[tuple[nn.Parameter, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Tensor,
) -> bool:
    """Whether the module gives `expected` with these values in the place of its parameters'."""
    held = [parameter.data for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value
        found = module(*args, **kwargs)
    finally:
        for (parameter, _), value in zip(changed, held, strict=True):
            parameter.data = value
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def leaf(form: ExpertWeights) -> str:
    """What the weight is called: 'down_proj' of 'down_proj', 'output_linear' of 'output_linear.weight'."""
    return re.sub(r"\.weight$", "", form.weight).rpartition(".")[2]
