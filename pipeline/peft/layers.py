"""PEFT's own layers: around single modules, or as what they make of a weight.

Takes a type of pipeline/peft/types.py, PEFT's keys for it and modules; gives PEFT's layers, one module at a time, so that nothing
depends on which others there are: PEFT sees a model of these modules alone. The one file that knows how PEFT keeps a layer's
tensors; it imports PEFT, and so is itself imported late by what has to start without.
"""

import difflib
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from pipeline import patterns
from pipeline.console import UserError
from pipeline.peft import shared
from pipeline.peft.types import LOCAL, OURS, PATTERNS

ADAPTER = "default"  # PEFT's name of an adapter where there is one
WIDEST = "widest"  # a module that stands for the widest of all
KEPT = "lora_kept"  # beside a module's tensors, while it trains: which of its triplets a budget has left
Shape = tuple[int, int]  # D_out, D_in


def check_settings(peft_type: str, settings: Mapping[str, Any], where: str) -> None:
    """UserError with every key that PEFT's configuration of the type lacks, or that has no such value. `where`: before a key."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]  # type: ignore[index]
    hints = typing.get_type_hints(kind)
    known = [one.name for one in fields(kind) if one.name not in OURS and one.init]
    lines = []
    for key, value in settings.items():
        if key not in hints:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            meant = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(known)}"
            lines.append(f"{where}{key}: PEFT's {peft_type} has no such key; {meant}")
            continue
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            said = dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors())
            lines.append(f"{where}{key} = {value!r}: {', or '.join(said)}")
    if not lines:
        try:
            _config(peft_type, settings, [WIDEST])
        except Exception as error:  # whatever PEFT says to values that do not go together
            lines.append(f"{where}type = '{peft_type}': PEFT refuses these keys: {error}")
    if lines:
        raise UserError("\n".join(lines))


def settings_of_file(peft_type: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those keys of an adapter's configuration that say what it computes. UserError for one that another type of PEFT's has, and
    that may change it."""
    row = LOCAL[peft_type]
    given = {key: value for key, value in config.items() if key not in OURS and value is not None}
    if not row.keys:
        return given | dict(row.own)
    own = {key: given[key] for key in row.keys if key in given}
    check_settings(peft_type, own, where)
    usual = as_json(peft_type, own)
    for key in given.keys() - {*row.keys, *row.refused}:
        if given[key] and given[key] != usual.get(key):
            raise UserError(
                f"{where}{key} = {given[key]!r} is not known of PEFT's {peft_type}, and may change what it computes."
            )
    return {key: given.get(key, usual.get(key)) for key in row.keys} | dict(row.own)


def of_module(settings: Mapping[str, Any], module: str, where: str) -> dict[str, Any]:
    """`settings` with the values that their patterns give to `module` (its full name), and without patterns."""
    own = {key: value for key, value in settings.items() if key not in PATTERNS}
    for key, target in PATTERNS.items():
        for pattern, value in (settings.get(key) or {}).items():
            if patterns.matches(pattern, module, f"{where}{key}"):
                own[target] = value
                break
    return own


