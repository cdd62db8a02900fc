"""Reading an adapter from disk.

Takes a folder written by us, by PEFT (LORA, PEANUT, IA3, OFT, BOFT, HRA, LN_TUNING, and what pipeline/peft/types.py lists) or
by the founding method's hacked PEFT; gives an `Adapter` with one (A, B, s), or one family's maps, per module, and the tensors
that were trained in full; or refuses with the name of what it holds that a fold would leave out. `adapter_model.bin`, in
which the founding method's adapters were saved, is a pickle: it is read with `weights_only=True`, which runs no code.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts.adapter.adapter import (
    CONFIG_FILE,
    OWN_TYPE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    Adapter,
    OfParameters,
    Pair,
)
from pipeline.artifacts.adapter.family_maps import MAPS, MAPS_OF_PAIRS, maps_of
from pipeline.artifacts.adapter.full import read_full
from pipeline.artifacts.adapter.keys import check_config, check_peanut_config
from pipeline.artifacts.adapter.maps import Added, RowMap, WeightMap, WholeWeight
from pipeline.artifacts.adapter.parameters import of_a_parameter
from pipeline.artifacts.adapter.schema import OF_PAIRS, own_facts, read_config
from pipeline.console import UserError
from pipeline.families import FAMILIES, KINDS, LORA, MULTIPLICATIVE, Family, Kind, chosen
from pipeline.foreign import has_controls, printable, read_by_library
from pipeline.formats.dtypes import FLOATS
from pipeline.formats.experts import ExpertWeights
from pipeline.formats.safetensors import LONGEST_NAME, load_tensors, read_header
from pipeline.names import natural_order
from pipeline.patterns import matches
from pipeline.peft.types import LOCAL, PEFT, REFUSED, is_shared

Facts = dict[str, Any]
# {module: {its tensors' names in the file, without the module's: tensor}}
Grouped = dict[str, dict[str, torch.Tensor]]
PICKLE = "adapter_model.bin"
LORA_TYPE, PEANUT_TYPE = FAMILIES[LORA].peft_type, FAMILIES[MULTIPLICATIVE].peft_type
BIAS = "lora_B.bias"
NORMS_TYPE, OF_NORM = (
    "LN_TUNING",
    ".ln_tuning_layers.",
)  # PEFT's type that trains norms in full, and where its file has them
OF_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# By PEFT's type, the families that are maps and no pair of A and B.
OF_MAPS = {FAMILIES[name].peft_type: FAMILIES[name] for name in MAPS}
SCHEMAS = {**OF_PAIRS, **{key: MAPS[row.name].config for key, row in OF_MAPS.items()}}
# What a variant of a family has beside that one's tensors: PEFT stores it as the weight of a module.
OF_VARIANTS = tuple(
    stored
    for row in FAMILIES.values()
    if row.variant_of
    for stored in row.tensors.values()
    if stored not in FAMILIES[row.variant_of].tensors.values()
)
# What a tensor of the adapter is called, in words.
EXPECTED = {
    key: f"{' or '.join(row.tensors.values()).replace('.weight', '')} of a module"
    for key, row in {**{FAMILIES[kind].peft_type: FAMILIES[kind] for kind in KINDS}, **OF_MAPS}.items()
}


def load_adapter(folder: Path) -> Adapter:
    """Read the adapter in `folder`; tensors keep their dtype. Raises UserError with what is wrong or not foldable."""
    if not folder.is_dir():
        raise UserError(f"--lora: there is no folder {folder}.")
    config = read_config(folder, SCHEMAS)
    if "lora_parameters" in config or (folder / "adapters.safetensors").is_file():
        raise UserError(
            f"{folder} is an adapter of MLX (adapters.safetensors, lora_parameters), whose A and B are PEFT's transposed. "
            "Convert it to PEFT's format, or fuse it with mlx_lm.fuse."
        )
    own, tensors = _read_tensors(folder)
    peft_type, lora = config.get("peft_type"), chosen(LORA, config)
    pairs: dict[str, Pair] = {}
    maps: dict[str, tuple[WeightMap, ...]] = {}
    of_parameters, norms = None, list[str]()
    if peft_type == LORA_TYPE:
        check_config(folder, config)
        grouped, rest, pairs, of_parameters = _lora(folder, tensors, lora, config, own)
    elif is_by_peft(config) and own.get("kind") != MULTIPLICATIVE:
        grouped, rest, maps = _by_peft(folder, tensors, config, own)
    elif peft_type in (PEANUT_TYPE, OWN_TYPE):
        check_peanut_config(folder, config)
        grouped, rest = _grouped(folder, tensors, tuple(FAMILIES[MULTIPLICATIVE].tensors.values()))
        pairs = _pairs(folder, grouped, FAMILIES[MULTIPLICATIVE], config, own)
    elif peft_type in OF_MAPS:
        check_config(folder, config)
        grouped, rest = _grouped(folder, tensors, tuple(OF_MAPS[peft_type].tensors.values()))
        maps = {m: _maps(folder, m, OF_MAPS[peft_type].name, group, config) for m, group in grouped.items()}
    elif peft_type == NORMS_TYPE:
        check_config(folder, config)
        grouped, rest = {}, {name.replace(OF_NORM, "."): tensor for name, tensor in tensors.items()}
        norms = [name.partition(OF_NORM)[0].removeprefix(PEFT_PREFIX) for name in tensors if OF_NORM in name]
        config = {**config, "modules_to_save": [*(config.get("modules_to_save") or ()), *dict.fromkeys(norms)]}
    else:
        types = ", ".join(dict.fromkeys([LORA_TYPE, PEANUT_TYPE, *OF_MAPS, *LOCAL, NORMS_TYPE]))
        reason = f": {REFUSED[str(peft_type)]}" if peft_type in REFUSED else ""
        raise UserError(f"{folder} is an adapter of type {peft_type!r}{reason}. {types} are what can be folded.")
    if not grouped and not norms:
        raise UserError(
            f"{folder} holds no tensors of an adapter of type {peft_type}, {next(iter(rest), 'nothing')} for one."
        )
    full, copied = read_full(folder, rest, config, own, EXPECTED.get(str(peft_type), EXPECTED[PEANUT_TYPE]))
    family = (OF_MAPS[str(peft_type)].name if peft_type in OF_MAPS else PEFT) if maps or norms else None
    if peft_type == lora.peft_type and lora.variant_of:
        family, maps, pairs = lora.name, {**_maps_of_pairs(folder, lora.name, grouped, pairs)}, {}
    _check_agreement(folder, own, pairs)
    return Adapter(
        folder,
        LORA if of_parameters else _kind(folder, str(peft_type), own, family),
        pairs,
        # Stock PEANUT changes the weight alone; ours, and the hacked LORA, were trained on the output with its bias.
        moves_bias=bool(own) or peft_type == LORA_TYPE,
        train_logit_scale=own.get("train_logit_scale", 1.0),
        base_model=own.get("base_model", config.get("base_model_name_or_path")),
        family=family,
        maps=maps,
        full=full,
        keeps_tie=bool(config.get("ensure_weight_tying")),
        trained_over=own.get("trained_over"),
        copied=copied,
        base_fingerprint=own.get("base_fingerprint"),
        stops=tuple(own.get("stops", ())),
        experts={m: ExpertWeights(f["weight"], f["bias"], f["transposed"]) for m, f in _experts(folder, own, pairs)},
        of_parameters=of_parameters,
    )


def load_pairs(folder: Path) -> Adapter:
    """As `load_adapter`; UserError where the adapter is not pairs of A and B with nothing beside them in their modules."""
    adapter = load_adapter(folder)
    if adapter.family:
        raise UserError(
            f"{folder} is an adapter of the family {adapter.family}, which is not a pair of A and B for each module: it "
            "can be folded into the base (merge_lora.py) or loaded with PEFT."
        )
    if biased := [module for module, pair in adapter.pairs.items() if pair.bias is not None]:
        raise UserError(
            f"{folder}: lora_bias: lora_B of {biased[0]} has a bias of its own beside A and B. Such an adapter can be "
            "folded into the base (merge_lora.py) or loaded with PEFT."
        )
    if adapter.of_parameters:
        raise UserError(
            f"{folder}: {next(iter(adapter.of_parameters.pairs))} is adapted by PEFT's target_parameters, a pair for each of its "
            "experts. Such an adapter can be folded into the base (merge_lora.py) or loaded with PEFT."
        )
    if of_embedding := [module for module, pair in adapter.pairs.items() if pair.of_embedding]:
        raise UserError(
            f"{folder}: {of_embedding[0]} is an embedding, adapted by PEFT's {' and '.join(OF_EMBEDDING)}. Such an adapter "
            "can be folded into the base (merge_lora.py) or loaded with PEFT."
        )
    return adapter


def _read_tensors(folder: Path) -> tuple[Facts, dict[str, torch.Tensor]]:
    """Our own facts (empty where others wrote it) and the tensors, whose memory is mapped where that is possible."""
    if (folder / WEIGHTS_FILE).is_file():
        header = read_header(folder / WEIGHTS_FILE)  # says in plain words what is wrong with a damaged file
        return own_facts(header), load_tensors(header)
    if (folder / PICKLE).is_file():
        return {}, _unpickled(folder / PICKLE)
    raise UserError(f"{folder} holds neither {WEIGHTS_FILE} nor {PICKLE}.")


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """The tensors by name in a pickle that holds nothing else; no code of it is run."""
    with read_by_library(f"{printable(file)} is a pickle that holds more than tensors, or is damaged"):
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{printable(file)} does not hold named tensors.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or has_controls(name) or len(name) > LONGEST_NAME:
            raise UserError(f"{printable(file)}: '{printable(name, 80)}' is not a tensor's name. The file is damaged.")
        # A view can claim any size, and other layouts hold no plain numbers: whoever reads them runs out of memory, or fails.
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > file.stat().st_size:
            raise UserError(f"{printable(file)}: '{name}' is not stored as plain numbers. The file is damaged.")
    return tensors


def _grouped(folder: Path, tensors: dict[str, torch.Tensor], ends: tuple[str, ...]) -> tuple[Grouped, dict]:
    """The tensors that end in one of `ends`, by module in natural order, each module with all of them; and the rest."""
    groups: Grouped = {}
    rest = {}
    pattern = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(.+?)\.({'|'.join(map(re.escape, ends))})")
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        match = pattern.fullmatch(stem if stem.endswith(OF_VARIANTS) else name)
        if match is None or match.group(2) in groups.setdefault(match.group(1), {}):
            rest[name] = tensor
        else:
            groups[match.group(1)][match.group(2)] = tensor
    if not any(groups.values()) and not rest:
        raise UserError(f"{folder} holds no tensors: there is nothing to fold.")
    single = [module for module, group in groups.items() if len(group) < len(ends)]
    if single:
        has = ", ".join(name.removesuffix(".weight") for name in groups[single[0]])
        raise UserError(f"{folder}: {single[0]} has {has} only. The adapter is incomplete.")
    for module, group in groups.items():
        for name, tensor in group.items():
            _check_numbers(folder, module, name, tensor)
    return {module: groups[module] for module in sorted(groups, key=natural_order)}, rest


def _check_numbers(folder: Path, module: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS.values():
        raise UserError(
            f"{folder}: {module}: the adapter's {name} is {tensor.dtype}, not floating point of 16 bits or more."
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{folder}: {module}: the adapter holds NaN or infinite values. Its training diverged.")


def _maps(folder: Path, module: str, family: str, group: dict[str, torch.Tensor], config: Facts) -> tuple[RowMap, ...]:
    try:
        return maps_of(family, group, config)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: {module}: {error}.") from None


def is_by_peft(config: Facts) -> bool:
    """Whether PEFT's own layer alone knows what an adapter does to a weight: one that is no pair and has no map of ours."""
    row = FAMILIES[MULTIPLICATIVE]
    linear = config.get("depth", 0) == 0 and config.get("act_fn", "relu") == row.settings["act_fn"]
    return config.get("peft_type") in LOCAL and not (config["peft_type"] == row.peft_type and linear)


