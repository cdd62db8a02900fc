"""`init_adapter`: a run that begins with the weights of an adapter that was saved before.

Takes the folder and what the run trains; gives the tensors of the adapter and of what it holds in full, under global names,
or one UserError that says what does not fit, and puts them into a stage. At step 0 the
model is the one that was saved, to the rounding of the dtypes.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.artifacts.adapter.adapter import CONFIG_FILE, PEFT_PREFIX, WEIGHTS_FILE, Pair
from pipeline.artifacts.adapter.parameters import placed
from pipeline.artifacts.adapter.read import load_adapter, load_pairs
from pipeline.artifacts.adapter.schema import own_facts
from pipeline.console import UserError
from pipeline.families import FAMILIES, LORA, MULTIPLICATIVE
from pipeline.foreign import printable, read_object
from pipeline.formats.safetensors import Header, load_tensors, read_header
from pipeline.model.adapters.base import frozen, trainable
from pipeline.model.adapters.control import ControlAdapter
from pipeline.model.adapters.lora import MosLoRA
from pipeline.model.stage import Stage
from pipeline.names import holders
from pipeline.peft.types import LOCAL, PEFT, Asked, is_shared
from pipeline.training.stage import patterns

Size = tuple[int, float]  # rank R, s
NO_PARAMETERS: Mapping[str, tuple[int, ...]] = MappingProxyType({})
OF_PAIRS = re.compile(r".+\.(lora|peanut)_[AB]\.weight")  # of an adapter that says nothing of itself: PEFT's own


def read_pairs(
    folder: str,
    sizes: Mapping[str, Size],
    *,
    uniform: Size,
    on_the_output: bool,
    biased_targets: bool,
    parameters: Mapping[str, tuple[int, ...]] = NO_PARAMETERS,
) -> dict[str, Tensor]:
    """`<module>.A` and `<module>.B` of an adapter that is pairs, for each module of `sizes`.

    `sizes`: the rank and s with which each is trained. A pair has these, as PEFT saves patterns, or those of `uniform`, the
    form in which we save them (stage/patterns.py). `on_the_output`: whether it must be multiplicative (h + s·B·A·h), else it
    is a LoRA. `parameters`: those of `sizes` that are no modules, with their shapes. UserError naming what the two differ in.
    """
    where = f"init_adapter = '{folder}'"
    adapter = load_adapter(_existing(folder)) if parameters else load_pairs(_existing(folder))
    kind = MULTIPLICATIVE if on_the_output else LORA
    if adapter.kind not in (None, kind):
        raise UserError(f"{where}: it is a {adapter.kind}, and this run trains a {kind}; set adapter_type")
    pairs = {module: (pair, len(pair.A), 1) for module, pair in adapter.pairs.items()}
    for name, one in placed(adapter, parameters).items():
        scaling = adapter.of_parameters.scaling(name, one.rank) if adapter.of_parameters else (1.0, "")
        pairs[name] = Pair(one.A, one.B, *scaling), one.rank, one.experts
    _check_modules(where, pairs, sizes)
    if on_the_output and biased_targets and not adapter.moves_bias:
        raise UserError(
            f"{where}: it was trained on the modules' products without their biases, and here it would move those too"
        )
    tensors: dict[str, Tensor] = {}
    for module, (pair, rank, matrices) in pairs.items():
        halves, own = {f"{module}.A": pair.A, f"{module}.B": pair.B}, sizes[module]
        if not _has(pair, rank, own):
            _check_size(f"{where}: {module}", pair, rank, own, uniform)
            factors = {module: own[1] / uniform[1]}
            halves = patterns.from_one_rank(halves, {module: own[0]}, factors, {module: matrices})
        tensors |= halves
    return tensors


def read_family(folder: str, targets: Collection[str], family: Any, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter that write_family wrote, by the names of training. UserError naming what differs."""
    where, path = f"init_adapter = '{folder}'", _existing(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{where}: there is no {WEIGHTS_FILE} in it")
    header = read_header(path)
    own = own_facts(header)
    if own.get("kind") != family:
        raise UserError(f"{where}: it is {own.get('kind') or 'not of this program'}, and this run trains {family}")
    modules, theirs = own.get("modules", []), own.get("settings", {})
    _check_modules(where, modules, targets)
    for key, value in settings.items():
        if theirs.get(key) != value and not key.endswith("dropout"):
            raise UserError(
                f"{where}: it was trained with {key} = {printable(theirs.get(key), 60)}, this run has {value}"
            )
    stored = {
        f"{module}.{ours}": f"{PEFT_PREFIX}{module}.{name}"
        for module in modules
        for ours, name in FAMILIES[family].tensors.items()
    }
    tensors = load_tensors(header, stored.values())
    return {name: tensors[source] for name, source in stored.items()}


def read_by_peft(folder: str, targets: Collection[str], asked: Asked) -> dict[str, Tensor]:
    """The tensors of an adapter that write_by_peft wrote, by the names of training. UserError naming what differs."""
    where, path = f"init_adapter = '{folder}'", _existing(folder) / WEIGHTS_FILE
    row = LOCAL[asked.type]
    if not path.is_file():
        raise UserError(f"{where}: there is no {WEIGHTS_FILE} in it")
    header = read_header(path)
    own = own_facts(header)
    if own.get("kind") != PEFT:
        raise UserError(
            f"{where}: it is {own.get('kind') or 'not of this program'}, and this run trains PEFT's {asked.type}"
        )
    _check_modules(where, own.get("modules", []), targets)
    ours, theirs = {"type": asked.type, **asked.settings}, own.get("settings", {})
    for key in sorted(ours.keys() | theirs.keys()):
        if theirs.get(key) != ours.get(key) and not key.endswith("dropout") and key not in row.of_training:
            raise UserError(
                f"{where}: it was trained with {key} = {printable(theirs.get(key), 60)}, this run has {ours.get(key)}; set it in "
                "[peft] as it was"
            )
    modules = set(targets)
    alone = {t.name.removeprefix("base_model."): t.name for t in header.tensors}
    stored = {name: t for name, t in alone.items() if is_shared(name)}
    stored |= {t.name.removeprefix(PEFT_PREFIX): t.name for t in header.tensors if t.name.startswith(PEFT_PREFIX)}
    mine = [t for name, t in stored.items() if is_shared(name) or not modules.isdisjoint(holders(name))]
    tensors = load_tensors(header, mine)
    found = {name: tensors[source] for name, source in stored.items() if source in tensors}
    return _of_full_rank(where, path.with_name(CONFIG_FILE), found) if row.ranked else found


def _of_full_rank(where: str, config: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With zeros for triplets that a budget has dropped."""
    from pipeline.peft.layers import in_full

    facts = read_object(config, where)
    kept = facts.get("rank_pattern") or {}
    found: dict[str, Tensor] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        try:
            full = in_full(own, kept.get(f"{module}.lora_E"), facts["init_r"])
        except ValueError as error:
            raise UserError(f"{where}: {module}: {error}.") from None
        found |= {f"{module}.{name}": tensor for name, tensor in full.items()}
    return found


def read_in_full(folder: str, names: Collection[str], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensor of each of `names`, by its name in the model.

    `tied`: names that are another one's weight, as from `stage.tied_head`: an adapter may hold either, or both.
    UserError naming what the two differ in; nothing is asked of a folder without safetensors where `names` is empty.
    """
    where, path = f"init_adapter = '{folder}'", Path(os.path.expanduser(folder)) / WEIGHTS_FILE
    if not path.is_file():
        if names:
            raise UserError(f"{where}: there is no {WEIGHTS_FILE} in it, and this run trains modules in full")
        return {}
    header = read_header(path)
    stored = _in_full(header)
    sources = {name: name if name in stored else _other(name, tied) for name in names}
    if lacking := [name for name, source in sources.items() if source not in stored]:
        raise UserError(
            f"{where}: it does not have {lacking[0]} in full, which this run trains; "
            "set trainable_modules to what it was trained on"
        )
    if superfluous := sorted((name for name in stored if name not in sources), key=lambda name: (name in tied, name)):
        raise UserError(
            f"{where}: it has {superfluous[0]} in full, which this run does not train; "
            "set trainable_modules to what it was trained on"
        )
    held = load_tensors(header, {stored[source] for source in sources.values()})
    tensors = {name: held[stored[source]] for name, source in sources.items()}
    for name, source in tied.items():
        if name in tensors and not tensors[name].equal(tensors[source]):
            raise UserError(f"{where}: its {name} and {source} differ, and in this model they are one weight")
    return tensors


@torch.no_grad()
def put(stage: Stage, tensors: dict[str, Tensor]) -> None:
    """Into those adapters that the stage has. UserError for a tensor of another shape, before any of them is changed."""
    parameters: dict[str, Tensor] = {**frozen(stage), **trainable(stage)}
    modules = {name.rpartition(".")[0] for name in parameters}
    mine = {
        n: t for n, t in tensors.items() if n.rpartition(".")[0] in modules and (n in parameters or not is_shared(n))
    }
    given, there = dict[str, Tensor](), dict(stage.model.named_modules())
    for name in modules:
        own = {key.rpartition(".")[2]: tensor for key, tensor in mine.items() if key.rpartition(".")[0] == name}
        module = there.get(name)
        for key, tensor in _as_trained(name, module, own).items():
            full = f"{name}.{key}".removeprefix(".")  # what modules share has no module in its name
            parameter = parameters[full]
            if parameter.shape != tensor.shape:
                raise UserError(
                    f"init_adapter: {full} is {list(tensor.shape)}, and the model's module asks for "
                    f"{list(parameter.shape)}; was it trained on another model?"
                )
            given[full] = tensor
    if lacking := [name for name in parameters if name not in given]:
        raise UserError(f"init_adapter: it has nothing for {lacking[0]} and {len(lacking) - 1} more")
    for name, tensor in given.items():
        parameters[name].copy_(tensor)


def _as_trained(name: str, module: nn.Module | None, written: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of a module's `written`: its own parameters, which are what was saved where it has no such method."""
    if isinstance(module, MosLoRA):  # B·M was written
        return {**written, "M": torch.eye(module.M.shape[0])}
    if isinstance(module, ControlAdapter):  # Qᵀ and Q·diag(e^S − 1)
        Q, response = written["A"].T.double(), written["B"].double()
        gains = (Q * response).sum(0) / Q.square().sum(0)
        if (gains <= -1).any() or (response - Q * gains).abs().max() > 2e-2 * response.abs().max():
            raise UserError(f"init_adapter: {name} is no control adapter: B is not Q·diag(e^S − 1) with A = Qᵀ")
        return {"Q": Q, "S": torch.log1p(gains)}
    return written


def _has(pair: Pair, rank: int, size: Size) -> bool:
    return rank == size[0] and math.isclose(pair.scaling, size[1], rel_tol=1e-6)


def _check_size(where: str, pair: Pair, found: int, own: Size, uniform: Size) -> None:
    """UserError, in terms of the module's `own` rank and s where that is nearer, unless the pair, of rank `found`, has those of
    `uniform`."""
    if found not in (own[0], uniform[0]):
        raise UserError(f"{where} has rank {found}, this run's has rank {own[0]}; set lora_rank accordingly")
    if not _has(pair, found, uniform):
        s = own[1] if found == own[0] else uniform[1]
        raise UserError(
            f"{where} was trained with s = {pair.scaling:g} ({pair.origin}), this run has s = {s:g}, "
            "with which it would be another function; set lora_alpha so that s is the same"
        )


def _existing(folder: str) -> Path:
    path = Path(os.path.expanduser(folder))
    if not path.is_dir():
        raise UserError(f"init_adapter = '{folder}': no such folder")
    return path


def _check_modules(where: str, theirs: Collection[str], targets: Collection[str]) -> None:
    """UserError unless the adapter has exactly the modules that are trained."""
    if missing := [name for name in targets if name not in theirs]:
        raise UserError(
            f"{where}: it has nothing for {missing[0]}{_more(missing)}, which this run trains; "
            "set target_modules and layers_to_transform to what it was trained on"
        )
    if superfluous := [name for name in theirs if name not in targets]:
        raise UserError(
            f"{where}: it has {superfluous[0]}{_more(superfluous)}, which this run does not train; "
            "set target_modules and layers_to_transform to what it was trained on"
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _in_full(header: Header) -> dict[str, str]:
    """Names in the model of what the file holds in full, with the names in the file."""
    if own := own_facts(header):
        return {name: PEFT_PREFIX + name for name in (*own.get("full", ()), *own.get("tied", ()))}
    return {t.name.removeprefix(PEFT_PREFIX): t.name for t in header.tensors if not OF_PAIRS.fullmatch(t.name)}


def _other(name: str, tied: Mapping[str, str]) -> str:
    """The tied weight's other name."""
    return tied.get(name) or next((copy for copy, source in tied.items() if source == name), name)