def put_around(
    modules: Mapping[str, nn.Module],
    peft_type: str,
    settings: Mapping[str, Any],
    *,
    shapes: Mapping[str, Shape] | None = None,
    quantised: Collection[str] = (),
) -> dict[str, Any]:
    """{name: PEFT's layer around the module}, all of one set of `settings` without patterns.

    `shapes`: of all the adapter's modules, in the model's order, of which these are some: of types whose modules share
    projections, as wide as the widest, or trained tensors. `quantised`: PEFT's flags of
    a model that is ('is_loaded_in_4bit'). UserError, naming the module, where PEFT does not make one.
    """
    inner = {f"m{number}": module for number, module in enumerate(modules.values())}
    if LOCAL[peft_type].projections:
        if shapes is None:
            raise ValueError(f"{peft_type} shares projections, whose shape is that of the widest module")
        inner[WIDEST] = _of_no_memory(widest(shapes), next(iter(modules.values())))
    model = nn.ModuleDict(inner)
    for flag in quantised:
        setattr(model, flag, True)
    config = _config(peft_type, settings, list(inner))
    on_meta = all(p.is_meta for module in modules.values() for p in module.parameters())
    if on_meta and hasattr(config, "mask_fn"):
        config.mask_fn = None  # PEFT looks for its mask's entries, and on meta there is none
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PEFT_TYPE_TO_TUNER_MAPPING[peft_type](model, config, adapter_name=ADAPTER)  # type: ignore[index]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
        raise UserError(f"PEFT makes no {peft_type} of {next(iter(modules))}: {error}") from error
    layers = {name: model[short] for name, short in zip(modules, inner, strict=False)}
    if LOCAL[peft_type].shared and shapes is not None:
        shared.settle(layers, peft_type, config, shapes, ADAPTER)
    for name, layer in layers.items():
        if not isinstance(layer, BaseTunerLayer) or layer.get_base_layer() is not modules[name]:
            raise UserError(f"target_modules: PEFT puts no adapter into {name}; name other modules")
        if on_meta and hasattr(config, "mask_fn"):
            count = layer.shira_weight[ADAPTER].numel()  # type: ignore[union-attr, index]
            layer.shira_indices[ADAPTER] = torch.empty(2, count, dtype=torch.int, device="meta")  # type: ignore[union-attr, index]
        layer.written = partial(written, layer, config)  # type: ignore[assignment]
    return layers


@torch.no_grad()
def written(layer: nn.Module, config: PeftConfig) -> dict[str, Tensor]:
    """The layer's tensors by their names in a file, without the module's: what is trained, and what is frozen and not made anew.

    They share memory with the layer's.
    """
    row = LOCAL[config.peft_type]  # type: ignore[index]
    if row.shared:
        return shared.own(layer, row.name, config, ADAPTER)
    alone = nn.ModuleDict({"m": layer})
    alone.peft_config = {ADAPTER: config}  # type: ignore[assignment]
    found = get_peft_model_state_dict(alone, save_embedding_layers=False)
    names = {name.removeprefix("m."): tensor for name, tensor in found.items()}
    names = {name: tensor for name, tensor in names.items() if not name.startswith((*row.projections, "base_model."))}
    kept = vars(layer).get("kept", lambda: None)()  # of triplets, where a budget has dropped some
    return names if kept is None else {**names, KEPT: kept}