def _by_peft(
    folder: Path, tensors: dict[str, torch.Tensor], config: Facts, own: Facts
) -> tuple[Grouped, dict[str, torch.Tensor], dict[str, tuple[WeightMap, ...]]]:
    """Of a type of PEFT's own: the tensors by module, the rest, and the maps. UserError where PEFT refuses its configuration."""
    from pipeline.peft.layers import check_settings, in_full, of_module, settings_of_file

    where, row = f"{folder}/{CONFIG_FILE}: ", LOCAL[config["peft_type"]]
    settings = settings_of_file(row.name, config, where)
    check_settings(row.name, settings, where)
    pattern = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(.+?)\.({row.prefix}.+)")
    grouped: Grouped = {}
    common, rest = {}, {}
    for name, tensor in tensors.items():
        match, alone = pattern.fullmatch(name), name.removeprefix("base_model.")
        projection = next((one for one in row.projections if one in name.split(".")), None)
        if projection is not None:
            common[projection] = tensor
        elif row.shared and is_shared(alone):
            _check_numbers(folder, "all modules", alone, tensor)
            common[alone] = tensor
        elif match is None:
            rest[name] = tensor
        else:
            grouped.setdefault(match.group(1), {})[match.group(2)] = tensor
            if tensor.is_floating_point():
                _check_numbers(folder, match.group(1), match.group(2), tensor)
    if row.shared and not grouped:  # nothing of a module is its own
        grouped = {module: {} for module in own.get("modules", ())}
    if row.shared and not grouped:
        raise UserError(
            f"{folder} holds {', '.join(common)} alone, and does not name its modules, so nothing here can tell them. Merge it "
            "with PEFT."
        )
    grouped = {module: grouped[module] for module in sorted(grouped, key=natural_order)}
    if row.ranked:
        for module, group in grouped.items():
            try:
                kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
                grouped[module] = in_full(group, kept, settings["init_r"])
            except ValueError as error:
                raise UserError(f"{folder}: {module}: {error}.") from None
    maps = {
        module: (WholeWeight(row.name, of_module(settings, module, where), group, common, module),)
        for module, group in grouped.items()
    }
    return grouped, rest, maps  # type: ignore[return-value]


