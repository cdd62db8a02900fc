"""The model's own weights that are trained: modules in full beside the adapter (the embedding, norms), or the whole model.

Takes the whole model without weights and the names of modules; gives the full names of their parameters, and sets those
that a stage owns free to train. They stay in the dtype of the base weights and are in no adapter: `base.trainable` lists
them by their own names (`model.norm.weight`), and they are saved whole.

A tied embedding and head are one weight, wherever they are: naming one names both.
"""

from collections.abc import Collection, Sequence

from torch import nn
from transformers import PreTrainedModel

from pipeline.console import UserError
from pipeline.model.quantized import QuantizedPlaceholder, marked
from pipeline.model.stage import Stage, tied_head
from pipeline.model.structure.parts import layers_of_model, parts_of
from pipeline.model.weights import stored_in_another_form
from pipeline.names import last_part, layers_of


def resolve(model: PreTrainedModel, names: Sequence[str], targets: Collection[str]) -> list[str]:
    """Full names of the parameters of the modules that `names` name, in model order.

    A name matches a module whose full name it is or ends in '.name', in every layer: 'norm' is model.norm and no
    input_layernorm. `targets`: full names of the modules with an adapter. UserError for a name that matches nothing, or
    a module that cannot be trained in full beside the adapter.
    """
    modules = {module: name for name in names for module in _matching(model, name)}
    for module, name in modules.items():
        _check(model, name, module, targets)
    chosen = {f"{module}.{own}" for module in modules for own, _ in model.get_submodule(module).named_parameters()}
    chosen |= {name for ours, theirs in tied_head(model).items() if chosen & {ours, theirs} for name in (ours, theirs)}
    found = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in chosen]
    if other := stored_in_another_form(model, found):
        raise UserError(
            f"trainable_modules: transformers stores {other[0]} of model_type '{model.config.model_type}' in another form "
            "or under another name than it runs, and what is trained could not be put back there"
        )
    return found


def unfreeze(stage: Stage, parameters: Collection[str]) -> None:
    """Set those of `parameters`, full names, free to train that the stage owns. After the adapters are put in."""
    own = dict(stage.model.named_parameters(remove_duplicate=False))
    for name in parameters:
        if name in own:
            own[name].requires_grad_(True)


def unfreeze_model(stage: Stage, target_modules: list[str] | None) -> None:
    """Full fine-tuning: every parameter, or those with one of `target_modules` as a part of their name.

    A tied head and embedding are one weight, wherever they are: naming one of them names both.
    """
    targets = set(target_modules or ())
    ends = {last_part(parts_of(stage.model).embedding), last_part(parts_of(stage.model).head)}
    if tied_head(stage.model) and targets & ends:
        targets |= ends
    for name, parameter in stage.model.named_parameters():
        wanted = target_modules is None or bool(targets & set(name.split(".")))
        parameter.requires_grad_(wanted and parameter.is_floating_point())


def describe(model: PreTrainedModel, names: Sequence[str], parameters: Collection[str]) -> str:
    """'embed_tokens (head and embedding are one), norm, 4 × input_layernorm: 10,400 parameters'. `parameters`: from `resolve`."""
    copies = tied_head(model)
    ends = {name.rpartition(".")[0] for name in (*copies, *copies.values())}
    words = []
    for name in dict.fromkeys(names):
        matched = _matching(model, name)
        times = f"{len(matched)} × " if len(matched) > 1 else ""
        words.append(f"{times}{name}" + (" (head and embedding are one)" if ends & set(matched) else ""))
    count = sum(model.get_parameter(name).numel() for name in parameters if name not in copies)
    return f"{', '.join(words)}: {count:,} parameters"


def first_layer(model: PreTrainedModel, parameters: Collection[str]) -> int:
    """The first decoder layer through which a gradient runs for the sake of `parameters`; the number of layers if none."""
    parts = parts_of(model)
    if any(name.startswith(tuple(f"{one}." for one in (parts.embedding, *parts.entry))) for name in parameters):
        return 0
    return min(layers_of(parameters), default=len(layers_of_model(model)))


def _matching(model: PreTrainedModel, name: str) -> list[str]:
    """Full names of the modules that `name` names, or UserError with the names there are."""
    full = [module for module, _ in model.named_modules()]
    found = [module for module in full if module == name or module.endswith(f".{name}")]
    if not name or not found:
        holding = {owner.rpartition(".")[2] for owner in (p.rpartition(".")[0] for p, _ in model.named_parameters())}
        raise UserError(
            f"trainable_modules: the model has no module '{name}'; those with weights are {', '.join(sorted(holding))}"
        )
    return found


def _check(model: PreTrainedModel, name: str, full: str, targets: Collection[str]) -> None:
    """UserError where the module `full`, which `name` names, cannot be trained in full beside the adapter."""
    module = model.get_submodule(full)
    if not list(module.parameters()):
        raise UserError(f"trainable_modules: '{name}' ({full}) has no weights to train")
    if adapted := [target for target in targets if target == full or target.startswith(f"{full}.")]:
        raise UserError(
            f"trainable_modules: '{name}' names {full}, in which {adapted[0]} has an adapter; a module is trained in full "
            "or through an adapter: take it out of target_modules or out of trainable_modules"
        )
    for own, part in module.named_modules():
        where = f"{full}.{own}".rstrip(".")
        if isinstance(part, QuantizedPlaceholder) or marked(part):
            raise UserError(
                f"trainable_modules: '{name}' names {where}, whose weight is quantised; to train it, keep it in 16 bits "
                "with llm_int8_skip_modules"
            )
        if kept := _persistent_buffers(part):
            raise UserError(
                f"trainable_modules: '{name}' names {where}, of which {kept[0]} is saved and not trained, so it is no "
                "module that can be trained in full"
            )


def _persistent_buffers(module: nn.Module) -> list[str]:
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]
