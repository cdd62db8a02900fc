"""Base weights: from safetensors into a stage, one tensor at a time, only the stage's own.

Takes a stage whose parameters are on `meta` and a model folder; fills the parameters on the device in the given dtype.
A layer that packs its weight (quantization.py) is given it as soon as it is read. No process ever holds a weight that
its stage does not own.
"""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from pipeline.console import UserError
from pipeline.model.packed import Packs
from pipeline.model.stage import Stage


def tensor_files(folder: str) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it, for a single-file or a sharded model folder."""
    root = Path(folder)
    index = root / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = {name: root / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is not an index of safetensors files ({error!r}); the download is incomplete"
            ) from error
        lost = sorted({file.name for file in files.values() if not file.is_file()})
        if lost:
            raise UserError(f"{index} names files that are not there: {', '.join(lost)}; the download is incomplete")
        return files
    single = root / "model.safetensors"
    if not single.is_file():
        found = ", ".join(sorted(p.name for p in root.glob("*.bin"))[:3]) or "no weights at all"
        raise UserError(f"model = '{folder}': needs model.safetensors or model.safetensors.index.json; found {found}")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def _open(path: Path) -> Any:
    """safetensors' reader of `path`, for `with`."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not readable: {error}; the download is incomplete") from error


def load(stage: Stage, folder: str, dtype: torch.dtype, device: torch.device) -> None:
    """Fill every parameter and persistent buffer of `stage`. Raises UserError naming what the folder lacks."""
    files = tensor_files(folder)
    _separate_tied_head(stage)
    wanted = dict(stage.model.state_dict(keep_vars=True))
    shared = _shares_head(stage)
    if shared:
        del wanted["lm_head.weight"]
    sources = {name: source for name in wanted if (source := _source(name, stage.model, files))}
    if len(sources) == len(wanted):
        _load_by_name(stage.model, wanted, sources, files, dtype, device)
    else:
        _load_converted(stage, files, device, missing=sorted(set(wanted) - set(sources)))
    if shared:
        stage.head.weight = stage.model.get_input_embeddings().weight
    for name, parameter in stage.model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.is_meta:
            raise UserError(f"model = '{folder}' has no tensor for {name}")


def _separate_tied_head(stage: Stage) -> None:
    """On a last stage without the embedding, give a tied head a parameter of its own: it reads the embedding's tensor."""
    if stage.is_last and not stage.is_first:
        stage.head.weight = nn.Parameter(stage.head.weight.detach(), requires_grad=False)


def _shares_head(stage: Stage) -> bool:
    """Whether head and embedding are one parameter: tied, and both on this stage."""
    return stage.is_first and stage.is_last and tied_source(stage.model, "lm_head.weight") is not None


def check_saved_as_run(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose checkpoint is not what it runs (experts one by one): it cannot be saved in parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        raise UserError(
            f"full_fine_tune: transformers stores '{model.config.model_type}' in another form than it runs, and writing "
            "that form from several stages is not built yet; train an adapter"
        )


def stored_in_another_form(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Those of `names`, parameters of `model`, that a checkpoint holds under another name or in another shape."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, {name: model.get_parameter(name) for name in names})
    return [name for name in names if name not in stored]


def tied_source(model: PreTrainedModel, name: str) -> str | None:
    """The name under which a tied checkpoint stores `name`: the embedding's, for a tied head; else None."""
    if not model.config.tie_word_embeddings or not name.startswith("lm_head."):
        return None
    return f"{model.base_model_prefix}.embed_tokens.weight"


def _source(name: str, model: PreTrainedModel, files: dict[str, Path]) -> str | None:
    """The checkpoint's name for `name`: its own, the tied one, or without the base model's prefix."""
    candidates = (name, tied_source(model, name), name.removeprefix(f"{model.base_model_prefix}."))
    return next((c for c in candidates if c in files), None)


def _load_by_name(
    model: PreTrainedModel, wanted: dict[str, Any], sources: dict[str, str], files: dict[str, Path],
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    keep_fp32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    quantised = any(isinstance(module, Packs) for module in model.modules())
    done: dict[str, torch.Tensor] = {}
    for path in sorted({files[s] for s in sources.values()}):
        with _open(path) as file:
            if absent := {source for source in sources.values() if files[source] == path} - set(file.keys()):
                raise UserError(f"{path} lacks {', '.join(sorted(absent)[:4])}, which the index says it has")
            for name, source in sources.items():
                if files[source] != path:
                    continue
                if source not in done:
                    tensor = file.get_tensor(source)
                    if tensor.shape != wanted[name].shape:
                        raise UserError(
                            f"{path.name}: {source} has shape {list(tensor.shape)}, "
                            f"but config.json makes it {list(wanted[name].shape)}"
                        )
                    to = torch.float32 if any(part in name.split(".") for part in keep_fp32) else dtype
                    # On the CPU a tensor is a view of the mapped file, and a norm that stays would keep all of it there.
                    copy = quantised and not _packs(model, name)
                    kind = to if tensor.is_floating_point() else None
                    done = {source: tensor.to(device=device, dtype=kind, copy=copy)}
                _assign(model, name, done[source])


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    if _packs(model, name):
        parent._parameters[leaf] = parent.pack(tensor)
    elif leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor


def _packs(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight of a layer that stores it in another form."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(parent), Packs)


def _load_converted(stage: Stage, files: dict[str, Path], device: torch.device, missing: list[str]) -> None:
    """Checkpoints stored under other names or shapes than the model's (experts one by one): transformers' own conversion.

    Uses transformers' loader with lazy slices of the tensors of this stage's layers. Written for transformers 5.23,
    which has no public function for a part of a model; `tests/test_weights.py` covers it with a mixture of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    mapping = get_model_conversion_mapping(stage.model)
    if not mapping:
        raise UserError(
            f"the model folder has no tensor for {', '.join(missing[:4])}{' …' if len(missing) > 4 else ''}"
        )
    if any(isinstance(module, Packs) for module in stage.model.modules()):
        raise UserError(
            f"quantization: the model folder stores model_type '{stage.model.config.model_type}' in another form than it "
            f"runs (it has no tensor for {missing[0]}), and quantising such weights is not built; remove [quantization]"
        )
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # one tensor at a time instead of a pool of threads
    opened = {path: _open(path) for path in sorted(set(_files_of(stage, files)))}
    handles = {path: handle.__enter__() for path, handle in opened.items()}
    try:
        slices = {name: handles[files[name]].get_slice(name) for name in _names_of(stage, files)}
        tied = tied_source(stage.model, "lm_head.weight")
        if tied in files and stage.is_last and "lm_head.weight" not in slices:
            slices["lm_head.weight"] = handles[files[tied]].get_slice(tied)
        config = LoadStateDictConfig(device_map={"": device}, dtype=stage.model.dtype, weight_mapping=mapping)
        report, _ = convert_and_load_state_dict_in_model(stage.model, slices, config)
    finally:
        for handle in opened.values():
            handle.__exit__(None, None, None)
    for name, found, right in sorted(report.mismatched_keys):
        raise UserError(f"{name} has shape {list(found)}, but config.json makes it {list(right)}")


def _names_of(stage: Stage, files: dict[str, Path]) -> Iterable[str]:
    """Checkpoint names that may belong to this stage: those without a layer number, or with one of its own."""
    for name in files:
        parts = name.split(".")
        if "layers" not in parts or int(parts[parts.index("layers") + 1]) in stage.layer_indices:
            yield name


def _files_of(stage: Stage, files: dict[str, Path]) -> Iterable[Path]:
    return (files[name] for name in _names_of(stage, files))