def _lora(
    folder: Path, tensors: dict[str, torch.Tensor], row: Family, config: Facts, own: Facts
) -> tuple[Grouped, dict[str, torch.Tensor], dict[str, Pair], OfParameters | None]:
    """Of a LoRA or a variant of it: the tensors by module, the rest, the pairs, those of an embedding among them, and LoRAs of
    parameters."""
    if config.get("use_dora") and (of_one := next((name for name in tensors if name.endswith(OF_EMBEDDING)), None)):
        raise UserError(f"{folder}: use_dora on an embedding ({of_one}). That is not folded: load it with PEFT.")
    ends = (*row.tensors.values(), *([BIAS] if config.get("lora_bias") else []))
    grouped, rest = _grouped(folder, tensors, ends)
    of_modules = {m: group for m, group in grouped.items() if not of_a_parameter(folder, m, config)}
    pairs = _pairs(folder, of_modules, row, config, own)
    if any(name.endswith(OF_EMBEDDING) for name in rest):
        of_embedding, rest = _grouped(folder, rest, OF_EMBEDDING)
        pairs |= _embedding_pairs(folder, of_embedding, config, own)
        grouped = grouped | of_embedding
    A, B = row.tensors["A"], row.tensors["B"]
    others = {m: (group[A], group[B]) for m, group in grouped.items() if m not in pairs}
    if not others:
        return grouped, rest, pairs, None
    if len(ends) > 2:
        raise UserError(
            f"{folder}: {next(iter(others))}: target_parameters with {ends[-1]}. That is not folded: load it with PEFT."
        )
    names = tuple(config["target_parameters"])
    return grouped, rest, pairs, OfParameters(names, others, partial(_checked_scaling, folder, config=config, own=own))


