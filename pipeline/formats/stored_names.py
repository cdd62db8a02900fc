"""What a model's folder calls the weights that transformers runs under other names.

Takes a base model's folder; gives, for each weight of the running model that is stored whole, the tensor that holds it:
under another name, or as some rows of a tensor in which several weights lie one below the other. What a checkpoint holds
in any other form (permuted rows) has no place here. Experts that run as one tensor and are stored one by one, or under
another name, are given beside them.

The one file beside the model's own code that asks transformers: the names are its loader's, and no list of ours would stay
true. It is imported late and called only where a name is not in the folder, so that a fold does without transformers otherwise.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.formats.base_model import Base
from pipeline.names import natural_order


@dataclass(frozen=True)
class Place:
    """A weight of the running model in its folder: the stored tensor, and the rows `first` to `first + n_rows` of it, None
    for all of it."""

    tensor: str
    first: int = 0
    n_rows: int | None = None


def stored_names(base: Base) -> dict[str, Place]:
    """{parameter of the running model: its place}, by transformers' own conversion mapping; empty where it has none.

    The running model is the one a training here builds (`auto_class`). No weight is read.
    """
    model = _empty_model(base)
    return {} if model is None else _places(model, base)


def stacked_names(base: Base) -> dict[str, tuple[str, ...]]:
    """{parameter of the running model that holds all experts: the stored tensors it is made of, in order}.

    One tensor under another name or with its last two dimensions exchanged, or one for each expert. A parameter that is put
    together of several tensors an expert (gate and up) is none of them, nor is one of which an expert lacks. No weight is read.
    """
    model = _empty_model(base)
    return {} if model is None else {name: names for name, (names, _) in _stacked(model, base).items()}


@dataclass(frozen=True)
class RunningParameter:
    """A parameter of the running model.

    `inputs_first`: whether its module says that of its last two dimensions the inputs come first (transformers' `is_transposed`).
    Where it holds a matrix for each expert: `tensors`, of each expert the stored matrices that lie one below the other in its
    own, or one tensor of all; `turned`, whether these are stored with their last two dimensions exchanged.
    """

    shape: tuple[int, ...]
    inputs_first: bool
    tensors: tuple[tuple[str, ...], ...] = ()
    turned: bool = False


def running_parameters(base: Base) -> dict[str, RunningParameter]:
    """Every parameter of the running model, in the order in which modules hold them; empty where this transformers cannot build
    it. One of all experts that is stored in a form other than those of `RunningParameter` has no `tensors`. No weight is read.
    """
    model = _empty_model(base)
    if model is None:
        return {}
    stacked, pieces, found = _stacked(model, base), _pieces(model, base), {}
    for holder, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name, shape = f"{holder}.{own}".removeprefix("."), tuple(parameter.shape)
            tensors, turned = pieces.get(name, ()), False
            if name in stacked:
                names, turned = stacked[name]
                tensors = tuple((one,) for one in names)
            of_experts = len(shape) == 3
            found[name] = RunningParameter(
                shape, bool(getattr(module, "is_transposed", False)), tensors if of_experts else (), turned
            )
    return found


def _stacked(model: Any, base: Base) -> dict[str, tuple[tuple[str, ...], bool]]:
    """{parameter: the stored tensors it is made of, in order; whether their last two dimensions are exchanged}."""
    found: dict[str, list[str]] = {}
    counts: dict[str, tuple[int, int]] = {}
    turned: dict[str, bool] = {}
    for name, running, converter, _, shapes in _renamed(model, base):
        operations = converter.operations if converter else []
        kinds = [type(one).__name__ for one in operations]
        stacking = set(kinds) <= {"MergeModulelist", "Transpose"} and (not kinds or len(converter.source_patterns) == 1)
        if stacking and running in shapes:
            found.setdefault(running, []).append(name)
            counts[running] = (1, shapes[running][0])
            exchanged = any(type(one).__name__ == "Transpose" and not one.check_dims for one in operations)
            turned[running] = exchanged or base.tensors[name].shape[-2:] != shapes[running][-2:]
    return {
        running: (tuple(sorted(names, key=natural_order)), turned[running])
        for running, names in found.items()
        if len(names) in counts[running]
    }


def expert_pieces(base: Base) -> dict[str, tuple[tuple[str, ...], ...]]:
    """{parameter of the running model that holds all experts: of each expert the stored matrices, in order, that lie one
    below the other in its own}: of experts that are stored one by one, gate and up apart or not. No weight is read."""
    model = _empty_model(base)
    return {} if model is None else _pieces(model, base)


def _pieces(model: Any, base: Base) -> dict[str, tuple[tuple[str, ...], ...]]:
    found: dict[str, dict[int, list[str]]] = {}
    right: dict[str, tuple[int, int]] = {}
    for name, running, converter, pattern, shapes in _renamed(model, base):
        kinds = [(type(one).__name__, getattr(one, "dim", 0)) for one in converter.operations] if converter else []
        if kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) and running in shapes:
            patterns = converter.source_patterns
            found.setdefault(running, {}).setdefault(patterns.index(pattern), []).append(name)
            right[running] = (len(patterns), shapes[running][0])
    return {
        running: tuple(zip(*(sorted(by[place], key=natural_order) for place in range(len(by))), strict=True))
        for running, by in found.items()
        if (len(by), *{len(names) for names in by.values()}) == right[running]
    }


def _empty_model(base: Base) -> Any:
    """The model on `meta`; None where this transformers cannot build it."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with contextlib.suppress(Exception), init_empty_weights(include_buffers=False):  # whatever transformers raises
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
        return auto_class(config).from_config(config, trust_remote_code=False)
    return None


def auto_class(config: Any) -> Any:
    """transformers' auto class for a config: what builds the model whose names its checkpoints have.

    AutoModelForCausalLM; of a model for text and images that has no causal class, AutoModelForImageTextToText.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    mixed = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    only_mixed = config.model_type in mixed and config.model_type not in causal
    return AutoModelForImageTextToText if only_mixed else AutoModelForCausalLM


def _renamed(model: Any, base: Base) -> Iterator[tuple[str, str, Any, str | None, dict[str, Any]]]:
    """Of each stored tensor: its name, that of the running model's parameter, the converter if one is in between with which
    of its patterns, and all parameters' shapes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = {id(one): one for one in mapping if isinstance(one, WeightConverter)}
    renamings = [one for one in mapping if id(one) not in converters]
    parameters = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    by_pattern = {pattern: one for one in converters.values() for pattern in one.source_patterns}
    for name in base.tensors:
        running, pattern = rename_source_key(
            name, renamings, list(converters.values()), model.base_model_prefix, parameters
        )
        yield name, running, None if pattern is None else by_pattern[pattern], pattern, shapes


def _places(model: Any, base: Base) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for name, running, converter, _, shapes in _renamed(model, base):
        shape = base.tensors[name].shape
        if converter is not None:
            found |= _rows(converter, running, shapes, name, shape)
        elif shapes.get(running) == shape:
            found[running] = Place(name)
    return found


def _rows(converter: Any, running: str, shapes: dict[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Place]:
    """The weights that `converter` cuts out of the stored tensor `name` as they lie, row below row; none for any other."""
    cuts = converter.operations
    if len(cuts) != 1 or type(cuts[0]).__name__ not in ("Chunk", "Split") or cuts[0].dim != 0:
        return {}
    targets = converter.target_patterns
    names = [running.replace(targets[0], target, 1) for target in targets]
    if not all(one in shapes and len(shapes[one]) == len(shape) for one in names):
        return {}
    if sum(shapes[one][0] for one in names) != shape[0] or any(shapes[one][1:] != shape[1:] for one in names):
        return {}
    found, first = {}, 0
    for one in names:
        found[one] = Place(name, first, shapes[one][0])
        first += shapes[one][0]
    return found
