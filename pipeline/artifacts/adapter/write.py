"""Writing an adapter: a folder that stock PEFT loads wherever one of its types computes the same function.

Takes tensors under global names (`model.layers.3.mlp.down_proj.A` and `.B`) and the facts of their training; gives
`adapter_model.safetensors` and `adapter_config.json`, and no pickle. What the tensors of each family are:

    multiplicative_lora, lora                      .A and .B, of the shapes in adapter.py
    dora   m/‖W + s·B·A‖ ⊙ (W + s·B·A), by rows    .A [R, D_in], .B [D_out, R], .lora_magnitude_vector [D_out]
    ia3    l ⊙ W, by rows, or by columns where feedforward      .ia3_l [D_out, 1] or [1, D_in]
    oft    W·R, R of orthogonal blocks             .oft_R [blocks, k·(k − 1)/2]
    boft   s ⊙ W·R, by rows                        .boft_R [1, blocks, k, k], .boft_s [D_out, 1]
    hra    W·H₁·…·H_R, reflections                 .hra_u [D_in, R]
    peft   one of pipeline/peft/types.py           as PEFT's layer names them

A multiplicative adapter is written as PEFT's `PEANUT` type (depth 0, linear): stock PEFT then loads, runs and merges it
correctly, and tools that know LoRA alone refuse it. As `LORA` they would take it, and be wrong on square layers.
PEANUT changes a linear module's weight and never its bias, so on a module with a bias, or on a layer's experts, it is not
this function: such an adapter is written under a type of ours, which PEFT refuses.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Required, TypedDict, Unpack

import torch

from pipeline import version
from pipeline.artifacts.adapter import full as full_tensors
from pipeline.artifacts.adapter.adapter import (
    CONFIG_FILE,
    FORMAT_VERSION,
    METADATA_KEY,
    OWN_TYPE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    adapter_pairs,
)
from pipeline.artifacts.adapter.parameters import file_stems
from pipeline.families import FAMILIES, KINDS, MULTIPLICATIVE, Kind
from pipeline.families import settings as settings_of
from pipeline.files import atomic_folder, write_json
from pipeline.formats.dtypes import CODES
from pipeline.formats.experts import NO_EXPERTS, ExpertWeights
from pipeline.formats.safetensors import TensorSpec, tensor_bytes, write_safetensors
from pipeline.names import holders, layers_of, loadable_name, natural_order, public_name
from pipeline.peft.types import LOCAL, PEFT, Asked, is_shared

Tensors = Mapping[str, torch.Tensor]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Training(TypedDict, total=False):
    """What the files say of the training, whatever the family.

    `base_model`: the name or path it was trained on. Of a path the metadata has the last part alone, as adapters get shared;
    the configuration has all of it, so that PEFT finds the base on this machine (an upload writes the name there).
    `full`: weights of the model that were trained in full beside the adapter, by their names in it; `tied`: another name
    of one of them → that one's (full.py). `trained_over`: of a quantised base
    what `schema.TrainedOver` has; `stops`: ids at which the model learned to stop, beside those at which its base does;
    `base_fingerprint`: of its values (formats/fingerprint.py). The fold compares
    both with what it is given.
    """

    base_model: Required[str]
    train_logit_scale: Required[float]
    full: Tensors
    tied: Mapping[str, str]
    trained_over: Mapping[str, Any] | None
    base_fingerprint: str | None
    stops: Sequence[int]


def save_adapter(folder: Path, tensors: Tensors, *, replace: bool = False, **arguments: Any) -> None:
    """Write an adapter to `folder`, which appears whole or not at all. Arguments are those of `write_adapter`.

    Raises UserError where `folder` has something in it (unless `replace`) or the disk is full (exit code 28).
    """
    with atomic_folder(folder, replace=replace) as temporary:
        write_adapter(temporary, tensors, **arguments)


def write_adapter(
    folder: Path,
    tensors: Tensors,
    *,
    kind: Kind,
    rank: int,
    alpha: float,
    dropout: float,
    biased_targets: bool,
    facts: Mapping[str, Any] = NOTHING,
    use_rslora: bool = False,
    experts: Mapping[str, ExpertWeights] = NO_EXPERTS,
    parameters: Mapping[str, int] = NOTHING,
    **training: Unpack[Training],
) -> None:
    """Write the two files of an adapter that is pairs into `folder`, which exists and is the caller's to put in place.

    `tensors`: `<module>.A` and `<module>.B` for every module, floating point, with R = `rank`. `biased_targets`: whether
    any of the modules has a bias. `facts`: more for the metadata (JSON values). `use_rslora`: s = alpha / √rank (rsLoRA,
    arXiv 2312.03732); of a LoRA only. `experts`: those of the modules that are a layer's experts. `parameters`: of a LoRA, those
    that are parameters, each module's in the order in which it holds them, with how many matrices each is: A [R·E, D] and B [D,
    R·E] as PEFT has them. Raises ValueError where a pair is incomplete or misshapen, or not finite.
    """
    pairs = adapter_pairs(tensors)
    _check_pairs(pairs, kind, rank, parameters)
    scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    values = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "scaling": scaling,
    }
    row = FAMILIES[kind]
    beyond_peft = row.on_output and (biased_targets or experts)
    config = {"peft_type": OWN_TYPE if beyond_peft else row.peft_type, **settings_of(row, values)}
    own = {
        **facts,
        "rank": rank,
        "alpha": alpha,
        "scaling": scaling,
        "dropout": dropout,
        "biased_targets": biased_targets,
        "experts": {module: form._asdict() for module, form in experts.items()},
        "layers": layers_of(pairs),
    }
    _write(folder, tensors, list(pairs), kind, config, own, list(parameters), **training)


def write_family(
    folder: Path, tensors: Tensors, *, family: str, settings: Mapping[str, Any], **training: Unpack[Training]
) -> None:
    """Write the two files of an adapter of a family that is more than pairs, into `folder` as `write_adapter` does.

    `tensors`: for every module those of its family, floating point. `settings`: the family's own keys of PEFT's config.
    Raises ValueError where a module lacks a tensor or has one too many, or a tensor is not finite.
    """
    names = FAMILIES[family].tensors
    modules = sorted({name.rpartition(".")[0] for name in tensors}, key=natural_order)
    if not modules or {f"{module}.{key}" for module in modules for key in names} != set(tensors):
        raise ValueError(f"an adapter of the family {family} has {', '.join(names)} for every module and nothing else")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not math.isfinite(float(tensor.float().abs().sum())):
            raise ValueError(f"{name}: the adapter holds NaN or infinite values, or integers")
    config = {**settings, "peft_type": FAMILIES[family].peft_type}
    _write(folder, tensors, modules, family, config, {"settings": dict(settings)}, **training)


def in_file(name: str) -> str:
    """A tensor's name in a file of PEFT's, which has what modules share beside the model."""
    return f"base_model.{name}" if is_shared(name) else f"{PEFT_PREFIX}{name}"


def write_by_peft(
    folder: Path,
    tensors: Tensors,
    *,
    modules: list[str],
    asked: Asked,
    config: Mapping[str, Any],
    **training: Unpack[Training],
) -> None:
    """The same of a type of PEFT's own. `tensors`: of each of `modules`, as PEFT names them in a file; `config`: PEFT's.

    Raises ValueError where a tensor is not finite, or of none of the modules.
    """
    for name, tensor in tensors.items():
        if set(modules).isdisjoint(holders(name)) and not is_shared(name):
            raise ValueError(f"{name} is of none of the adapter's modules")
        if tensor.is_floating_point() and not math.isfinite(float(tensor.float().abs().sum())):
            raise ValueError(f"{name}: the adapter holds NaN or infinite values")
    own = {"settings": {"type": asked.type, **asked.settings}}
    if LOCAL[asked.type].ranked:
        from pipeline.peft.layers import kept_only

        tensors, pattern = kept_only(tensors)
        config = {**config, "rank_pattern": pattern}
    stored = {in_file(name): tensor.contiguous() for name, tensor in tensors.items()}
    _write_files(folder, stored, modules, PEFT, {**config, "peft_type": asked.type}, own, **training)


def _write(
    folder: Path,
    tensors: Tensors,
    modules: list[str],
    family: str,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    parameters: list[str] | None = None,
    **training: Unpack[Training],
) -> None:
    """Both files, of a family whose tensors its row names. `parameters`: those of `modules` that are none."""
    stems = file_stems(parameters or [])
    if parameters:
        config = {**config, "target_modules": [m for m in modules if m not in stems], "target_parameters": parameters}
    stored = {
        f"{PEFT_PREFIX}{stems.get(module, module)}.{in_file}": tensors[f"{module}.{key}"].contiguous()
        for module in modules
        for key, in_file in FAMILIES[family].tensors.items()
    }
    _write_files(folder, stored, modules, family, config, own, **training)


def _write_files(
    folder: Path,
    stored: dict[str, torch.Tensor],
    modules: list[str],
    family: str,
    config: Mapping[str, Any],
    own: Mapping[str, Any],
    **training: Unpack[Training],
) -> None:
    """Both files. `stored`: the adapter's tensors by their names there; `config` and `own`: what only this family's configuration
    and metadata have."""
    full, tied = training.get("full", NOTHING), training.get("tied", NOTHING)
    stored |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in full_tensors.named(full, tied).items()}
    facts = {
        "format_version": FORMAT_VERSION,
        "version": version.full(),
        "kind": family,
        "train_logit_scale": training["train_logit_scale"],
        "base_model": public_name(training["base_model"]),
        "modules": modules,
        "trained_over": training.get("trained_over"),
        "base_fingerprint": training.get("base_fingerprint"),
        "stops": list(training.get("stops", ())),
        **full_tensors.for_metadata(full, tied),
    }
    specs = [TensorSpec(name, CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()]
    metadata = {"format": "pt", METADATA_KEY: json.dumps({**own, **facts})}
    write_safetensors(folder / WEIGHTS_FILE, specs, lambda name: [tensor_bytes(stored[name])], metadata)
    head = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loadable_name(training["base_model"]),
        "inference_mode": True,
        "target_modules": modules,
    }
    write_json(folder / CONFIG_FILE, {**head, **config, **full_tensors.for_config(full, tied, config["peft_type"])})


def _check_pairs(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], kind: Kind, rank: int, parameters: Mapping[str, int]
) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {KINDS}")
    if not pairs or rank < 1:
        raise ValueError("an adapter needs a module and a rank of at least 1")
    for module, (A, B) in pairs.items():
        fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] == rank * parameters.get(module, 1)
        if kind == MULTIPLICATIVE:
            fits = fits and A.shape[1] == B.shape[0]
        if not fits or not (A.is_floating_point() and B.is_floating_point()):
            raise ValueError(f"{module}: A {tuple(A.shape)} and B {tuple(B.shape)} are not a {kind} of rank {rank}")
        if not math.isfinite(float(A.float().abs().sum() + B.float().abs().sum())):
            raise ValueError(f"{module}: the adapter holds NaN or infinite values")