def _pairs(folder: Path, grouped: Grouped, row: Family, config: Facts, own: Facts) -> dict[str, Pair]:
    A, B = row.tensors["A"], row.tensors["B"]
    return {
        module: _pair(folder, module, group[A], group[B], config, own, group.get(BIAS))
        for module, group in grouped.items()
    }


def _embedding_pairs(folder: Path, grouped: Grouped, config: Facts, own: Facts) -> dict[str, Pair]:
    """Of an embedding [V, D], which PEFT adapts as W + s·(B·A)ᵀ: A [R, V], B [D, R]."""
    A, B = OF_EMBEDDING
    return {
        module: replace(_pair(folder, module, t[B].T, t[A].T, config, own, None), of_embedding=True)
        for module, t in grouped.items()
    }


def _pair(
    folder: Path, module: str, A: torch.Tensor, B: torch.Tensor, config: Facts, own: Facts, bias: torch.Tensor | None
) -> Pair:
    shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}"
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or 0 in A.shape + B.shape:
        raise UserError(f"{folder}: {module}: {shapes} are not R × D and D × R.")
    if bias is not None and bias.shape != B.shape[:1]:
        raise UserError(f"{folder}: {module}: the bias of lora_B is {tuple(bias.shape)}, {shapes}.")
    scaling, origin = _checked_scaling(folder, module, A.shape[0], config=config, own=own)
    return Pair(A, B, scaling, origin, bias)