def kept_only(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """Of all modules' tensors, as `written` names them: without the triplets that are not kept, and PEFT's rank_pattern."""
    masks = {name.removesuffix(f".{KEPT}"): t.bool() for name, t in tensors.items() if name.endswith(f".{KEPT}")}
    left = {}
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        if own != KEPT:
            mask = masks.get(module)
            left[name] = tensor if mask is None else tensor[:, mask] if own == "lora_B" else tensor[mask]
    return left, {f"{module}.lora_E": mask.tolist() for module, mask in masks.items()} or None


def in_full(tensors: Mapping[str, Tensor], kept: Any, rank: int) -> dict[str, Tensor]:
    """A module's tensors with zeros for the triplets that were not kept: the same function, of the rank it began with.

    `kept`: what PEFT's rank_pattern has of the module, None where it has nothing. ValueError where that is no such list.
    """
    if kept is None:
        return dict(tensors)
    if not isinstance(kept, list) or len(kept) != rank or not all(isinstance(one, bool) for one in kept):
        raise ValueError(f"its rank_pattern is no list of {rank} times true or false")
    mask, full = torch.tensor(kept), {}
    for name, tensor in tensors.items():
        columns = tensor.T if name == "lora_B" else tensor
        if columns.dim() != 2 or len(columns) != sum(kept):
            raise ValueError(f"{name} is {list(tensor.shape)}, and its rank_pattern keeps {sum(kept)} triplets")
        wide = columns.new_zeros(rank, columns.shape[1])
        wide[mask] = columns
        full[name] = wide.T if name == "lora_B" else wide
    return full


@torch.no_grad()
def fill(
    layer: Any, peft_type: str, tensors: Mapping[str, Tensor], common: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Give the layer the tensors of a file: by their names in `written`, all of them; floating point ones in `dtype`.

    `common`: those that the file has of all modules: projections, where it has them, and trained ones, of which the layer takes
    its own. ValueError where the tensors are not the layer's.
    """
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    there, held = layer.written(), _held(layer, peft_type)
    if lacking := sorted(held.keys() - common.keys()):
        raise ValueError(f"it lacks {lacking[0]}, which modules share")
    if there.keys() != tensors.keys():
        differing = sorted(there.keys() ^ tensors.keys())
        raise ValueError(f"its tensors are {', '.join(tensors)}, and PEFT asks for {', '.join(there)} ({differing[0]})")
    projections = [name for name in LOCAL[peft_type].projections if name in common]
    places = {**there, **held, **{name: getattr(layer, name)[ADAPTER] for name in projections}}
    for name, place in places.items():
        tensor = tensors[name] if name in there else common[name]
        if place.shape != tensor.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, and PEFT asks for {list(place.shape)}")
        if name in projections:
            getattr(layer, name)[ADAPTER] = tensor.to(dtype)
        else:
            place.copy_(tensor)


def merged(
    weight: Tensor,
    bias: Tensor | None,
    peft_type: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    module: str = "module",
    shapes: Mapping[str, Shape] | None = None,
    common: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """W' [D_out, D_in] and b' as PEFT's layer merges them, in the dtype of `weight`: fp32, or fp64 where the type can.

    `tensors`: the module's, as `written` names them; `common`: what the file has of all modules; `module`: its name among
    `shapes`. Raises ValueError where they do not fit.
    """
    dtype = torch.float32 if LOCAL[peft_type].only_fp32 else weight.dtype
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
    with drawn(0, weight.device):
        layer = put_around({module: plain}, peft_type, settings, shapes=shapes)[module]
    fill(layer, peft_type, tensors, common or {}, dtype)
    layer.merge()
    done = layer.get_base_layer()
    return done.weight.detach().to(weight.dtype), None if bias is None else done.bias.detach().to(weight.dtype)


def misfit(
    shape: Shape, biased: bool, peft_type: str, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str | None:
    """In words, what of the tensors of a module with a weight of `shape` is not as PEFT makes it."""
    plain = nn.Linear(shape[1], shape[0], bias=biased, device="meta")
    try:
        layer = put_around({"the module": plain}, peft_type, settings, shapes={"the module": shape})["the module"]
    except UserError as error:
        return str(error)
    there = layer.written()
    for name in sorted(there.keys() | tensors.keys()):
        asked, found = (list(t[name].shape) if name in t else None for t in (there, tensors))
        if asked != found:
            return f"{name} {found or 'missing'}, where PEFT's {peft_type} has {asked or 'none'},"
    return None


def _held(layer: Any, peft_type: str) -> dict[str, Tensor]:
    """Detached, what the layer shares with others."""
    row = LOCAL[peft_type]
    return {name: p.detach() for name, p in shared.held(layer, row.name, ADAPTER).items()} if row.shared else {}


def start_shared(
    layers: Mapping[str, Any], peft_type: str, settings: Mapping[str, Any], seed_of: Callable[[str], int]
) -> None:
    """Of a type with shared tensors, its start: each tensor drawn from a seed of its name."""
    device = next(iter(layers.values())).get_base_layer().weight.device
    config = _config(peft_type, settings, [WIDEST])
    shared.draw(layers, peft_type, config, lambda name: drawn(seed_of(name), device), ADAPTER)


def widest(shapes: Mapping[str, Shape]) -> Shape:
    """The most outputs and the most inputs that a module has."""
    return max(rows for rows, _ in shapes.values()), max(columns for _, columns in shapes.values())


@contextmanager
def drawn(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what is drawn at random begins at `seed`; outside, nothing has been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def as_json(peft_type: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of PEFT's configuration of the type, defaults included, but those that name modules, files and purposes."""
    given = _config(peft_type, settings, [WIDEST]).to_dict()
    kept = {key: value for key, value in given.items() if key not in OURS or key in settings}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def _config(peft_type: str, settings: Mapping[str, Any], targets: list[str]) -> PeftConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=targets, **settings)  # type: ignore[index]


def _of_no_memory(shape: Shape, like: nn.Module) -> nn.Linear:
    """A linear module with a weight of `shape`, all of whose numbers are one number in memory."""
    at = next(like.parameters()).device
    plain = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(torch.zeros((), device=at).expand(shape), requires_grad=False)
    return plain