def _checked_scaling(folder: Path, name: str, rank: int, *, config: Facts, own: Facts) -> tuple[float, str]:
    """s of a module or parameter whose pair has this rank, and where it comes from. UserError where the configuration has another
    rank, or s is 0."""
    scaling, origin = _scaling(folder, name, rank, config, own)
    declared = _matching(folder, config, "rank_pattern", name) or [config["r"]]
    if rank not in declared:
        raise UserError(f"{folder}: {name} has rank {rank} by its tensors, but {CONFIG_FILE} says {declared[0]}.")
    if scaling == 0:
        raise UserError(
            f"{folder}/{CONFIG_FILE}: the scaling of {name} is 0 ({origin}): the adapter does nothing there."
        )
    return scaling, origin


def _maps_of_pairs(
    folder: Path, family: str, grouped: Grouped, pairs: dict[str, Pair]
) -> dict[str, tuple[RowMap, ...]]:
    maps = {}
    for module, pair in pairs.items():
        try:
            added = Added(pair.A, pair.B, pair.scaling, pair.origin)
            maps[module] = MAPS_OF_PAIRS[family](added, grouped[module])
        except ValueError as error:
            raise UserError(f"{folder}: {module}: {error}.") from None
    return maps


def _scaling(folder: Path, module: str, rank: int, config: Facts, own: Facts) -> tuple[float, str]:
    """A module's s and where it comes from."""
    if config["peft_type"] != LORA_TYPE:
        origin = f"alpha / rank = {own['alpha']:g} / {own['rank']}" if own else f"scaling of {CONFIG_FILE}"
        return float(config["scaling"]), origin
    alphas = _matching(folder, config, "alpha_pattern", module) or [config["lora_alpha"]]
    if len(set(alphas)) > 1:
        raise UserError(
            f"{folder}/{CONFIG_FILE}: several entries of alpha_pattern match {module}, with {alphas}. PEFT takes the "
            "first, but saves them in alphabetical order, so which one the training took is lost: leave that one."
        )
    if config.get("use_rslora"):  # rsLoRA, arXiv 2312.03732
        return alphas[0] / math.sqrt(rank), f"alpha / sqrt(rank) = {alphas[0]:g} / sqrt({rank})"
    return alphas[0] / rank, f"alpha / rank = {alphas[0]:g} / {rank}"


def _matching(folder: Path, config: Facts, key: str, module: str) -> list[Any]:
    """The values of PEFT's rank_pattern or alpha_pattern for a module: of all patterns that match its name's end."""
    where = f"{folder}/{CONFIG_FILE}: {key}"
    return [value for pattern, value in (config.get(key) or {}).items() if matches(pattern, module, where)]


def _kind(folder: Path, peft_type: str, own: Facts, family: str | None) -> Kind | None:
    """Of pairs: what the files say they are. None where they leave it open, and for the other families."""
    if family:
        if own and own.get("kind") != family:
            raise UserError(f"{folder}: {CONFIG_FILE} says {family}, the weights' metadata {own.get('kind')!r}.")
        return None
    if own:
        if own.get("kind") not in KINDS or (own["kind"] == LORA) != (peft_type == LORA_TYPE):
            raise UserError(f"{folder}: {CONFIG_FILE} says {peft_type}, the weights' metadata {own.get('kind')!r}.")
        return own["kind"]
    return None if peft_type == LORA_TYPE else MULTIPLICATIVE


def _experts(folder: Path, own: Facts, pairs: dict[str, Pair]) -> Iterable[tuple[str, Facts]]:
    """Our facts of the modules of experts. UserError for one that has no pair."""
    if lost := [module for module in own.get("experts", {}) if module not in pairs]:
        raise UserError(f"{folder}: the weights' metadata tells of experts in {lost[0]}, and there is no pair for it.")
    return own.get("experts", {}).items()


def _check_agreement(folder: Path, own: Facts, pairs: dict[str, Pair]) -> None:
    for module, pair in pairs.items():
        if own and not math.isclose(pair.scaling, own.get("scaling", math.nan), rel_tol=1e-6):
            raise UserError(
                f"{folder}: the scaling of {module} is {pair.scaling:g} by {CONFIG_FILE} and {own.get('scaling')} by "
                "the weights' metadata. To fold with another strength, leave the files as they are and use --scale."
            )
